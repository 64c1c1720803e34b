"""Find the final answer in a completion: one extractor for every grader and every dataset."""

import re

from rewards.completions import split_thinking

# Only so much of a completion is searched, counted from its end, where final answers stand.
MAX_CHARS = 200_000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_ANSWER_IS = re.compile(
    r"(?:answer|result|solution)\b[\s*_:]*(?:is|are|=|:|：)[\s*_]*(?::|：)?\s*"
    r"|答案\s*(?:是|为|：|:)+\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.。!！?？](?=\s|$|\*|<)|\n|。|<\|")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")


def extract_answer(completion: str) -> str | None:
    """Return the final answer that a completion states, or None if it states none.

    Thinking (see ``split_thinking``) is never searched. In this order, the first that is there:

    1. the last balanced ``\\boxed{...}`` (or ``\\fbox{...}``);
    2. the last ``<answer>...</answer>``;
    3. what follows the last "the answer is", "Answer:", "答案是", to the end of its sentence;
    4. the last number.
    """
    _, text = split_thinking(completion)
    text = text[-MAX_CHARS:]
    boxes = find_boxes(text)
    if boxes:
        return boxes[-1].strip() or None
    tagged = _ANSWER_TAG.findall(text)
    if tagged:
        return tagged[-1].strip() or None
    stated = list(_ANSWER_IS.finditer(text))
    if stated:
        rest = text[stated[-1].end() :]
        end = _SENTENCE_END.search(rest)
        answer = (rest[: end.start()] if end else rest).strip(" \t*_")
        if answer:
            return answer
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def find_boxes(text: str) -> list[str]:
    """Return the contents of every balanced ``\\boxed{...}``, in order; nested ones once, outer."""
    contents, position = [], 0
    while match := _BOX.search(text, position):
        end = find_closing_brace(text, match.end())
        if end is None:
            position = match.end()
            continue
        contents.append(text[match.end() + 1 : end])
        position = end + 1
    return contents


def find_closing_brace(text: str, start: int, max_chars: int = 4000) -> int | None:
    """Return the index of the brace closing the one at ``start``, None if unbalanced or too far."""
    depth, escaped = 0, False
    for index in range(start, min(len(text), start + max_chars)):
        char = text[index]
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return index
    return None
