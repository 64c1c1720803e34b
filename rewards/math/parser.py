"""Parse an answer, LaTeX or plain, into a small tree. Nothing is ever evaluated as code.

A recursive-descent parser over tokens. It reads all of its input or raises ``ParseError``: an
answer that is only half understood must not be judged by the half (``3, 4, and maybe 5``).
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar, cast

from rewards.math import vocabulary as voc
from rewards.math.lexer import ParseError, Token, read_tokens, tidy_tokens
from rewards.math.normalize import normalize_text, strip_dress
from rewards.text.units import (
    AFTER_POWER_WORDS,
    POWER_WORDS,
    Unit,
    find_scales,
    find_unit,
    make_unit,
)

MAX_CHARS = 8_000
MAX_DEPTH = 40

_END = Token("end", "", False)

T = TypeVar("T")


class Node(NamedTuple):
    """One node: ``kind``, its children, and what else distinguishes it (name, operators, ...).

    ``value`` is a str (of a name, text or sign), a ``Number``, a ``Unit`` or, of a relation, its
    operators. Three kinds' children are not all nodes: a matrix has rows (see ``rows_of``), and
    None stands for the left side that a ``pm`` has not, and for bounds of a ``big`` operator.
    """

    kind: str
    args: tuple["Node", ...] = ()
    value: Any = None


def make_matrix(rows: Iterable[tuple[Node, ...]]) -> Node:
    return Node("matrix", cast("tuple[Node, ...]", tuple(rows)))


def rows_of(matrix: Node) -> tuple[tuple[Node, ...], ...]:
    return cast("tuple[tuple[Node, ...], ...]", matrix.args)


class Number(NamedTuple):
    """A literal: its exact value, the digits after its point, and its significant digits."""

    value: Fraction
    decimals: int
    significant: int


_APPLIED = re.compile(
    r"\\(?:operatorname\*?|mathrm)\s*\{\s*([A-Za-z]{2,})\s*\}\s*\(\s*[-\d\\](?![^()]*,)"
)


def parse_answer(text: str, is_stripped: bool = False) -> Node:
    """Parse ``text``; raise ``ParseError`` if any of it is not understood.

    Cost is bounded: ``MAX_CHARS`` characters, ``MAX_DEPTH`` nested groups.
    """
    if len(text) > MAX_CHARS:
        raise ParseError("too long")
    if not is_stripped:
        text = strip_dress(normalize_text(text))
    if not text:
        raise ParseError("empty")
    if "=" not in text and ("\\op" in text or "\\mathrm" in text):
        names = [name for name in _APPLIED.findall(text) if name not in voc.KNOWN_OPERATORS]
        if names:  # erf(1) is not 1
            raise ParseError(f"unknown function {names[0][:20]}")
    parser = Parser(tidy_tokens(read_tokens(text)))
    tree = parser.parse_groups()
    parser.expect_end()
    return tree


class Parser:
    """Recursive descent, loosest first: groups, lists, relations, sets, ratios, sums, products."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0  # open |...| groups: inside one, a bar closes
        self.in_braces = False  # where a colon builds a set and is not a ratio

    @property
    def token(self) -> Token:
        return self.tokens[self.at] if self.at < len(self.tokens) else _END

    def peek(self, ahead: int = 1) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else _END

    def take(self) -> Token:
        token = self.token
        self.at += 1
        return token

    def accept(self, *texts: str) -> Token | None:
        return self.take() if self.token.text in texts and self.token.kind != "end" else None

    def expect(self, *texts: str) -> Token:
        found = self.accept(*texts)
        if not found:
            raise ParseError(f"expected {' or '.join(texts)}, found {self.token.text[:20]!r}")
        return found

    def expect_end(self) -> None:
        if self.token.kind != "end":
            raise ParseError(f"unexpected {self.token.text[:20]!r}")

    def nested(self, parse: Callable[[], T]) -> T:
        """Run ``parse`` one level deeper, with no enclosing bar or brace in force."""
        if self.depth >= MAX_DEPTH:
            raise ParseError("nested too deeply")
        saved = self.bars, self.in_braces
        self.depth, self.bars, self.in_braces = self.depth + 1, 0, False
        try:
            return parse()
        finally:
            self.depth -= 1
            self.bars, self.in_braces = saved

    def parse_groups(self) -> Node:
        """Lists separated by ``;``: tuples if commas separate within, else one list."""
        groups = [self.parse_list()]
        while self.accept(";", "\\\\"):
            if self.token.kind == "end":
                break
            groups.append(self.parse_list())
        if len(groups) == 1:
            return groups[0]
        if any(group.kind == "list" for group in groups):
            groups = [Node("tuple", g.args, "()") if g.kind == "list" else g for g in groups]
        return Node("list", tuple(groups), ";")

    def parse_list(self) -> Node:
        items, separators = [self.parse_relation()], []
        while self.token.text == "," or self.token.kind == "separator":
            separator = self.take().text
            while self.token.text == "," or self.token.kind == "separator":
                separator = self.take().text
            if self.token.kind == "end" or self.token.text in (";", "&", "\\\\", "\\end"):
                break
            separators.append(separator)
            items.append(self.parse_relation())
        while len(items) > 1 and separators[-1] != "or":  # 1 hour and 20 minutes
            joined = join_amounts(*items[-2:])
            if joined is None:
                break
            items[-2:] = [joined]
            separators.pop()
        if not separators:
            return items[0]
        return Node("list", tuple(items), separators[-1])

    def parse_relation(self) -> Node:
        operands, operators = [self.parse_union()], []
        while operator := self._accept_relation():
            operators.append(operator)
            operands.append(self.parse_union())
        return Node("relation", tuple(operands), tuple(operators)) if operators else operands[0]

    def _accept_relation(self) -> str | None:
        if self.token.kind == "end" or self.token.text not in voc.RELATIONS:
            if self.token.text == "\\not" and self.peek().text in voc.NEGATED:
                self.take()
                return voc.NEGATED[self.take().text]
            return None
        return voc.RELATIONS[self.take().text]

    def parse_union(self) -> Node:
        left = self.parse_ratio()
        while self._at_union_letter() or self.token.text in voc.SET_OPERATORS:
            operator = voc.SET_OPERATORS.get(self.take().text, "union")
            left = Node(operator, (left, self.parse_ratio()))
        return left

    def _at_union_letter(self) -> bool:
        """Say whether a U stands for a union: between two brackets, as in (0, 1) U (2, 3)."""
        before = self.tokens[self.at - 1].text if self.at else ""
        return self.token.text == "U" and before in (")", "]") and self.peek().text in ("(", "[")

    def parse_ratio(self) -> Node:
        clock = _is_clock(self.tokens[self.at : self.at + 3])
        items = [self.parse_sum()]
        while not self.in_braces and self.accept(":", "\\colon"):
            items.append(self.parse_sum())
        return (
            Node("ratio", tuple(items), "clock" if clock else None) if len(items) > 1 else items[0]
        )

    def parse_sum(self) -> Node:
        """A sum; with TeX's ``\\over``, or taken modulo something."""
        total = self._parse_terms()
        while self.accept("\\over"):
            total = Node("frac", (total, self._parse_terms()))
        if self.token.text == "(" and self.peek().text == "\\mod":
            self.take()
            self.take()
            total = Node("mod", (total, self._parse_terms()))
            self.expect(")")
        elif self.accept("\\bmod", "\\mod", "\\pmod"):
            total = Node("mod", (total, self._parse_terms()))
        return total

    def _parse_terms(self) -> Node:
        left = self._parse_signed_term()
        while sign := self.accept("+", "-", "\\pm", "\\mp"):
            right = self.parse_product()
            if sign.text in ("\\pm", "\\mp"):
                left = Node("pm", (left, right), sign.text)
            else:
                left = Node("add", (left, right if sign.text == "+" else Node("neg", (right,))))
        return left

    def _parse_signed_term(self) -> Node:
        signs = []
        while sign := self.accept("+", "-", "\\pm", "\\mp"):
            signs.append(sign.text)
            if len(signs) > 4:
                raise ParseError("too many signs")
        term = self.parse_product()
        for text in reversed(signs):
            if text == "-":
                term = Node("neg", (term,))
            elif text != "+":
                term = Node("pm", cast("tuple[Node, ...]", (None, term)), text)
        return term

    def parse_product(self) -> Node:
        left = self.parse_power()
        while True:
            if self.accept("*", "\\cdot", "\\times", "\\ast", "\\cdotp", "\\bullet"):
                left = Node("mul", (left, self._parse_factor()))
            elif self.accept("/", "\\div"):
                left = Node("div", (left, self._parse_factor()))
            elif left.kind == "unit" and self.token.kind == "number":
                left = self._parse_smaller_amount(left)
            elif self._starts_factor():
                left = _join_factors(left, self.parse_power())
            elif (marked := self._parse_mark(left)) is not None:
                left = marked
            else:
                return left

    def _parse_smaller_amount(self, amount: Node) -> Node:
        """``20 minutes`` after ``1 hour``: both together, in the first unit."""
        quantity = self._parse_number()
        unit = self._accept_unit()
        smaller = Node("unit", (quantity,), unit) if unit else None
        joined = join_amounts(amount, smaller) if smaller else None
        if joined is None:
            raise ParseError("two quantities side by side")
        return joined

    def _parse_mark(self, quantity: Node) -> Node | None:
        """What may follow a quantity: a percent sign, "million", a unit. None if nothing does."""
        if self.accept("%", "\\%"):
            return Node("percent", (quantity,))
        if self.token.kind != "text":
            return None
        if self.token.text.lower() in voc.MULTIPLIERS:
            scale = read_number(voc.MULTIPLIERS[self.take().text.lower()])
            return Node("mul", (quantity, Node("number", (), scale)), "done")
        unit = self._accept_unit()
        if unit == (("%", 1),):
            return Node("percent", (quantity,))
        if unit == (("degree", 1),):
            return Node("degree", (quantity,))
        return Node("unit", (quantity,), unit) if unit else None

    def _parse_factor(self) -> Node:
        """A factor after an explicit operator may carry a sign: ``2 * -3``."""
        if self.accept("-"):
            return Node("neg", (self.parse_power(),))
        self.accept("+")
        return self.parse_power()

    def _starts_factor(self) -> bool:
        token = self.token
        if token.kind in ("number", "word"):
            return not self._at_union_letter()
        if token.kind == "command":
            return token.text in voc.FACTOR_COMMANDS or token.text[1:] in voc.NAMES
        if token.text == "|":
            return not self.bars
        if token.text == "(" and self.peek().text == "\\mod":
            return False
        return token.text in ("(", "[", "{")

    def parse_power(self) -> Node:
        return self._parse_postfix(self.parse_atom())

    def _parse_postfix(self, base: Node) -> Node:
        while True:
            text = self.token.text
            if self.token.kind == "end":
                return base
            if text in ("^", "**"):
                self.take()
                base = self._parse_exponent(base)
                if (
                    base.kind == "pow"
                    and base.args[1] == _MINUS_ONE
                    and self._at_argument(
                        base.args[0].kind == "name"
                        and base.args[0].value in ("f", "g", "h", "F", "G")
                    )
                ):
                    inverse = Node("index", (base.args[0], Node("text", (), "inverse")))
                    base = self._parse_application(inverse)
            elif text == "_":
                self.take()
                base = _subscript(base, self._accept_label() or self._parse_script())
            elif text == "!":
                self.take()
                base = Node("factorial", (base,))
            elif text == "\\circ" and base.kind == "name" and self.peek().kind == "word":
                self.take()  # f \circ g
                base = Node("index", (base, self.parse_atom(), Node("text", (), "of")))
            elif text in ("\\degree", "\\circ", "\\textdegree"):
                self.take()
                base = Node("degree", (base,))
            elif text == "'":
                self.take()
                base = Node("index", (base, Node("text", (), "'")))
                if self.token.text == "(" and base.args[0].kind in ("name", "index"):
                    base = self._parse_application(base)
            else:
                return base

    def _at_argument(self, is_function: bool = False) -> bool:
        """Say whether ``(x)``, one letter in brackets, comes next: f^{-1}(x) is an inverse."""
        texts = [self.token.text, self.peek(2).text]
        kinds = ("word", "number") if is_function else ("word",)
        return texts == ["(", ")"] and self.peek().kind in kinds and not self.token.space

    def _parse_exponent(self, base: Node) -> Node:
        text, after = self.token.text, self.peek()
        if text == "{" and after.text in ("\\circ", "\\degree") and self.peek(2).text == "}":
            self.at += 3
            return self._skip_temperature(Node("degree", (base,)))
        if text in ("\\circ", "\\degree"):
            self.take()
            return self._skip_temperature(Node("degree", (base,)))
        if text == "{" and _is_prime_run(self.tokens, self.at):
            self.at += 3
            return Node("index", (base, Node("text", (), "'")))
        return Node("pow", (base, self._parse_script()))

    def _skip_temperature(self, node: Node) -> Node:
        scale = {"C": "celsius", "F": "fahrenheit"}.get(self.token.text)
        following = self.peek()
        if scale and (following.kind in ("end", "separator", "text") or following.text in ",;)}"):
            self.take()
            return Node("unit", node.args, ((scale, 1),))
        return node

    def _parse_script(self) -> Node:
        """An exponent or subscript: a group, or a signed atom. ``x^10`` is x to the ten."""
        if self.accept("{"):
            inner = self.nested(self.parse_groups)
            self.expect("}")
            return inner
        if self.accept("-"):
            return Node("neg", (self._parse_script(),))
        self.accept("+")
        if self.token.kind == "word":  # a^n(b + c) is a product
            return Node("name", (), self.take().text)
        return self.parse_atom()

    def _accept_label(self) -> Node | None:
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

    def _accept_unit(self) -> Unit | None:
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
        return is_end or self.token.text in (
            ",",
            ";",
            ")",
            "]",
            "\\}",
            "}",
            ":",
            "=",
            "\\approx",
            "\\\\",
        )

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

    def parse_atom(self) -> Node:
        token = self.token
        if token.kind == "number":
            return self._parse_number()
        if token.kind == "word":
            self.take()
            node = Node("name", (), token.text)
            if self.token.text == "(" and not self.token.space:
                return self._parse_application(node)
            if self.token.text == "[" and node.value in ("E", "P") and self.depth == 0:
                return self._parse_expectation(node)
            return node
        if token.text in ("(", "["):
            inside = self.nested(self._parse_brackets)
            is_composed = inside.kind == "index" and inside.args[-1] == Node("text", (), "of")
            if is_composed and self.token.text == "(":
                return self._parse_application(inside)
            return inside
        if token.text == "]" and self.depth == 0:  # ]0, 1[ as written in France
            return self.nested(self._parse_reversed_interval)
        if token.text == "{":
            self.take()
            return self._parse_brace("}")
        if token.text in ("\\{", "\\lbrace"):
            self.take()
            return self._parse_brace("\\}", "\\rbrace")
        if token.text in ("|", "\\lvert", "\\vert", "\\|", "\\lVert", "\\Vert"):
            return self._parse_bars()
        if token.kind == "command":
            return self._parse_command()
        if token.text == "." and self.peek().text == "." and self.peek(2).text == ".":
            self.at += 3
            return Node("dots")
        raise ParseError(f"unexpected {token.text[:20]!r}")

    def _parse_number(self) -> Node:
        digits = self.take().text
        if len(digits) > 4_000:
            raise ParseError("number too long")
        repeats = self.token.text in ("\\overline", "\\dot", "\\bar")
        if repeats and "." in digits and self.peek().text == "{":
            self.at += 2
            block = self.expect_number()
            self.expect("}")
            return Node("number", (), _repeating(digits, block))
        following = self.token, self.peek(), self.peek(2)
        if [t.kind for t in following] == ["number", "mark", "number"] and following[1].text == "/":
            return self._parse_mixed(digits)
        return Node("number", (), read_number(digits))

    def _parse_mixed(self, whole: str) -> Node:
        """``1 1/2``: a whole number, a space, a proper fraction."""
        top, _, bottom = self.take(), self.take(), self.take()
        part = [Node("number", (), read_number(t.text)) for t in (top, bottom)]
        mixed = _join_factors(Node("number", (), read_number(whole)), Node("frac", tuple(part)))
        if mixed.kind != "add" or not top.space:
            raise ParseError("two numbers side by side")
        return Node("group", (mixed,))

    def expect_number(self) -> str:
        if self.token.kind != "number":
            raise ParseError("expected digits")
        return self.take().text

    def take_single(self) -> Node:
        """The argument of ``\\frac`` and ``\\sqrt``: a group, or one character (``\\frac12``)."""
        if self.accept("{"):
            inner = self.nested(self.parse_groups)
            self.expect("}")
            return inner
        token = self.token
        if token.kind == "number" and token.text.isdigit():
            self.tokens[self.at] = Token("number", token.text[1:], False)
            if len(token.text) == 1:
                self.at += 1
            return Node("number", (), read_number(token.text[0]))
        return self.nested(self.parse_atom)

    def _parse_application(self, name: Node) -> Node:
        """``f(x)``: kept as written; what it means is decided where it is evaluated."""
        inside = self.nested(lambda: self._parse_brackets(in_application=True))
        if inside.kind == "tuple" and inside.value != "()":
            raise ParseError("not an argument list")
        if self.token.text in ("^", "**", "!"):  # x(x + 1)^2: only the bracket is squared
            return Node("mul", (name, self._parse_postfix(inside)), "juxtaposed")
        args = inside.args if inside.kind == "tuple" else (inside,)
        return Node("apply", (name, *args))

    def _parse_expectation(self, name: Node) -> Node:
        """``E[X]``: the expectation of X."""
        inside = self.nested(lambda: self._parse_brackets(in_application=True))
        return Node("index", (name, inside, Node("text", (), "[]")))

    def _parse_brackets(self, in_application: bool = False) -> Node:
        opener = self.take().text
        if in_application:
            self.bars = 1  # P(A|B): a bar is no bracket here, unless it opens the argument
            if self.token.kind == "text":  # P(heads)
                words = [self.take().text for _ in range(8) if self.token.kind == "text"]
                inside = Node("text", (), " ".join(words))
            else:
                inside = self.parse_groups()
            if self.accept("|", "\\mid", "\\vert"):
                inside = Node("index", (inside, self.parse_groups(), Node("text", (), "given")))
        else:
            inside = self.parse_groups()
        closer = self.expect(")", "]").text
        if inside.kind == "list" and (len(inside.args) == 2 or opener + closer in ("()", "[]")):
            return Node("tuple", inside.args, opener + closer)
        if opener + closer in ("()", "[]"):
            # Parentheses matter to juxtaposition only: 2(5) is a product, 2(1/2) no mixed number.
            return Node("group", (inside,)) if inside.kind in ("number", "frac") else inside
        raise ParseError("mismatched brackets")

    def _parse_reversed_interval(self) -> Node:
        opens = {"]": "(", "[": "["}[self.take().text]
        inside = self.parse_list()
        closes = {"[": ")", "]": "]"}[self.expect("[", "]").text]
        if inside.kind != "list" or len(inside.args) != 2:
            raise ParseError("not an interval")
        return Node("tuple", inside.args, opens + closes)

    def _parse_brace(self, *closers: str) -> Node:
        """``{...}``: a TeX group if it is one expression, else a set; ``\\{...\\}``: a set."""

        def parse_inside() -> Node:
            if self.accept(*closers):
                return Node("set", ())
            self.bars, self.in_braces = 1, True
            inside = self.parse_groups()
            self.bars, self.in_braces = 0, False
            if self.accept("|", "\\mid", ":", "\\vert"):
                return Node("builder", (inside, self.parse_list()))
            if self.accept("\\choose"):
                return Node("binomial", (inside, self.parse_sum()))
            return inside

        inside = self.nested(parse_inside)
        if inside.kind == "set" and not inside.args:
            return inside
        self.expect(*closers)
        if inside.kind in ("builder", "binomial"):
            return inside
        if inside.kind == "list":
            return Node("set", inside.args)
        if "\\}" in closers:
            return Node("set", (inside,))
        return inside

    def _parse_bars(self) -> Node:
        opener = self.take().text
        closer = {"\\lvert": "\\rvert", "\\lVert": "\\rVert"}.get(opener, opener)

        def parse_inside() -> Node:
            self.bars = 1
            return self.parse_sum()

        inside = self.nested(parse_inside)
        self.expect(closer)
        is_norm = opener in ("\\|", "\\lVert", "\\Vert")
        return Node("abs", (inside,), "norm" if is_norm else None)

    def _parse_command(self) -> Node:
        name = self.take().text[1:]
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            top = self.take_single()
            return Node("frac", (top, self.take_single()))
        if name in ("binom", "dbinom", "tbinom"):
            top = self.take_single()
            return Node("binomial", (top, self.take_single()))
        if name in ("sqrt", "cbrt"):
            return self._parse_root(name)
        if name in ("lfloor", "lceil"):
            inside = self.nested(self.parse_sum)
            self.expect("\\rfloor" if name == "lfloor" else "\\rceil")
            return Node("function", (inside,), name[1:])
        if name == "langle":
            inside = self.nested(self.parse_list)
            self.expect("\\rangle")
            return Node("tuple", inside.args if inside.kind == "list" else (inside,), "()")
        if name == "begin":
            return self._parse_environment()
        if name in ("sum", "prod", "int", "lim", "oint", "iint"):
            return self._parse_big(name)
        if name in voc.FUNCTIONS:
            return self._parse_function(voc.FUNCTIONS[name])
        if name in voc.DECORATIONS:
            inner = self.take_single()
            return Node("index", (inner, Node("text", (), voc.DECORATIONS[name])))
        if name in ("mathbb", "mathcal", "mathbf", "boldsymbol"):
            inner = self.take_single()
            if inner.kind != "name":
                return inner
            node = Node("name", (), name.replace("boldsymbol", "mathbf") + " " + inner.value)
            if self.token.text in ("[", "(") and node.value in ("mathbb E", "mathbb P"):
                return self._parse_expectation(node)
            return node
        if name in voc.OPERATORS:  # \deg f, \dim V
            inside = self.nested(self.parse_power)
            return Node("index", (inside, Node("text", (), name)))
        if name == "jmath":
            return Node("name", (), "j")
        if name in ("emptyset", "varnothing"):
            return Node("set", ())
        if name in ("ldots", "dots", "cdots", "dotsc", "dotsb", "vdots"):
            return Node("dots")
        if name in ("angle", "triangle", "measuredangle"):
            letters = [self.parse_atom()]
            while self.token.kind == "word" and self.token.text.isupper() and len(letters) < 6:
                letters.append(self.parse_atom())
            return Node("index", (*letters, Node("text", (), name)))
        if name in voc.NAMES:
            node = Node("name", (), voc.NAMES[name])
            if name not in voc.CONSTANTS and self.token.text == "(" and not self.token.space:
                return self._parse_application(node)
            return node
        raise ParseError(f"unknown command \\{name[:20]}")

    def _parse_root(self, name: str) -> Node:
        degree = Node("number", (), read_number("3" if name == "cbrt" else "2"))
        if self.accept("["):
            degree = self.nested(self.parse_sum)
            self.expect("]")
        in_brackets = self.token.text == "("
        inside = self.nested(self._parse_brackets) if in_brackets else self.take_single()
        return Node("root", (inside, degree))

    def _parse_function(self, name: str) -> Node:
        subscript = exponent = None
        while self.token.text in ("_", "^"):
            if self.take().text == "_":
                subscript = self._parse_script()
            else:
                exponent = self._parse_script()
        if self.accept("\\{"):
            inside = self._parse_brace("\\}")
            args = inside.args if inside.kind == "set" else (inside,)
        elif self.token.text in ("(", "[") or (self.token.text == "{" and not self.token.space):
            is_group = self.token.text == "{"
            inside = self.nested(self.take_single if is_group else self._parse_brackets)
            args = inside.args if inside.kind in ("tuple", "list") else (inside,)
        else:
            args = (self._parse_bare_argument(),)
        node = Node("function", args, name)
        if subscript is not None:
            if name not in ("log", "lg"):
                raise ParseError("subscript on a function")
            node = Node("function", (*args, subscript), "log")
        if exponent is None:
            return node
        if exponent == _MINUS_ONE and name in voc.INVERTIBLE:
            return Node("function", args, "a" + name)
        return Node("pow", (node, exponent))

    def _parse_bare_argument(self) -> Node:
        """``\\sin 2x``: a run of factors, up to the next operator or function name."""
        sign = self.accept("-")
        argument = self.nested(self.parse_power)
        while self._starts_factor() and self.token.text[1:] not in voc.FUNCTIONS:
            argument = _join_factors(argument, self.nested(self.parse_power))
        return Node("neg", (argument,)) if sign else argument

    def _parse_big(self, name: str) -> Node:
        """Sums, products, integrals and limits: bounds, then a body as long as a term."""
        lower = upper = None
        while self.token.text in ("_", "^"):
            if self.take().text == "_":
                lower = self._parse_script()
            else:
                upper = self._parse_script()
        body = self.nested(self.parse_product)
        return Node("big", cast("tuple[Node, ...]", (lower, upper, body)), name)

    def _parse_environment(self) -> Node:
        self.expect("{")
        words: list[str] = []
        while not self.accept("}"):
            token = self.take()
            if token.kind == "end" or len(words) > 12:
                raise ParseError("unknown environment")
            words.append(token.text)
        name = "".join(words)
        if name.rstrip("*") not in voc.MATRICES or name.lower() == "vmatrix":  # a determinant
            raise ParseError(f"unknown environment {name[:20]}")
        if name == "array":
            self.expect("{")
            while not self.accept("}"):
                if self.take().kind == "end":
                    raise ParseError("unclosed column specification")
        if name.rstrip("*") in ("alignedat", "alignat"):
            self.take_single()
        self._drop_alignment()
        rows = self.nested(self._parse_rows)
        while not self.accept("}"):
            if self.take().kind == "end":
                raise ParseError("unclosed environment")
        if all(len(row) == 1 and row[0].kind in ("relation", "list") for row in rows):
            lines = [row[0].args if row[0].kind == "list" else row for row in rows]
            return Node("list", sum(lines, ()), ",")  # a system of equations
        return make_matrix(rows)

    def _drop_alignment(self) -> None:
        """Drop, up to the end of the environment, ``&`` beside a relation and what ends a row.

        A row that begins with a relation goes on with the row before: ``x &= 6/2 \\\\ &= 3``.
        """
        kept: list[Token] = []
        depth, at = 1, self.at
        while at < len(self.tokens) and depth:
            token, following = (
                self.tokens[at],
                self.tokens[at + 1] if at + 1 < len(self.tokens) else _END,
            )
            depth += (token.text == "\\begin") - (token.text == "\\end")
            before = kept[-1].text if kept else ""
            is_mark = token.text == "&" and (
                following.text in voc.RELATIONS or (before in voc.RELATIONS and before != "\\to")
            )
            ends_row = token.text in (",", ".", ";") and following.text in ("\\\\", "\\end")
            if token.text == "&" and before == "\\\\" and following.text in voc.RELATIONS:
                kept.pop()
            if not is_mark and not ends_row:
                kept.append(token)
            at += 1
        self.tokens[self.at : at] = kept

    def _parse_rows(self) -> tuple[tuple[Node, ...], ...]:
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            while self.accept("\\hline"):
                pass
            if self.accept("\\end"):
                self.expect("{")
                break
            row.append(self.parse_list())
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.accept("\\\\"):
                self.expect("\\end")
                self.expect("{")
                break
        return tuple(rows)


def read_number(digits: str) -> Number:
    """Return the literal written as ``digits`` (no sign, at most one point), exactly."""
    digits, _, exponent = digits.lower().partition("e")
    if exponent:
        value = read_number(digits).value * Fraction(10) ** int(exponent)
        return Number(value, 0, 0)
    whole, _, decimals = digits.partition(".")
    return Number(
        Fraction(digits if whole else "0" + digits) if decimals else Fraction(int(whole)),
        len(decimals),
        len((whole + decimals).lstrip("0")),
    )


def _repeating(digits: str, block: str) -> Number:
    """``0.1\\overline{6}``: exactly 1/6."""
    start = read_number(digits)
    if not block.isdigit() or len(block) > 100:
        raise ParseError("not a repeating decimal")
    tail = Fraction(int(block), (10 ** len(block) - 1) * 10**start.decimals)
    return Number(start.value + tail, 0, 0)


def _join_factors(left: Node, right: Node) -> Node:
    """Juxtaposition: a whole number before a proper fraction is a mixed number, else a product."""
    if left.kind == "number" and right.kind == "frac" and not left.value.decimals:
        top, bottom = right.args
        if top.kind == bottom.kind == "number" and top.value.value < bottom.value.value:
            return Node("add", (left, right), "done")  # a number, no sum to be worked out
    if left.kind == "number" and right.kind == "number":
        raise ParseError("two numbers side by side")
    return Node("mul", (left, right), "juxtaposed")


def _subscript(base: Node, script: Node) -> Node:
    base = base.args[0] if base.kind == "group" else base
    if base.kind == "number":
        if script.kind == "number" and 2 <= script.value.value <= 36 and not base.value.decimals:
            return Node("base", (base, script))
        raise ParseError("subscript on a number")
    return Node("index", (base, script))


def join_amounts(amount: Node, smaller: Node) -> Node | None:
    """The sum of two amounts of one measure, if the second is in a smaller unit; else None."""
    if amount.kind != "unit" or smaller.kind != "unit":
        return None
    scales = [scale for scale in find_scales(amount.value, smaller.value) if scale < 1]
    if not scales:
        return None
    scale = Node("number", (), Number(scales[0], 0, 0))
    rest = Node("mul", (smaller.args[0], scale), "done")
    return Node("unit", (Node("add", (amount.args[0], rest), "done"),), amount.value)


def _is_clock(tokens: list[Token]) -> bool:
    """Say whether digits look like a time of day: 6:30, but not 3:4."""
    if [token.kind for token in tokens] != ["number", "mark", "number"] or tokens[1].text != ":":
        return False
    hours, minutes = tokens[0].text, tokens[2].text
    is_time = hours.isdigit() and len(minutes) == 2 and minutes.isdigit()
    return is_time and len(hours) <= 2 and int(hours) <= 24 and int(minutes) < 60


def _is_prime_run(tokens: list[Token], at: int) -> bool:
    return (
        at + 2 < len(tokens)
        and tokens[at + 1].text in ("\\prime", "'")
        and tokens[at + 2].text == "}"
    )


_MINUS_ONE = Node("neg", (Node("number", (), read_number("1")),))
