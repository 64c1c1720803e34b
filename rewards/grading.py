"""Judge one final answer against one gold answer. Runs in a worker process.

The conventions, and why:

Numbers are compared exactly: 0.5 is 1/2, 10^100 is not 10^100 + 1, and 5.001 is not 5.
    *Rounding.* A decimal stands for an exact value that has no finite decimal if it is the
    correct rounding of it to at least two places, and has enough significant digits: 2 where the
    gold is the decimal, since its author chose the precision (gold 0.33 accepts 1/3, 6.67 accepts
    20/3), 4 where the answer is (gold 600/7 accepts 85.71; but gold 1/3 rejects 0.33 and 0.333,
    and gold pi rejects 3.14, which is what a guess looks like). Twelve or more digits are a
    printed float, right to one unit of the last. Two decimals are compared exactly, because which
    of them was rounded is not known.
    *Marks.* A percent or degree sign, a unit, a currency or a numeral's base that only one side
    has is ignored, because the question often names it: 28% equals 28 and 0.28, 120 degrees equals
    120 and 2 pi / 3, 40_9 equals 40. Where both have one they must agree, by a known conversion
    if need be: 5 cm is not 5 m, 1 m is 100 cm.
    *Working out.* Where the gold is a number, so must the answer be: 7 + 3 - 9 is not 1, since
    repeating the question is not answering it. Fractions, mixed numbers, powers and scientific
    notation are numbers; 7 + 3 - 9 = 1 says 1.
    *Separators.* 58,500 and 58 500 are one number (and also read as a list where it is compared
    with one); 1,22 and 0,111 are decimals too, since no thousands are grouped so; 1,234 is not.
Expressions are equal if their values are, at fixed sample points, to 40 and then 110 digits. The
    letters k, m, n, j stand for integers, the others for reals of either sign. ``log`` is natural
    or decimal, whichever makes both sides agree. An even root of a negative is imaginary, an odd
    one real. Factored, expanded, simplified: form does not count.
Tuples, vectors, matrices and intervals are ordered, and brackets of pairs count: [0,9) is not
    (0,9). (0,1) may be a point or an interval, whichever the other side is. A vector may be
    written as a tuple.
Lists (1, 2, 3) and sets are not ordered: most questions that have several answers ask for all of
    them. Repetitions count in lists of numbers, but not in sets and lists of tuples (solutions).
    A list of n values equals a tuple if in the same order. Named values are matched by name.
Equations: ``x = 5``, ``f(x) = 5``, ``|AB| = 5`` say 5; ``a^2 + b = 0`` does not say 0. Whole
    equations are equal up to a factor. Inequalities, intervals and set-builders are sets of reals.
Multiple choice: C, (C), \\text{C}, "C." and "C) 12" are C. More than one letter is not.
Text is compared by its words, without case, articles and punctuation.
"""

import re
from itertools import product

from rewards.compare import has_value, same_answer
from rewards.evaluate import Undefined
from rewards.syntax import Node, parse_answer
from rewards.text import normalize_text, normalize_words, spell, strip_dress
from rewards.tokens import ParseError
from rewards.vocabulary import DIRECTIONS, FILLERS

RIGHT, WRONG, UNPARSEABLE, BAD_GOLD = "right", "wrong", "unparseable", "bad_gold"
UNREAD_GOLD = "unread_gold"  # a bad gold that is perhaps mathematics which this grammar lacks

# Longer texts are compared only as texts.
MAX_CHARS = 20_000

_THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?![\d,]| \d)")
_DECIMAL_COMMA = re.compile(r"-?(?:0,\d+|\d+,(?:\d{2}|\d{4,}))")
_EUROPEAN = re.compile(r"-?\d{1,3}(?:\.\d{3})+,\d+")
_OPTION = re.compile(
    r"\W*(?:(?:option|choice|answer)\W+)?\(?([A-J])(?:\)|[.:,])?(?:$|(?<=[).:,])\s*(.*)$)",
    re.DOTALL | re.IGNORECASE,
)
_NOTHING = re.compile(
    r"(?:there (?:are )?)?no (?:real |such )?(?:solutions?|roots?)(?: exists?)?|none|empty set"
)
_EVERYTHING = re.compile(r"(?:all |set of |any )*(?:real numbers?|reals)")
_MATHEMATICAL = re.compile(r"[\\^_<>=]")
_LEAD = re.compile(r"(?:[a-z]{3,}\s+)*(?=\d)|")
_PROSE = re.compile(r"[^\W\d_]{2}|^[^\W\d_]$")


def judge_answer(answer: str, gold: str) -> str:
    """Return ``right``, ``wrong``, ``unparseable`` (the answer), ``bad_gold`` or ``unread_gold``.

    Takes any strings, raises nothing but ``MemoryError``, and may take long: callers set limits.
    """
    answer, gold = (strip_dress(normalize_text(text)) for text in (answer, gold))
    if not gold:
        return BAD_GOLD
    if not answer:
        return UNPARSEABLE
    answer, gold = _read_phrase(answer), _read_phrase(gold)
    if spell(answer) == spell(gold):
        return RIGHT
    if max(len(answer), len(gold)) > MAX_CHARS:
        return UNPARSEABLE if len(gold) <= MAX_CHARS else BAD_GOLD
    options = _read_option(gold), _read_option(answer)
    if options[0] and options[0] == options[1]:
        return RIGHT
    golds, answers = _parse_readings(gold), _parse_readings(answer)
    if not golds:
        return _judge_prose(answer, gold)
    if not answers:
        return RIGHT if _same_words(answer, gold) else UNPARSEABLE
    if _contradict(answer, gold):
        return WRONG
    return _compare_readings(golds, answers)


def _compare_readings(golds: list[Node], answers: list[Node]) -> str:
    verdict = UNPARSEABLE
    for gold, answer in product(golds, answers):
        try:
            if same_answer(gold, answer):
                return RIGHT
            verdict = WRONG
        except (Undefined, RecursionError):
            continue
    if verdict == UNPARSEABLE and not any(has_value(gold) for gold in golds):
        return BAD_GOLD
    return verdict


def _judge_prose(answer: str, gold: str) -> str:
    """Compare with a gold that is no mathematics: words with words."""
    plain = _plain(gold)
    if not _PROSE.search(plain) or _MATHEMATICAL.search(plain) or gold.count("{") > gold.count("}"):
        return UNREAD_GOLD
    parts = [_split_words(text) for text in (answer, gold)]
    return RIGHT if parts[0] == parts[1] else WRONG


def _split_words(text: str) -> list[str]:
    """The names in a list of names ("Alice, Bob and Carol"), in order of the alphabet."""
    parts = re.split(r",|;|\band\b|、|和|与", _plain(text))
    return sorted(words for part in parts if (words := normalize_words(part)))


def _same_words(answer: str, gold: str) -> bool:
    """Say whether two texts are the same words, and nothing but words."""
    letters = [re.sub(r"[\s.,!?'-]", "", _plain(text)) for text in (answer, gold)]
    return letters[0].isalpha() and letters[0].casefold() == letters[1].casefold()


def _plain(text: str) -> str:
    return re.sub(r"\\(?:text|math)[a-z]*\s*|[{}]", " ", text)


def _contradict(answer: str, gold: str) -> bool:
    """Say whether the words around two numbers say different things: June 20, July 20."""
    texts = _plain(answer).casefold(), _plain(gold).casefold()
    leads = [set(_LEAD.match(text).group().split()) - FILLERS for text in texts]
    if all(leads) and not leads[0] & leads[1]:
        return True
    ours, theirs = (set(re.findall(r"[a-z]+", text)) & DIRECTIONS for text in texts)
    return bool(ours) and bool(theirs) and ours != theirs


def _read_phrase(text: str) -> str:
    """Write "no real solutions" and "all real numbers" as the sets that they are."""
    words = normalize_words(text)
    if _NOTHING.fullmatch(words):
        return "\\emptyset"
    return "\\mathbb{R}" if _EVERYTHING.fullmatch(words) else text


def _read_option(text: str) -> str | None:
    """Return the letter of a multiple-choice answer, None if there is none or more than one."""
    plain = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|[{}*]", r"\1", text).strip()
    match = _OPTION.fullmatch(plain)
    if not match or not match.group(1).isupper():
        return None
    rest = match.group(2) or ""
    others = re.match(r"\W*(?:(?:or|and)\b|\(?[A-J]\b)", rest)
    return None if others else match.group(1)


def _parse_readings(text: str) -> list[Node]:
    trees = []
    for reading in read_separators(text):
        try:
            trees.append(parse_answer(reading))
        except (ParseError, RecursionError):
            continue
    return trees


def read_separators(text: str) -> list[str]:
    """Return ``text`` in each reading of its commas: thousands, list or decimal."""
    readings = [text]
    for pattern, separator in ((_THOUSANDS, ","), (_SPACED_THOUSANDS, " ")):
        joined = pattern.sub(lambda m, s=separator: m.group().replace(s, ""), readings[0])
        if joined != readings[0]:
            readings.insert(0, joined)
    if len(readings) > 1 and re.search(r",0\d\d", text):  # 10,000 is no list of 10 and 000
        readings.pop()
    if _EUROPEAN.fullmatch(text):
        readings.append(text.replace(".", "").replace(",", "."))
    elif _DECIMAL_COMMA.fullmatch(text):
        readings.append(text.replace(",", "."))
    return readings
