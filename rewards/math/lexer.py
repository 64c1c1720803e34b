"""Split an answer into tokens, and drop the prose around its mathematics."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from rewards.math import vocabulary as voc
from rewards.text.units import BARE_SYMBOLS, LONGEST_CJK, POWER_WORDS, WORDS, find_unit

MAX_TOKENS = 6_000
MAX_TEXT_DEPTH = 5  # of nested \\text macros

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
_MEANINGFUL_CJK = re.compile(voc.MEANINGFUL_CJK, re.IGNORECASE)


class ParseError(ValueError):
    """The text is not an answer this grammar knows."""


class Token(NamedTuple):
    kind: str  # number, word, text, command, separator, mark, end
    text: str
    space: bool  # white space stands before it


def read_tokens(
    text: str, in_text: bool = False, depth: int = 0, context: tuple[Token, ...] = ()
) -> list[Token]:
    """Split ``text`` into tokens; ``\\text{...}`` is read into, with its words marked as text."""
    if depth > MAX_TEXT_DEPTH:
        raise ParseError("text macros nested too deeply")
    tokens: list[Token] = []
    position = environments = 0
    space = False
    while match := _TOKEN.match(text, position):  # always matches at least one character
        kind, part = str(match.lastgroup), match.group()
        position = match.end()
        if part.isspace() or (part == "." and tokens and tokens[-1].kind == "text"):
            space = True
            continue
        before = tokens[-1] if tokens else context[-1] if context else None
        environments += (part == "\\begin") - (part == "\\end")
        if kind == "command" and part[1:] in voc.TEXT_MACROS:
            inner, position = _read_group(text, position)
            if tokens and tokens[-1].text in ("^", "_"):
                inner = "{" + inner + "}"
            is_text = part[1:] not in voc.MATH_FONTS
            tokens += read_tokens(" " + inner, is_text, depth + 1, (*context, *tokens[-8:])[-8:])
        elif part in voc.LOGIC and not (environments and part == "&"):
            tokens.append(Token("separator", voc.LOGIC[part], space))
        elif kind == "cjk":
            tokens += _read_cjk(part, space, before, text[position : position + 1])
        elif kind == "word":
            if in_text:
                words = _read_text_word(part, space, (*context, *tokens[-8:]))
            else:
                words = _read_word(part, space, before, text, position)
            if not in_text and text.startswith("(", position) and _is_text(words):
                raise ParseError(f"call of an unknown function {part[:20]}")
            tokens += words
        else:
            tokens.append(Token(kind, part, space))
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


def _read_text_word(word: str, space: bool, context: tuple[Token, ...]) -> list[Token]:
    """Read a word within a text macro, where a single letter after a number is a unit."""
    before = context[-1] if context else None
    if tokens := _read_common(word, space, before):
        return tokens
    if len(word) > 1 or _follows_quantity(context):
        return [Token("text", word, space)]
    return [Token("word", word, space)]


def _follows_quantity(context: tuple[Token, ...]) -> bool:
    """Say whether a number, a closing bracket or a unit comes before, but for signs."""
    for token in reversed(context):
        if token.kind == "text":
            return find_unit(token.text) is not None
        if token.kind == "number" or token.text in ("}", ")"):
            return True
        if token.text not in ("\\cdot", "/", "*", "(", "^", "-", "{"):
            return False
    return False


def _read_common(word: str, space: bool, before: Token | None) -> list[Token] | None:
    """Read what is the same in and out of text: connectives and operators; None for other words."""
    lower = word.lower()
    if lower in voc.CONNECTIVES:
        return [Token("separator", voc.CONNECTIVES[lower], space)]
    if lower in voc.OPERATOR_WORDS:
        return [Token("command", voc.OPERATOR_WORDS[lower], space)]
    if (word in voc.FUNCTIONS or word in voc.CONSTANT_WORDS) and not (
        before is not None and before.kind == "number" and find_unit(word)
    ):
        return [Token("command", "\\" + word, space)]
    return None


def _read_word(word: str, space: bool, before: Token | None, text: str, end: int) -> list[Token]:
    """Decide what a run of letters is: a connective, a name, a function, letters, or prose."""
    lower = word.lower()
    after_number = before is not None and before.kind == "number"
    if after_number and lower in voc.ORDINAL_ENDINGS and not space:
        return []
    if word == "in":
        return [Token("text", word, space) if after_number else Token("command", "\\in", space)]
    is_letters = len(word) == 2 and _is_product(word, space, before, text, end)
    if not is_letters and (tokens := _read_common(word, space, before)):
        return tokens
    if len(word) == 1:
        return [Token("word", word, space)]
    is_unit = _is_bare_unit(word)
    if not is_letters and ((is_unit and after_number) or word.lower() in voc.MULTIPLIERS):
        return [Token("text", word, space)]
    if not is_letters and (
        (is_unit and word not in BARE_SYMBOLS) or word in _SAFE_UNITS or _is_short_word(word)
    ):
        return [Token("text", word, space)]
    if word.endswith("pi") and len(word) <= 4:
        letters = [Token("word", c, False) for c in word[:-2]]
        return [*letters, Token("command", "\\pi", False)]
    if len(word) <= 3 or (word.isupper() and len(word) <= 6):
        return [Token("word", c, space and not i) for i, c in enumerate(word)]
    return [Token("text", word, space)]


# Units that are never a product of two letters after a fraction or a root.
_SAFE_UNITS = {"cm", "mm", "km", "kg", "ml", "mL", "dm", "Hz", "ft"}
# Units that are as often products.
_LETTERS_TOO = {
    "hr", "mg", "am", "pm", "mi", "lb", "ha", "oz", "rs", "ms", "ns", "yd", "mA", "mV", "kN",
}  # fmt: skip
_VERBS = {
    "is", "it", "of", "to", "so", "no", "if", "as", "we", "be", "or", "pi", "ln", "lg", "tg", "oo",
}  # fmt: skip
_GLUED_OPERATOR = re.compile(
    r"[\^_]|[+*/](?=[\w\\({])|-(?=[a-zA-Z\\({])|\\(?:sin|cos|tan|frac|sqrt)"
)
_OPERATOR = re.compile(r"\s+[+*/^-]\s|\s*\\(?:sin|cos|tan|frac|sqrt|cdot)")
_UNIT_END = re.compile(r"\s*(?:\^\s*\{?-?\d|/|[+-]\s*\d|\\cdot|\*)")


def _is_product(word: str, space: bool, before: Token | None, text: str, end: int) -> bool:
    """Say whether a word of two letters is a product of them, because it is part of a formula.

    ``an + b``, ``ax+by``, ``3an``, ``5is`` are; ``5 mg``, ``7 is``, ``2\\pi cm`` are not.
    """
    if word in ("pi", "ln", "lg", "tg", "oo"):
        return False
    after_number = before is not None and before.kind == "number"
    if after_number and _is_bare_unit(word):
        follows = re.match(
            r"\s*(?:[+*-]\s*\d*)?(?:[a-zA-Z](?![a-zA-Z])|\\(?!cdot|[,;:! ]))", text[end:]
        )
        return bool(follows) and not _UNIT_END.match(text, end)
    if word in _SAFE_UNITS and _UNIT_END.match(text, end):
        return False
    if _GLUED_OPERATOR.match(text, end) or (word not in _VERBS and _OPERATOR.match(text, end)):
        return True
    if before is None:
        return False
    if after_number:
        return not space and word not in ("or", "to", "of", "if")
    if word in _VERBS:
        return False
    if before.text in ("+", "-", "*", "/", "\\cdot") and not space:
        return True
    is_factor = before.kind in ("word", "command") or before.text in ("}", ")")
    return is_factor and word in _LETTERS_TOO and before.text not in ("\\%", "\\circ")


def _is_bare_unit(word: str) -> bool:
    """Say whether a word outside of text is a unit; of the symbols, only common ones are."""
    if word in BARE_SYMBOLS:
        return True
    is_cased = word.islower() or word.isupper() or (word.istitle() and len(word) > 2)
    return len(word) > 1 and word.lower() in WORDS and (is_cased or word in ("Km", "Kg"))


def _read_cjk(run: str, space: bool, before: Token | None, after: str) -> list[Token]:
    """Read letters that are not Latin: connectives, and a number's scale and units."""
    if run in voc.CONNECTIVES:
        return [Token("separator", voc.CONNECTIVES[run], space)]
    if run == "比":
        return [Token("mark", ":", space)]
    tokens: list[Token] = []
    connective = None
    if after and len(run) > 1 and not re.search("[总之的其共]和$", run):
        ends = [run[-n:] for n in (2, 1) if run[-n:] in voc.CONNECTIVES and len(run) > n]
        if ends:
            connective, run = voc.CONNECTIVES[ends[0]], run[: -len(ends[0])]
    start = 0
    after_number = before is not None and before.kind == "number"
    after_quantity = after_number or (before is not None and before.text in ("}", "/", ")"))
    while after_quantity and start < len(run):
        piece = _find_piece(run, start, after_number and not tokens)
        if piece is None:
            break
        tokens.append(Token("text", {"每": "per"}.get(piece, piece), space and not tokens))
        start += len(piece)
    if start < len(run):
        tokens.append(Token("text", run[start:], space and not tokens))
    if connective:
        tokens.append(Token("separator", connective, False))
    return tokens


def _find_piece(run: str, start: int, is_scale_allowed: bool) -> str | None:
    """The longest unit or, before any unit, scale that stands at ``start``."""
    for length in range(min(LONGEST_CJK, len(run) - start), 0, -1):
        piece = run[start : start + length]
        if piece in POWER_WORDS or find_unit(piece) or (piece == "每" and start):
            return piece
        if piece in voc.MULTIPLIERS:
            return piece
    return None


def _is_short_word(word: str) -> bool:
    return word.lower() in voc.SHORT_WORDS and not word.isupper()  # NO is a segment


def tidy_tokens(tokens: list[Token]) -> list[Token]:
    """Drop the prose around mathematics, where that cannot change the meaning.

    In each part between separators, leading and trailing words go ("the answer 5", "5 apples");
    so do quantified tails ("for all integers n"). Words that change meaning ("not", "at least",
    "if") are never dropped: they stay, and make the text unparseable as mathematics.
    """
    out: list[Token] = []
    parts = list(_split_parts(tokens))
    if len(parts) > 1 and all(_names_by_colon(part) for part, _ in parts):  # x: 1, y: 2
        for part, _ in parts:
            part[1] = Token("mark", "=", True)
    for index, (part, separator) in enumerate(parts):
        part = _drop_tail(_drop_remarks(part))
        if index and _declares_domain(part) and not _restricts(part, tokens):
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


def _names_by_colon(part: list[Token]) -> bool:
    return (
        len(part) > 2
        and part[0].kind == "word"
        and [t.text for t in part].count(":") == 1
        and (part[1].text == ":")
    )


def _split_parts(tokens: list[Token]) -> Iterator[tuple[list[Token], Token | None]]:
    part: list[Token] = []
    depth = 0
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


_ORDER = {
    "<", ">", "<=", ">=", "\\le", "\\leq", "\\ge", "\\geq", "\\lt", "\\gt", "\\leqslant",
    "\\geqslant",
}  # fmt: skip


def _restricts(part: list[Token], tokens: list[Token]) -> bool:
    """Say whether ``x \\in \\mathbb{Z}`` takes something from an inequality in the same letter."""
    texts = [token.text for token in part]
    if len(texts) < 3 or texts[1] != "\\in" or not {"Z", "N"} & set(texts):
        return False
    is_whole = texts[0] in ("k", "n", "m", "j")  # whole numbers by custom
    return not is_whole and any(token.text in _ORDER for token in tokens)


def _drop_tail(part: list[Token]) -> list[Token]:
    for index, token in enumerate(part):
        if index == len(part) - 1 and token.text == "in" and part[index - 1].kind == "number":
            return part  # inches
        if token.kind == "text" and token.text.lower() in voc.TAIL_WORDS and index:
            return part[:index]
        if token.text == "\\forall" and index:
            return part[:index]
    return part


def _is_droppable(token: Token) -> bool:
    if token.kind != "text" or token.text.lower() in voc.MEANINGFUL_WORDS:
        return False
    return token.text.isascii() or not _MEANINGFUL_CJK.search(token.text)


def _is_text(tokens: list[Token]) -> bool:
    return bool(tokens) and tokens[-1].kind == "text"


def _is_unit(token: Token) -> bool:
    return token.kind == "text" and (
        token.text in POWER_WORDS
        or token.text == "per"
        or token.text in voc.MULTIPLIERS
        or find_unit(token.text) is not None
    )
