"""Reads tokens one by one; also units and labels, which need no tree."""

from collections.abc import Callable
from typing import TypeVar

from rewards.math import vocabulary as voc
from rewards.math.lexer import ParseError, Token
from rewards.math.node import Node
from rewards.text.units import AFTER_POWER_WORDS, POWER_WORDS, Unit, find_unit, make_unit

MAX_DEPTH = 40

END = Token("end", "", False)
_UNIT_ENDS = {*[r",", r";", r")", r"]", r"\}", r"}", r":", r"=", r"\approx", r"\\"]}

T = TypeVar("T")


class Cursor:
    """A position in a list of tokens; beyond the last one there are ``END`` tokens."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0  # open |...| groups: inside one, a bar closes
        self.in_braces = False  # where a colon builds a set and is not a ratio

    @property
    def token(self) -> Token:
        return self.tokens[self.at] if self.at < len(self.tokens) else END

    def peek(self, ahead: int = 1) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else END

    def take(self) -> Token:
        token = self.token
        self.at += 1
        return token

    def accept(self, *texts: str) -> Token | None:
        if self.at < len(self.tokens) and (token := self.tokens[self.at]).text in texts:
            self.at += 1
            return token
        return None

    def expect(self, *texts: str) -> Token:
        found = self.accept(*texts)
        if not found:
            raise ParseError(f"expected {' or '.join(texts)}, found {self.token.text[:20]!r}")
        return found

    def expect_end(self) -> None:
        if self.token.kind != "end":
            raise ParseError(f"unexpected {self.token.text[:20]!r}")

    def nested(self, parse: Callable[[], T]) -> T:
        """Run ``parse`` one level deeper, outside any enclosing bars or braces."""
        if self.depth >= MAX_DEPTH:
            raise ParseError("nested too deeply")
        saved = self.bars, self.in_braces
        self.depth, self.bars, self.in_braces = self.depth + 1, 0, False
        try:
            return parse()
        finally:
            self.depth -= 1
            self.bars, self.in_braces = saved

    def accept_label(self) -> Node | None:
        """Accept a subscript in words: ``{\\text{out}}``, ``{\\max}``, ``{0,\\min}``."""
        at, words = self.at, []
        is_group = self.token.text == "{"
        at += is_group
        while at < len(self.tokens):
            token = self.tokens[at]
            is_word = token.kind == "text" or token.text[1:] in voc.LABELS
            if not is_word and not (
                is_group and (token.kind in ("word", "number") or token.text == ",")
            ):
                break
            words.append(token)
            at += 1
            if not is_group:
                break
        closes = not is_group or (at < len(self.tokens) and self.tokens[at].text == "}")
        if not closes or not any(t.kind == "text" or t.text[1:] in voc.LABELS for t in words):
            return None
        self.at = at + is_group
        return Node("text", (), " ".join(token.text.lstrip("\\") for token in words))

    def accept_unit(self) -> Unit | None:
        """Accept the units after a quantity (``cm^2``, ``miles per hour``), if they end there."""
        parts: list[tuple[str, int]] = []
        start, sign, power = self.at, 1, 1
        while True:
            token, following = self.token, self.peek()
            lower = token.text.lower()
            if token.kind == "text" and lower in POWER_WORDS:
                self.take()
                power = POWER_WORDS[lower]
            elif token.kind == "text" and parts and lower in AFTER_POWER_WORDS:
                name, exponent = parts.pop()
                self.take()
                parts.append((name, exponent * AFTER_POWER_WORDS[lower]))
            elif self._at_unit(token) or (sign < 0 and token.kind == "word"):
                name = find_unit(self.take().text) or token.text
                parts.append((name, sign * power * self._accept_unit_power()))
                sign, power = 1, 1
            elif parts and token.text == "/" and following.text == "(":
                self.at += 2
                inner = self._accept_bracketed_unit()
                if inner is None:
                    break
                parts += [(name, -exponent) for name, exponent in inner]
            elif token.text == "per" or (parts and token.text == "/"):
                self.take()
                sign = -1
            elif parts and token.text in ("\\cdot", "*") and self._at_unit(following):
                self.take()
            else:
                break
        if parts and sign > 0 and self._at_unit_end():
            return make_unit(parts)
        self.at = start
        return None

    def _at_unit(self, token: Token) -> bool:
        return token.kind == "text" and find_unit(token.text) is not None

    def _at_unit_end(self) -> bool:
        is_end = self.token.kind in ("end", "separator", "text", "number")
        return is_end or self.token.text in _UNIT_ENDS

    def _accept_bracketed_unit(self) -> list[tuple[str, int]] | None:
        inner = []
        while self._at_unit(self.token) or self.token.kind == "word":
            name = find_unit(self.token.text) or self.token.text
            self.take()
            inner.append((name, self._accept_unit_power()))
            self.accept("\\cdot", "*")
        return inner if self.accept(")") else None

    def _accept_unit_power(self) -> int:
        """The exponent of a unit: ``^2``, ``^{-1}``; 1 if there is none."""
        start, sign = self.at, 1
        if not self.accept("^"):
            if self.token.kind == "number" and self.token.text in "23" and not self.token.space:
                return int(self.take().text)
            return 1
        is_group = self.accept("{")
        if self.accept("-"):
            sign = -1
        if self.token.kind == "number" and self.token.text.isdigit() and len(self.token.text) == 1:
            power = sign * int(self.take().text)
            if not is_group or self.accept("}"):
                return power
        self.at = start
        raise ParseError("an exponent that no unit has")

    def expect_number(self) -> str:
        if self.token.kind != "number":
            raise ParseError("expected digits")
        return self.take().text
