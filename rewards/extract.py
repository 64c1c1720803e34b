"""Find the final answer in a completion: one extractor for every grader and every dataset."""

import re
from typing import NamedTuple

from rewards.completions import split_thinking

# Final answers stand at the end: so much of a completion is searched, and so many boxes.
MAX_CHARS = 100_000
MAX_BOXES = 32
TAIL_CHARS = 6_000  # where a formula or a number may stand for an answer by being the last
MAX_BOX_CHARS = 4_000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>")
_FINAL = re.compile(r"final\s+answer", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)(?:</answer>|\Z)", re.DOTALL)

# "The answer is", "Answer:", and their like in some other languages.
_MARKER = re.compile(
    r"(?:\b(?:answer|result|solution|(?:correct|right|best) (?:option|choice)|r[ée]ponse|respuesta"
    r"|resposta|antwort|risposta|ответ|jibu|đáp án)s?\b\W{0,3}"
    r"(?:\b(?:is|are|est|es|ist|lautet|è|é|ni|là|would be|must be|should be|comes to|equals)\b|:|=)"
    r"|\banswer\b(?=\s*(?:\$|\\\(|\\\[))"
    r"|####"
    r"|(?:答案|结果|答え|答|답|정답|คำตอบ|উত্তর|సమాధానం)\s*(?:是|为|は|은|คือ|：|:|=)"
    r"|الإجابة(?:\s+هي|\s*:))[\s*_:：]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_]{1,2}(?:\s|$))|[。！？]|\n")
_MATH_SPAN = re.compile(
    r"\$\$(?P<a>[^$]{1,2000})\$\$|\$(?P<b>(?:\\\$|[^$]){1,500})\$"
    r"|\\\((?P<c>(?:(?!\\\)).){1,1000})\\\)|\\\[(?P<d>(?:(?!\\\]).){1,2000})\\\]",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"(?<![\w.,])[-−–]?\\?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+|(?::\d+)+)?"
    r"(?:\s?\\?%|\s?(?:π|\\pi\b))?|"
    r"(?<![\w.])[-−–]?\.\d+|\d+(?:\.\d+)?(?:/\d+)?"
)
_QUALIFIER = re.compile(
    r"(?:(?:[-−–]?\$?[\d.,/]*\d%?\s*(?:,|\bor\b|\band\b|\bto\b|/|或)\s*(?:or|and|maybe|perhaps)?\s*)+"
    r"|\b(?:not|never|least|most|than|over|under|either|without|except|n't)\s+(?:be\s+|exactly\s+)?)$"
)
# An inequality, a tuple or an interval that stands in the text without dollars.
_PLAIN_FORMULA = re.compile(
    r"\b[A-Za-z]\s?(?:[<>≤≥≠]=?|!=)\s?[-−]?\d+(?:\.\d+)?(?:/\d+)?"
    r"|(?<![\w)])[\[(]\s*[-−]?[\d.][^()\[\]\n]{0,80},[^()\[\]\n]{1,80}[)\]]"
)
_IN_FORMULA_BEFORE = re.compile(
    r"(?:[{^_\\(\[|!]|\\[a-zA-Z]+\s*|[\w)}\]][^\S\n]?[-+*/^]\s?|__\w*)$"
)
_IN_FORMULA_AFTER = re.compile(r"\s?[\^!}|)\]\\('\"]|\s[-+*/]\s|\s(?:if|else|for)\s\S*\(")
_BOLD = re.compile(r"(?<![\w*])(\*{1,2})([^*\s][^*\n]{0,200})\1(?![\w*])")
_OPTION_FIRST = re.compile(
    r"\s*\(?([A-J])(?:(?:\)|[.:,])(?=\s|$)|\)?\s+is\s+(?:the\s+)?(?:correct|right|true|best|answer)\b)"
)
_REMARK = re.compile(r"(?<=[\w})$])\s+\([^()]*[a-z]{3,}[^()]*\)$")
_PROSE_WORD = re.compile(r"(?<![\\\w])(?!(?:sin|cos|tan|ln|log|exp|sqrt|pi|and|or)\b)[^\W\d_]{2,}")
# Up to "is", with no number on the way but in formulas: "the largest $n$ with $n^2 < 50$ is 7".
_PROSE_LEAD = re.compile(
    r"(?=[A-Za-z$\\(])(?:[^\d$]|\$[^$]{0,200}\$){0,200}?\b(?:is|are|equals|be)\b\s*:?\s*"
)
_HEDGE = re.compile(r"^\s*(?:for sure|surely|clearly|simply|just|therefore|definitely|:)\s*", re.I)
_AFTERTHOUGHT = re.compile(r",\s+(?!and\b|or\b)(?=[a-z]{2})|\s+(?:because|since|as|so)\s")


_CURRENCIES = ("$", "€", "£", "¥", "dollars", "euros", "元", "yuan")
_JOINING_WORDS = {"and", "or", "for", "part", "case", "the", "with", "und", "et", "respectively"}


class Extraction(NamedTuple):
    """What a completion answers.

    answer: the final answer.
    others: further boxed answers that are not the same text; a right completion has none that
        is wrong.
    """

    answer: str
    others: tuple[str, ...] = ()


def extract_answer(completion: str) -> str | None:
    r"""Return the final answer that a completion states, or None if it states none.

    Thinking (``rewards.completions.split_thinking``) is never searched. In this order, the first
    that is there:

    1. the last balanced ``\boxed{...}`` or ``\fbox{...}``; boxes side by side, with only a few
       words between them, are one answer of several parts, joined by commas. Once the text says
       "final answer", only boxes after that count, if there are any;
    2. the last ``<answer>...</answer>``; the end of the text closes it too, because samplers
       leave out the stop string;
    3. what follows the last "the answer is", "Answer:", "答案是", "####" and the like, to the end
       of its sentence;
    4. an option letter that opens the text ("D. It cannot be A"), or the whole text if it is one
       line of mathematics without prose ("x = 3");
    5. the last formula (``$...$``, ``\(...\)``, ``\[...\]``) that holds more than a name, or the
       last number, whichever comes later. A number is taken with what qualifies it ("not 5",
       "4 or 5"), and one that is part of an unfinished formula is no answer.
    """
    found = find_answer(completion)
    return found.answer if found else None


def find_answer(completion: str) -> Extraction | None:
    """Return the answer and what contradicts it, in the order that ``extract_answer`` states."""
    _, text = split_thinking(completion)
    text = _SPECIAL_TOKEN.sub("\n", text[-MAX_CHARS:])
    if boxes := find_boxes(text):
        return _read_boxes(text, boxes)
    if tagged := [content.strip() for content in _ANSWER_TAG.findall(text)]:
        others = dict.fromkeys(t for t in tagged if t != tagged[-1])
        return Extraction(tagged[-1], tuple(others)[:MAX_BOXES]) if tagged[-1] else None
    answer = _find_stated(text) or _find_option(text) or _find_bare(text) or _find_last(text)
    return Extraction(answer) if answer else None


# --- boxes ---------------------------------------------------------------------------------------


class Box(NamedTuple):
    start: int  # of the command
    end: int  # after the closing brace
    content: str


def find_boxes(text: str) -> list[Box]:
    """Return the last boxes that balance, in order; of nested boxes the outer one."""
    boxes: list[Box] = []
    for match in list(_BOX.finditer(text))[-MAX_BOXES:]:
        if boxes and match.start() < boxes[-1].end:
            continue
        end = find_closing_brace(text, match.end())
        if end is not None:
            content = text[match.end() + 1 : end].strip()
            boxes.append(Box(match.start(), end + 1, content))
    return [box for box in boxes if box.content]


def find_closing_brace(text: str, start: int) -> int | None:
    """Return the index of the brace that closes the one at ``start``, None if there is none."""
    depth = 0
    for match in _BRACE.finditer(text, start, start + MAX_BOX_CHARS):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _read_boxes(text: str, boxes: list[Box]) -> Extraction:
    declared = [match.end() for match in _FINAL.finditer(text)]
    if declared and any(box.start > declared[-1] for box in boxes):
        boxes = [box for box in boxes if box.start > declared[-1]]
    contents = list(dict.fromkeys(box.content for box in boxes))
    if len(contents) == 1:
        return Extraction(contents[0])
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _are_joined(text[box.end : group[0].start]):
            break
        group.insert(0, box)
    parts = list(dict.fromkeys(box.content for box in group))
    others = [c for c in contents if c not in parts]
    return Extraction(", ".join(parts), tuple(others))


def _are_joined(between: str) -> bool:
    """Say whether what stands between two boxes makes them parts of one answer."""
    if len(between) > 60 or re.search(r"[.!?]\s|\n\s*\n", between):
        return False
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", between))
    return all(word.lower() in _JOINING_WORDS for word in words)


# --- statements ----------------------------------------------------------------------------------


def _find_stated(text: str) -> str | None:
    for marker in reversed(list(_MARKER.finditer(text))[-8:]):
        answer = _clean_statement(_take_sentence(text[marker.end() : marker.end() + 2_000]))
        if answer:
            return answer
    return None


def _take_sentence(rest: str) -> str:
    """Return ``rest`` up to the end of its sentence; ends inside a formula do not count."""
    rest, position = rest.lstrip(), 0
    while end := _SENTENCE_END.search(rest, position):
        inside = next(
            (s for s in _MATH_SPAN.finditer(rest) if s.start() < end.start() < s.end()), 0
        )
        if not inside:
            return rest[: end.start()]
        position = inside.end()
    return rest


def _clean_statement(sentence: str) -> str:
    """Reduce "the largest $n$ is 34" to "34", "for sure D, it can't be A" to "D"."""
    sentence = _HEDGE.sub("", sentence.strip(" \t*_"))
    if cut := _AFTERTHOUGHT.search(sentence):
        sentence = sentence[: cut.start()]
    if re.match(r"(?:the|an?|there)\b|\$[^$]*\$\s+\w+\s+is\b", sentence, re.IGNORECASE):
        while lead := _PROSE_LEAD.match(sentence):
            sentence = sentence[lead.end() :]
    sentence = _REMARK.sub("", sentence.strip(" \t*_"))
    if len(_PROSE_WORD.findall(sentence)) >= 3 and "\\" not in sentence:
        return _find_only_number(sentence) or sentence
    return sentence


def _find_only_number(sentence: str) -> str | None:
    """Return the only number of a sentence, or its only sum of money, if there is one."""
    numbers = list(_NUMBER.finditer(sentence))
    money = [number for number in numbers if _is_money(sentence, number)]
    found = next((few for few in (numbers, money) if len(few) == 1), None)
    return _qualify(sentence, found[0]) if found else None


def _is_money(sentence: str, number: re.Match) -> bool:
    before, after = sentence[: number.start()].rstrip(), sentence[number.end() :].lstrip()
    return before.endswith(_CURRENCIES) or "$" in number.group() or after.startswith(_CURRENCIES)


def _find_option(text: str) -> str | None:
    match = _OPTION_FIRST.match(text)
    return match.group(1) if match and len(text) < 300 else None


def _find_bare(text: str) -> str | None:
    """Return the whole text if it is one short line of mathematics: "x = 3", "B"."""
    text = text.strip()
    is_bare = len(text) <= 200 and "\n" not in text and not _PROSE_WORD.search(text)
    return text or None if is_bare else None


def _find_last(text: str) -> str | None:
    """Return the last formula or the last number, whichever ends later."""
    text = _BOLD.sub(r"\2", text[-TAIL_CHARS:])
    spans = [s for s in _MATH_SPAN.finditer(text) if _formula(s)]
    numbers = list(_NUMBER.finditer(text))
    plain = list(_PLAIN_FORMULA.finditer(text))
    span, number, formula = (found[-1] if found else None for found in (spans, numbers, plain))
    if span and (number is None or number.start() < span.end()):
        return _formula(span)
    if formula and number and number.start() < formula.end():
        return formula.group()
    return _qualify(text, number) if number else None


def _qualify(text: str, number: re.Match) -> str | None:
    """Return a number with the words before it that make it another answer than the number."""
    before, after = text[max(0, number.start() - 200) : number.start()], text[number.end() :]
    if _IN_FORMULA_BEFORE.search(before) or _IN_FORMULA_AFTER.match(after):
        return None
    qualifier = _QUALIFIER.search(before)
    return (qualifier.group() if qualifier else "") + number.group().strip()


def _formula(span: re.Match) -> str | None:
    """Return a formula's content, None if it is only a name such as ``ABC`` or prose."""
    content = next(group for group in span.groups() if group is not None).strip()
    worth = re.search(r"\d|[=<>]|\\(?:frac|sqrt|pi|lt|gt|le|ge|in|begin|infty|cup)", content)
    prose = re.search(r"(?<!\\)\b[a-z]{2,} [a-z]{2,} [a-z]{2,}\b", content)
    return content if worth and not prose else None
