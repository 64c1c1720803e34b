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
    if need be: 5 cm is not 5 m, 1 m is 100 cm, 1 hour 20 minutes is 80 minutes (``units.py``).
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
    A list of n values equals a tuple if in the same order. Named values are matched by name:
    3 boys and 5 girls is not 5 boys and 3 girls. Labelled parts, (a) 3 (b) 5, are in order.
Equations: ``x = 5``, ``f(x) = 5``, ``|AB| = 5`` say 5; ``a^2 + b = 0`` does not say 0. Whole
    equations are equal up to a factor. Inequalities, intervals and set-builders are sets of reals.
Multiple choice: C, (C), \\text{C}, "C." and "C) 12" are C. More than one letter is not.
Text is compared by its words, without case, articles and punctuation.
"""

import re
from functools import partial
from itertools import product

from rewards.math.compare import has_value, same_answer
from rewards.math.evaluate import Undefined
from rewards.math.lexer import ParseError
from rewards.math.node import Node
from rewards.math.normalize import normalize_text, normalize_words, spell, strip_dress
from rewards.math.parser import parse_answer
from rewards.math.vocabulary import CJK_DIRECTIONS, DIRECTIONS, FILLERS
from rewards.text.units import find_unit

RIGHT, WRONG, UNPARSEABLE, BAD_GOLD = "right", "wrong", "unparseable", "bad_gold"
UNREAD_GOLD = "unread_gold"  # a bad gold that is perhaps mathematics which this grammar lacks

# Longer texts are compared only as texts.
MAX_CHARS = 20_000

_THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?![\d,]| \d)")
_DECIMAL_COMMA = re.compile(r"-?(?:0,\d+|\d+,(?:\d{2}|\d{4,}))")
_EUROPEAN = re.compile(r"-?\d{1,3}(?:\.\d{3})+,\d+")
_SPACED_LIST = re.compile(r"^[\[({]?\s*-?\d+(?:\.\d+)?(?: -?\d+(?:\.\d+)?)+\s*(?:[\])}]|$)")
_RESTATED = re.compile(
    r"(.*[\w})%])\s+\(\s*(?:or\s+|=\s*|i\.e\.,?\s*|about\s+|\\approx\s*)?([^()]*\d[^()]*)\)"
)
_MIXED_AND = re.compile(
    r"(-?\d+)\s*(?:\band\b|&|\\text\s*\{\s*and\s*\})\s*(\d+\s*/\s*\d+|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})"
)
_OPTION = re.compile(
    r"\W*(?:(?:option|choice|answer)\W+)?\(?([A-J])(?:\)|[.:,])?(?:$|(?<=[).:,])\s*(.*)$)",
    re.DOTALL | re.IGNORECASE,
)
_LETTER = re.compile(r"\s*<?\(?([a-jA-J])\)?>?\s*")
_NAMED_LETTER = re.compile(r"\s*(?:option|choice|answer)\W+\(?([a-j])\)?\W*", re.IGNORECASE)
# (a), (1), a), (ii): the label of a part, where the parts begin with the first of its kind.
_LABEL = re.compile(
    r"(?:^|(?<=[\s;,.:、)}\d]))(?:part\s*|第)?(?:\(\s*([a-h]|[1-9]|[ivIV]{1,4})\s*\)|([a-h]|[1-9])\))\s*[:.]?"
)
_LABEL_ORDERS = (
    "abcdefgh",
    "123456789",
    ("i", "ii", "iii", "iv", "v"),
    ("I", "II", "III", "IV", "V"),
)
_NUMERAL = re.compile(r"\{?\(?(?:\\text\s*\{)?([0-9A-Fa-f]+)\}?\)?\}?(?:_\{?(\d+)\}?)?")
_CHEMICAL = re.compile(r"\d*(?:[A-Z][a-z]?\d*|\(|\)\d*)+(?:\d?[+-])?")
_NOTHING = re.compile(
    r"(?:there (?:are )?)?no (?:real |such )?(?:solutions?|roots?)(?: exists?)?|none|empty set"
)
_EVERYTHING = re.compile(
    r"(?:[a-z] (?:can be |may be |= )?)?(?:all |every |set of |any )*(?:real numbers?|reals)"
)
_NONEXISTENT = re.compile(
    r"(?:(?:it|limit) )?(?:dne|does ?n[o']?t exist|doesn t exist|undefined|not defined)"
)
_MATHEMATICAL = re.compile(r"[\\^_<>=]")
_GLUED_AREA = re.compile(r"(?<=\d)[ckd]?m\^\{?[23]\}?$")  # 8m^3: a unit beside another unit
_CONSTANT = re.compile(r"(?<![a-zA-Z\\])c_(?=\{?\d)")
_CJK_AMOUNT = re.compile(
    r"\s*[有共约是为和与及]?([^\W\da-z_]{1,8}?)[有是为:]?\s*(-?\d[\d./]*)\s*[^\W\da-z_]{0,4}",
    re.IGNORECASE,
)
_LEAD = re.compile(r"(?:[a-z]{3,}\s+)*(?=\d)|")
_CJK_DIRECTION = re.compile("|".join(sorted(CJK_DIRECTIONS, key=len, reverse=True)))
_CONNECTIVES = {"or", "then", "versus"}
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
    if "C_" in gold and "C_" not in answer and not _CONSTANT.search(gold):
        answer = _CONSTANT.sub("C_", answer)  # the constants of a general solution
    if spell(answer) == spell(gold):
        return RIGHT
    if max(len(answer), len(gold)) > MAX_CHARS:
        return UNPARSEABLE if len(gold) <= MAX_CHARS else BAD_GOLD
    if (verdict := _judge_options(answer, gold)) is not None:
        return verdict
    if _LABEL.search(gold) or _LABEL.search(answer):
        parts = _split_labelled(answer), _split_labelled(gold)
        if any(parts):
            return _judge_labelled(answer, gold, *parts)
    if (verdict := _judge_numerals(answer, gold)) is not None:
        return verdict
    golds, answers = _parse_readings(gold), _parse_readings(answer)
    if not golds:
        return _judge_prose(answer, gold)
    if not answers:
        return RIGHT if _same_words(answer, gold) else UNPARSEABLE
    if any(tree.kind == "unit" for tree in golds):
        answers = _parse_readings(_GLUED_AREA.sub(r"\\text{ \g<0>}", answer)) + answers
    elif any(tree.kind == "unit" for tree in answers):
        golds = _parse_readings(_GLUED_AREA.sub(r"\\text{ \g<0>}", gold)) + golds
    if _contradict(answer, gold) or _swaps_amounts(answer, gold):
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
    formulas = [re.sub(r"[_^{}\s]|\\(?:text|math)[a-z]*|\\ce", "", text) for text in (answer, gold)]
    if _CHEMICAL.fullmatch(formulas[1]) and re.search(r"\\|_", gold):
        return RIGHT if formulas[0] == formulas[1] else WRONG
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
    leads = [set(next(_LEAD.finditer(text)).group().split()) - FILLERS for text in texts]
    if all(leads) and not leads[0] & leads[1]:
        return True
    ours, theirs = (_directions(text) for text in texts)
    return bool(ours) and bool(theirs) and ours != theirs


def _directions(text: str) -> set[str]:
    """What the words of direction in a text say: increase, loss, north."""
    said = {DIRECTIONS[word] for word in re.findall(r"[a-z]+", text) if word in DIRECTIONS}
    if not text.isascii():
        said |= {CJK_DIRECTIONS[word] for word in _CJK_DIRECTION.findall(text)}
    return said


def _read_phrase(text: str) -> str:
    """Write "no real solutions" and "all real numbers" as the sets that they are."""
    words = normalize_words(text)
    if _NOTHING.fullmatch(words):
        return "\\emptyset"
    if _NONEXISTENT.fullmatch(words) and not words.endswith("defined"):
        return "\\text{does not exist}"
    return "\\mathbb{R}" if _EVERYTHING.fullmatch(words) else text


def _judge_options(answer: str, gold: str) -> str | None:
    """Judge by option letters, where the gold has one; None if values or words must decide."""
    letter = _read_option(gold)
    if letter is None:
        match = _LETTER.fullmatch(gold)  # (b) is (B); b alone may be a variable
        if not match or not gold.strip().startswith(("(", "<")):
            return None
        letter = match.group(1).upper()
    given = _read_option(answer)
    if given is None:
        match = _LETTER.fullmatch(_plain(answer)) or _NAMED_LETTER.fullmatch(_plain(answer))
        given = match.group(1).upper() if match else None
    if given == letter:
        return RIGHT
    stated = _OPTION.fullmatch(_open_fonts(gold))
    rest = stated.group(2) if stated else None
    if not stated or not rest:
        return None
    if stated.string[stated.end(1) : stated.start(2)].strip().startswith(","):
        return None
    # C. 12: another letter is wrong; an answer without one may still be what stands beside it.
    return WRONG if given else RIGHT if judge_answer(answer, rest) == RIGHT else WRONG


def _split_labelled(text: str) -> list[str]:
    """The parts of ``(a) 3, (b) 5``; empty if the text is not labelled so from its start."""
    labels = list(_LABEL.finditer(text))[:9]
    names = [match.group(1) or match.group(2) for match in labels]
    if len(names) < 2 or text[: labels[0].start()].strip():
        return []
    if not any(names == list(order[: len(names)]) for order in _LABEL_ORDERS):
        return []
    ends = [match.start() for match in labels[1:]] + [len(text)]
    parts = [text[m.end() : end].strip(" ,;.、") for m, end in zip(labels, ends, strict=True)]
    parts = [re.sub(r"(?:[,;]?\s*\b(?:and|part)\b|[和与])\s*$", "", part) for part in parts]
    return parts if all(parts) else []


def _judge_labelled(answer: str, gold: str, answers: list[str], golds: list[str]) -> str:
    """Labelled parts are compared one by one, in the order of their labels."""
    answers, golds = (
        mine or _split_list(text, len(others))
        for mine, text, others in ((answers, answer, golds), (golds, gold, answers))
    )
    if len(answers) != len(golds):
        return WRONG
    verdicts = [judge_answer(a, g) for a, g in zip(answers, golds, strict=True)]
    return next((v for v in (UNREAD_GOLD, BAD_GOLD) if v in verdicts), None) or (
        RIGHT if all(v == RIGHT for v in verdicts) else WRONG
    )


def _split_list(text: str, count: int) -> list[str]:
    """Split an unlabelled answer into ``count`` parts, at semicolons or else at commas."""
    for separator in (r";|\\\\", r",|\band\b|&"):
        parts = [part for part in re.split(separator, text) if part.strip()]
        if len(parts) == count:
            return parts
    return [text]


def _judge_numerals(answer: str, gold: str) -> str | None:
    """Judge numerals with letters for digits, ``2A_{16}``; None if neither has both."""
    match, other = _NUMERAL.fullmatch(gold), _NUMERAL.fullmatch(answer)
    if not match or not other or not (match.group(2) or other.group(2)):
        return None
    if match.group(1).isdigit() and other.group(1).isdigit():
        return None
    digits, bases = (
        [m.group(1).upper() for m in (match, other)],
        [m.group(2) for m in (match, other)],
    )
    if digits[0] == digits[1]:
        return RIGHT if None in bases or int(bases[0]) == int(bases[1]) else WRONG
    if None in bases or max(map(len, digits)) > 60:
        return WRONG
    try:
        values = [int(d, int(base)) for d, base in zip(digits, bases, strict=True)]
    except ValueError:
        return None
    return RIGHT if values[0] == values[1] else WRONG


def _swaps_amounts(answer: str, gold: str) -> bool:
    """Say whether both give amounts of the same named things, and different ones."""
    golds, answers = _name_amounts(gold), _name_amounts(answer)
    if len(golds) < 2 or len(answers) < 2:
        return False
    return any(
        amount and answers.get(name) and answers[name] != amount
        and judge_answer(answers[name], amount) != RIGHT
        for name, amount in golds.items()
    )  # fmt: skip


def _name_amounts(text: str) -> dict[str, str]:
    """What ``3 boys and 5 girls`` says of each: ``{"boy": "3", "girl": "5"}``."""
    amounts: dict[str, str] = {}
    plain = _plain(text)
    if not plain.isascii():
        pairs = [_CJK_AMOUNT.fullmatch(part) for part in re.split(r"[,;，；、]", plain)]
        stated = {pair[1]: pair[2] for pair in pairs if pair}
        if len(stated) == len(pairs):
            return stated
    parts = re.split(
        r"[,;，；、]|\band\b|&|\\\\|[和与及](?=\s*[-\d])|(?<=[^\W\d_a-zA-Z])\s*(?=\d)", plain
    )
    for part in parts[:40]:
        numbers = re.findall(r"-?\d[\d./]*", part)
        if len(numbers) != 1 or re.search(r"[=<>^_\\()]", part):
            continue
        words = re.findall(r"[^\W\d_]{2,}", part.casefold())
        names = [
            w for w in words if w not in FILLERS and not find_unit(w) and w not in _CONNECTIVES
        ]
        if names:
            name = " ".join(word.removesuffix("s") if word.isascii() else word for word in names)
            amounts[name] = "" if name in amounts else numbers[0]
    return amounts


def _open_fonts(text: str) -> str:
    return re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|[{}*]", r"\1", text).strip()


def _read_option(text: str) -> str | None:
    """Return the letter of a multiple-choice answer, None if there is none or more than one."""
    match = _OPTION.fullmatch(_open_fonts(text))
    if not match or not match.group(1).isupper():
        return None
    rest = match.group(2) or ""
    others = re.match(r"\W*(?:(?:or|and)\b|\(?(?:[A-J]|[IVX]+)\b)", rest)
    return None if others else match.group(1)


def _parse_readings(text: str) -> list[Node]:
    trees = []
    for reading in read_separators(text):
        try:
            trees.append(parse_answer(reading, is_stripped=True))
        except (ParseError, RecursionError):
            continue
    return trees


def _drop(separator: str, match: re.Match[str]) -> str:
    return match.group().replace(separator, "")


def read_separators(text: str) -> list[str]:
    """Return ``text`` in each reading of its commas: thousands, list or decimal."""
    readings = [text]
    for pattern, separator in ((_THOUSANDS, ","), (_SPACED_THOUSANDS, " ")):
        joined = pattern.sub(partial(_drop, separator), readings[0])
        if joined != readings[0]:
            readings.insert(0, joined)
    if len(readings) > 1 and re.search(r",0\d\d", text):  # 10,000 is no list of 10 and 000
        readings.pop()
    if _SPACED_LIST.search(text):  # 1 4 9, [1 2]^T
        readings.append(re.sub(r"(?<=\d) (?=-?\d)", ", ", text))
    if match := _RESTATED.fullmatch(text):  # 3/4 (0.75)
        readings.append(f"{match.group(1)} \\text{{ or }} {match.group(2)}")
    if match := _MIXED_AND.fullmatch(text):
        readings.append(f"{match.group(1)} {match.group(2)}")
    if _EUROPEAN.fullmatch(text):
        readings.append(text.replace(".", "").replace(",", "."))
    elif _DECIMAL_COMMA.fullmatch(text):
        readings.append(text.replace(",", "."))
    return readings
