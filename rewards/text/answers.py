"""Find the final answer in a completion: one extractor for every grader and every dataset."""

import re
from typing import NamedTuple

from rewards.text.completions import split_thinking, strip_special_tokens

# Final answers stand at the end: only so many characters and boxes are searched.
MAX_CHARS = 100_000
MAX_BOXES = 32
MAX_BOX_CHARS = 4_000

# A box, up to what it holds. TeX needs braces; models forget them, or the backslash.
_BOX = re.compile(
    r"\\(?:(?:[bB]oxed|fbox|framebox)\s*(?:\[[^\[\]{}]{0,40}\]\s*){0,2}(?=\{)"
    r"|boxed\s*(?=[(\[]|[-−]?\d|\\[dt]?frac\b|[A-J](?:[\s.,;$]*(?:$|\n))))"
)
_BARE_BOX = re.compile(r"(?<![\\a-zA-Z])boxed(?=\{)")
_UNBRACED = re.compile(
    r"[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?![-+*/^=\w])|\\[dt]?frac\s*(?:\{[^{}]*\}\s*\{[^{}]*\}|\d\d)|[A-J]"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BRACKET = re.compile(r"\\.|[()\[\]]", re.DOTALL)
# Escapes that were read once too often: JSON's and Python's \b, \f, \a and \v.
_READ_ESCAPE = re.compile("[\x07\x08\x0b\x0c](?=[a-z])")
_ESCAPES = {"\x07": "\\a", "\x08": "\\b", "\x0b": "\\v", "\x0c": "\\f"}
# The content of a box that a problem leaves to be filled in.
_BLANK = re.compile(
    r"\\(?:[hv]?phantom|[hv]space\*?)\s*\{[^{}]*\}|\\rule\s*\{[^{}]*\}\s*\{[^{}]*\}"
    r"|\\(?:underline|text|mathrm|mbox)(?=\s*\{)"
    r"|\\(?:q?quad|enspace|thinspace|[lc]?dots|square|Box|bigcirc|[,;:! _])|[\s{}~?_.…□＿]"
)
_FINAL = re.compile(r"final\s+answer", re.IGNORECASE)
_ANSWER_TAG = re.compile(
    r"<(?:final_)?answer>((?:(?!</?(?:final_)?answer>).)*)(?:</(?:final_)?answer>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_JOINING_WORDS = {"and", "or", "for", "part", "case", "the", "with", "und", "et", "respectively"}
_ARROW = re.compile(r"^(?:(?:\\(?:Rightarrow|Longrightarrow|implies|to)(?![a-zA-Z])|[⇒→])\s*)+")
# A reason after the answer in the box.
_REASON = re.compile(r"[\s,;~]*(?:\\(?:text|mathrm)\s*\{)?[\s(]*\b(?:since|because)\b.*", re.DOTALL)

# A minus sign that belongs to the box after it: nothing is subtracted from, no bullet.
_SIGN = re.compile(
    r"(?:(?:^|[=($\[{,:&<>≈→⇒：]|\\[(\[]|\\(?:approx|implies|Rightarrow|to|quad|,))\s*"
    r"(?P<sign>-|−|\\pm|±)(?:\\(?:displaystyle|mathbf|left|,)|[{\s])*"
    r"|(?:^|\n|[^\W\d_]{2,}\s+|[是为得]\s*)(?P<touching>-|−|\\pm|±)(?:\\mathbf|\{)*)$"
)
_BULLET = re.compile(r"(?:^|\n)\s*[-−]\s+$")
# A box within the braces of a fraction, a root or an exponent.
_ENCLOSED = re.compile(
    r"(?:\\[dtc]?frac\s*(?:\{[^{}]*\}\s*)?|\\sqrt\s*(?:\[[^\[\]]*\]\s*)?|\^)\{[^{}$=\n]*$"
)
_SIDE_START = re.compile(
    r"[=$\n&:：,，;；<>≈→⇒]|\\[(\[](?!\w)|\\(?:approx|implies|Rightarrow|to|text)(?![a-z])"
    r"|(?<![\\a-zA-Z])[^\W\d_]{2,}"
)
_SIDE_END = re.compile(r"[=$\n&，。；;]|\\[)\]]|[.,:](?:\s|$)|(?<![\\a-zA-Z])[^\W\d_]{2,}|\\text\b")
# 2\boxed{17} and \boxed{17}x do not say 17.
_FACTOR_BEFORE = re.compile(r"(?<![\w.^{])\d+$")
_FACTOR_AFTER = re.compile(r"[nxyzij](?![a-zA-Z])")
_SCALE = re.compile(
    r"\s?(?:\\?%|\\times\s*10\s*\^\s*(?:\{[^{}]*\}|\d)|\\pi\b|π|\\sqrt\s*\{[^{}]*\}"
    r"|\^\s?(?:\{[^{}]*\}|\\circ\b|\d)|/\d+)(?!\s*[=\d])"
)

_CLOSING_MARKS = "\\])$. \n"
_NOTABLE = ("-", "not", "n't", "n’t", "never", "\\ne", "\\pm", *"−±≠不非")
_DENIED = re.compile(
    r"(?:(?:\bnot|n['’]t|\bnever|\bcannot)(?:\s+(?:be|equal|to|exactly|the))*[\s:*(]*"
    r"(?:\$+|\\[(\[])?\s*(?:[A-Za-z]\s*=\s*)?|(?:≠|\\neq?)\s*|(?:不是|不等于|不为|并非)[\s$]*)$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s)*$]{0,4}\b(?:is|was)(?:n['’]t\b|\s+(?:\w+ly\s+)?(?:not|wrong|incorrect|false|impossible)\b)"
    r"|[\s)*$]{0,4}(?:can(?:not|['’]t| not)\s+be\b|fails\b|不对|不正确|是错)"
)


_LETTER_BEFORE = re.compile(r"(?:^|[\s*(])([A-J])[).:]$")
_ANY_LETTER = re.compile(r"[A-J](?<!\w.)(?![\w'’])")
_LETTER = re.compile(r"\(?\b([A-J])\b\)?")


class Extraction(NamedTuple):
    """What a completion answers.

    answer: the final answer.
    others: further boxed answers that are not the same text; a right completion has none that
        is wrong.
    parts: the boxes that ``answer`` joins, if it joins several: each may be all of the answer.
    together: all boxes in their order, joined: the parts of one answer, if they are the gold.
    option: the letter that is stated beside a box that holds the option's value.
    """

    answer: str
    others: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    together: str = ""
    option: str = ""


def extract_answer(completion: str) -> str | None:
    r"""Return the final answer that a completion states, or None if it states none.

    Thinking (``rewards.text.completions.split_thinking``) is never searched. In this order, the
    first that is there:

    1. the last balanced ``\boxed{...}`` or ``\fbox{...}`` that is not left blank; boxes side by
       side, with only a few words between them, are one answer of several parts, joined by commas.
       Once the text says "final answer", only boxes after that count, if there are any. A minus
       sign before the box counts, and so does a fraction or root around it;
    2. the last ``<answer>...</answer>``; the end of the text closes it too, because samplers
       leave out the stop string;
    3. what follows the last "the answer is", "Answer:", "答案是", "故选", "####" and the like, to
       the end of its sentence, or what stands before "is the answer";
    4. an option letter that opens the text ("D. It cannot be A") or is called right, or the whole
       text if it is one line of mathematics without prose ("x = 3");
    5. the last formula (``$...$``, ``\(...\)``, ``\[...\]``) that holds more than a name, or the
       last number with its unit, whichever comes later, questions left out. One that is part of
       an unfinished formula is no answer.

    What qualifies an answer without a box is part of it, and what is denied is none: "at least 5",
    "4 or 5", "not 5" (for "it cannot be 5", "5 is wrong", "different from 5").
    """
    found = find_answer(completion)
    return found.answer if found else None


def find_answer(completion: str) -> Extraction | None:
    """Return the answer and what contradicts it, in the order that ``extract_answer`` states."""
    _, text = split_thinking(completion)
    text = strip_special_tokens(text[-MAX_CHARS:])
    if "\x08" in text or "\x0c" in text:
        text = _READ_ESCAPE.sub(lambda m: _ESCAPES[m.group()], text)
    if boxes := find_boxes(text):
        return _read_boxes(text, boxes)
    if tagged := [content.strip() for content in _ANSWER_TAG.findall(text)]:
        if not tagged[-1]:
            return None
        others = dict.fromkeys(t for t in tagged if t != tagged[-1])
        return Extraction(_read_tag(tagged[-1]), tuple(map(_read_tag, others))[:MAX_BOXES])
    answer = _find_statement(text)
    return Extraction(answer) if answer else None


def _find_statement(text: str) -> str | None:
    from rewards.text.statements import find_statement

    return find_statement(text)


def _read_tag(content: str) -> str:
    """Reduce a sentence in an answer tag to what it states."""
    is_sentence = len(re.findall(r"(?<!\\)\b[a-z]{2,}\b", content)) > 2 and "\n" not in content
    return (_find_statement(content) if is_sentence else None) or content


# --- boxes ---------------------------------------------------------------------------------------


class Box(NamedTuple):
    start: int  # of the command
    end: int  # after the closing brace
    content: str


def find_boxes(text: str) -> list[Box]:
    """Return the last boxes that balance and are not blank, in order; of nested boxes the outer."""
    boxes: list[Box] = []
    matches = list(_BOX.finditer(text))
    if text.count("boxed{") > len(matches):
        matches = sorted([*matches, *_BARE_BOX.finditer(text)], key=lambda m: m.start())
    for match in matches[-MAX_BOXES:]:
        if boxes and match.start() < boxes[-1].end:
            continue
        end, content = _read_content(text, match.end())
        if content[:1].isalnum() or _BLANK.sub("", content):
            boxes.append(Box(match.start(), end, content))
    return boxes


def _read_content(text: str, start: int) -> tuple[int, str]:
    """Return where a box ends that holds what begins at ``start``, and its content."""
    opener = text[start : start + 1]
    if opener == "{":
        end = find_closing_brace(text, start)
        return (end + 1, text[start + 1 : end].strip()) if end is not None else (start, "")
    if opener in ("(", "["):
        end = _find_closing(text, start, _BRACKET, "([")
        return (end + 1, text[start : end + 1]) if end is not None else (start, "")
    match = _UNBRACED.match(text, start)
    return (match.end(), match.group()) if match else (start, "")


def find_closing_brace(text: str, start: int) -> int | None:
    """Return the index of the brace that closes the one at ``start``, None if there is none."""
    end = text.find("}", start, start + MAX_BOX_CHARS)
    if end > 0 and "{" not in (content := text[start + 1 : end]) and "\\" not in content:
        return end
    return _find_closing(text, start, _BRACE, "{")


def _find_closing(text: str, start: int, marks: re.Pattern[str], openers: str) -> int | None:
    depth = 0
    for match in marks.finditer(text, start, start + MAX_BOX_CHARS):
        mark = match.group()
        if len(mark) == 1:
            depth += 1 if mark in openers else -1
            if depth == 0:
                return match.start()
    return None


def _read_boxes(text: str, boxes: list[Box]) -> Extraction:
    if len(boxes) == 1:
        content = _read_box(text, boxes[0])
        return Extraction(content, option=_find_option(text, boxes[0]))
    contents = [_read_box(text, box) for box in boxes]
    boxes = [box._replace(content=c) for box, c in zip(boxes, contents, strict=True)]
    if len(set(contents)) > 1 and (declared := [m.end() for m in _FINAL.finditer(text)]):
        boxes = [box for box in boxes if box.start > declared[-1]] or boxes
    contents = list(dict.fromkeys(box.content for box in boxes))
    if len(contents) == 1:
        return Extraction(contents[0], option=_find_option(text, boxes[-1]))
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _are_joined(text[box.end : group[0].start]):
            break
        group.insert(0, box)
    parts = tuple(dict.fromkeys(box.content for box in group))
    others = tuple(c for c in contents if c not in parts)
    together = ", ".join(contents) if others else ""
    return Extraction(", ".join(parts), others, parts if len(parts) > 1 else (), together)


def _find_option(text: str, box: Box) -> str:
    """Return the letter that is stated before a box with a value, or after it; or nothing."""
    before = text[max(0, box.start - 12) : box.start].rstrip("\\([$ ")
    if before.endswith((".", ":", ")")) and (letter := _LETTER_BEFORE.search(before)):
        return letter[1]
    after = text[box.end : box.end + 300]
    if not (after.strip(_CLOSING_MARKS) and _ANY_LETTER.search(after)):
        return ""
    if _LETTER.fullmatch(box.content):
        return ""
    stated = _find_statement(after) or ""
    letter = _LETTER.match(stated)
    return (
        letter[1] if letter and not re.search(r"\b(?:or|and)\b|,", stated[letter.end() :]) else ""
    )


def _are_joined(between: str) -> bool:
    """Say whether what stands between two boxes makes them parts of one answer."""
    if len(between) > 60 or re.search(r"[.!?]\s|\n\s*\n", between):
        return False
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", between))
    return all(word.lower() in _JOINING_WORDS for word in words)


def _read_box(text: str, box: Box) -> str:
    """Return what a box says where it stands: its content, with the sign before it, or "not"."""
    before, after = text[max(0, box.start - 120) : box.start], text[box.end : box.end + 120]
    content = box.content
    if content[0] in "\\⇒→":
        content = _ARROW.sub("", content) or content
    if "since" in content or "because" in content:
        content = _REASON.sub("", content) or content
    if before.rfind("{") > before.rfind("}") and _ENCLOSED.search(before):
        return _read_side(before, content, after) or content
    near = before[-40:]
    lower = near.lower()
    is_notable = any(mark in lower for mark in _NOTABLE)
    if is_notable and (sign := _SIGN.search(near)) and not _BULLET.search(near):
        return (sign["sign"] or sign["touching"]) + content
    is_last = not after.strip(_CLOSING_MARKS)
    if not is_last and (scale := _SCALE.match(after) or _FACTOR_AFTER.match(after)):
        content += scale.group()
    if near[-1:].isdigit() and (factor := _FACTOR_BEFORE.search(near)):
        content = rf"{factor.group()}\cdot {content}"
    is_denied = is_notable and _DENIED.search(near)
    is_denied = is_denied or (not is_last and _DENIED_AFTER.match(after))
    return f"not {content}" if is_denied else content


def _read_side(before: str, content: str, after: str) -> str | None:
    """Return the side of an equation that a box is part of; None if its braces do not balance."""
    start = max((m.end() for m in _SIDE_START.finditer(before)), default=0)
    end = _SIDE_END.search(after)
    side = before[start:] + "{" + content + "}" + after[: end.start() if end else None]
    return side.strip() if side.count("{") == side.count("}") else None
