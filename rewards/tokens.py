"""Split an answer into tokens, and drop the prose around its mathematics."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from rewards import vocabulary as voc

MAX_TOKENS = 6_000
MAX_TEXT_DEPTH = 5  # of \\text macros in each other

_TOKEN = re.compile(
    r"(?P<number>\d+\.(?=\\(?:overline|dot|bar)\b)"
    r"|(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?)"
    r"|(?P<command>\\[a-zA-Z]+|\\.)"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<cjk>[^\W\d_a-zA-Z]+)"
    r"|(?P<mark>\*\*|<=|>=|!=|==|=<|=>|->|.)",
    re.DOTALL,
)


_ARTICLES = {"a", "A", "I"}


class ParseError(ValueError):
    """The text is not an answer this grammar knows."""


class Token(NamedTuple):
    kind: str  # number, word, text, command, separator, mark, end
    text: str
    space: bool  # white space stands before it


def read_tokens(
    text: str, in_text: bool = False, depth: int = 0, previous: Token | None = None
) -> list[Token]:
    """Split ``text`` into tokens; ``\\text{...}`` is read into, with its words marked as text."""
    if depth > MAX_TEXT_DEPTH:
        raise ParseError("text macros nested too deeply")
    tokens, position, space = [], 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        kind, part = match.lastgroup, match.group()
        position = match.end()
        if part.isspace() or (part == "." and tokens and tokens[-1].kind == "text"):
            space = True
            continue
        if kind == "command" and part[1:] in voc.TEXT_MACROS:
            inner, position = _read_group(text, position)
            if tokens and tokens[-1].text in ("^", "_"):
                inner = "{" + inner + "}"
            is_text = part[1:] not in voc.MATH_FONTS
            before = tokens[-1] if tokens else previous
            tokens += read_tokens(" " + inner, is_text, depth + 1, before)
        elif kind in ("word", "cjk"):
            before = tokens[-1] if tokens else previous
            words = _read_word(part, space, in_text or kind == "cjk", before)
            if not in_text and text.startswith("(", position) and _is_text(words):
                raise ParseError(f"call of an unknown function {part[:20]}")
            tokens += words
        else:
            tokens.append(Token("mark" if kind == "mark" else kind, part, space))
        space = False
        if len(tokens) > MAX_TOKENS:
            raise ParseError("too many tokens")
    return tokens


def _read_group(text: str, position: int) -> tuple[str, int]:
    """Return the braced group (or the single character) after ``position``, and where it ends."""
    while position < len(text) and text[position] == " ":
        position += 1
    if position >= len(text) or text[position] != "{":
        return text[position : position + 1], position + 1
    depth = 0
    for index in range(position, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[position + 1 : index], index + 1
    raise ParseError("unbalanced brace")


def _read_word(word: str, space: bool, in_text: bool, before: Token | None) -> list[Token]:
    """Decide what a run of letters is: a connective, a name, a function, letters, or prose."""
    lower = word.lower()
    if lower in voc.CONNECTIVES:
        return [Token("separator", voc.CONNECTIVES[lower], space)]
    if lower in voc.OPERATOR_WORDS:
        return [Token("command", voc.OPERATOR_WORDS[lower], space)]
    after_number = before is not None and before.kind == "number"
    after_quantity = after_number or (before is not None and before.text in ("}", ")"))
    if after_number and lower in voc.ORDINAL_ENDINGS and not space:
        return []
    if len(word) > 1 and lower in voc.UNITS and (in_text or after_number):
        return [Token("text", word, space)]
    if word == "in" and not in_text:
        return [Token("text" if after_number else "command", "\\in", space)]
    if word in voc.FUNCTIONS or word in voc.CONSTANT_WORDS:
        return [Token("command", "\\" + word, space)]
    if len(word) == 1 and not (in_text and after_quantity):
        return [Token("word", word, space)]
    if in_text or lower in voc.UNITS or _is_short_word(word):
        return [Token("text", word, space)]
    if word.endswith("pi") and len(word) <= 4:
        letters = [Token("word", c, False) for c in word[:-2]]
        return [*letters, Token("command", "\\pi", False)]
    if len(word) <= 3 or (word.isupper() and len(word) <= 6):
        first, *rest = word
        return [Token("word", first, space), *(Token("word", c, False) for c in rest)]
    return [Token("text", word, space)]


def _is_short_word(word: str) -> bool:
    return word.lower() in voc.SHORT_WORDS and not word.isupper()  # NO is a segment


def tidy_tokens(tokens: list[Token]) -> list[Token]:
    """Drop the prose around mathematics, where dropping it cannot change what is said.

    In each part between separators, leading and trailing words go ("the answer 5", "5 apples");
    so do quantified tails ("for all integers n"). Words that change meaning ("not", "at least",
    "if") are never dropped: they stay, and make the text unparseable as mathematics.
    """
    out: list[Token] = []
    parts = list(_split_parts(tokens))
    for index, (part, separator) in enumerate(parts):
        part = _drop_tail(_drop_remarks(part))
        if index and _declares_domain(part):
            continue
        if len(parts) > 1 and part and all(_is_droppable(token) for token in part):
            out += part  # a word among numbers is one of the answers: not to be dropped
            part = []
        start, end = 0, len(part)
        while start < end and _is_droppable(part[start]):
            start += 1
        while end > start and _is_droppable(part[end - 1]) and not _is_unit(part[end - 1]):
            end -= 1
        if start and end > start and part[start].text == "=":  # Maximum = 2: a name in words
            start -= 1
            part[start] = Token("word", part[start].text, True)
        elif start and end > start and part[start].text == ":":
            start += 1
        part = part[start:end]
        out += part
        if separator:
            out.append(separator)
    while out and out[-1].kind == "separator":
        out.pop()
    if len(out) == 1 < len(tokens) and out[0].text in _ARTICLES:
        raise ParseError("an article before words, not a variable")
    return out


def _split_parts(tokens: list[Token]) -> Iterator[tuple[list[Token], Token | None]]:
    part, depth = [], 0
    for token in tokens:
        depth += (token.text in "([{") - (token.text in ")]}") if len(token.text) == 1 else 0
        if token.kind == "separator" or (depth <= 0 and token.text in (",", ";")):
            yield part, token
            part = []
        else:
            part.append(token)
    yield part, None


def _drop_remarks(part: list[Token]) -> list[Token]:
    """Drop ``(in square centimetres)``, ``(k \\in Z)`` from the end: remarks in brackets."""
    while part and part[-1].text == ")":
        start = max((i for i, t in enumerate(part) if t.text == "("), default=-1)
        words = part[start + 1 : -1]
        is_prose = bool(words) and all(token.kind == "text" for token in words)
        if start < 1 or not (is_prose or _declares_domain(words)):
            break
        part = part[:start]
    return part


def _declares_domain(part: list[Token]) -> bool:
    """Say whether a part only says what a letter stands for: ``k \\in \\mathbb{Z}``."""
    texts = [token.text for token in part]
    if texts and part[0].kind == "text" and texts[0].lower() in voc.TAIL_WORDS:
        return True
    if len(texts) > 2 and texts[1] == "\\in" and part[0].kind == "word":
        domain = [text for text in texts[2:] if text not in ("\\mathbb", "{", "}", "^", "+", "*")]
        return len(domain) == 1 and domain[0] in ("Z", "N", "Q", "R", "C")
    return any(t.kind == "text" and t.text.lower() in ("integer", "integers") for t in part)


def _drop_tail(part: list[Token]) -> list[Token]:
    for index, token in enumerate(part):
        if token.kind == "text" and token.text.lower() in voc.TAIL_WORDS and index:
            return part[:index]
        if token.text == "\\forall" and index:
            return part[:index]
    return part


def _is_droppable(token: Token) -> bool:
    return token.kind == "text" and token.text.lower() not in voc.MEANINGFUL_WORDS


def _is_text(tokens: list[Token]) -> bool:
    return bool(tokens) and tokens[-1].kind == "text"


def _is_unit(token: Token) -> bool:
    return token.kind == "text" and token.text.lower() in voc.UNITS
