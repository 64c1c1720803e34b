"""Parse an answer, LaTeX or plain, into a small tree. Nothing is ever evaluated as code.

A recursive-descent parser over tokens. It reads all of its input or raises ``ParseError``: an
answer that is only half understood must not be judged by the half (``3, 4, and maybe 5``).
"""

import re
from typing import cast

from rewards.math import vocabulary as voc
from rewards.math.commands import parse_command
from rewards.math.cursor import Cursor
from rewards.math.lexer import ParseError, Token, read_tokens, tidy_tokens
from rewards.math.node import (
    MINUS_ONE,
    Node,
    add_subscript,
    join_amounts,
    join_factors,
    read_number,
    read_repeating,
)
from rewards.math.normalize import normalize_text, strip_dress

MAX_CHARS = 8_000

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


class Parser(Cursor):
    """Recursive descent, loosest first: groups, lists, relations, sets, ratios, sums, products."""

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
            elif self.starts_factor():
                left = join_factors(left, self.parse_power())
            elif (marked := self._parse_mark(left)) is not None:
                left = marked
            else:
                return left

    def _parse_smaller_amount(self, amount: Node) -> Node:
        """``20 minutes`` after ``1 hour``: both together, in the first unit."""
        quantity = self._parse_number()
        unit = self.accept_unit()
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
        unit = self.accept_unit()
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

    def starts_factor(self) -> bool:
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
                    and base.args[1] == MINUS_ONE
                    and self._at_argument(
                        base.args[0].kind == "name"
                        and base.args[0].value in ("f", "g", "h", "F", "G")
                    )
                ):
                    inverse = Node("index", (base.args[0], Node("text", (), "inverse")))
                    base = self.parse_application(inverse)
            elif text == "_":
                self.take()
                base = add_subscript(base, self.accept_label() or self.parse_script())
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
                    base = self.parse_application(base)
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
        return Node("pow", (base, self.parse_script()))

    def _skip_temperature(self, node: Node) -> Node:
        scale = {"C": "celsius", "F": "fahrenheit"}.get(self.token.text)
        following = self.peek()
        if scale and (following.kind in ("end", "separator", "text") or following.text in ",;)}"):
            self.take()
            return Node("unit", node.args, ((scale, 1),))
        return node

    def parse_script(self) -> Node:
        """An exponent or subscript: a group, or a signed atom. ``x^10`` is x to the ten."""
        if self.accept("{"):
            inner = self.nested(self.parse_groups)
            self.expect("}")
            return inner
        if self.accept("-"):
            return Node("neg", (self.parse_script(),))
        self.accept("+")
        if self.token.kind == "word":  # a^n(b + c) is a product
            return Node("name", (), self.take().text)
        return self.parse_atom()

    def parse_atom(self) -> Node:
        token = self.token
        if token.kind == "number":
            return self._parse_number()
        if token.kind == "word":
            self.take()
            node = Node("name", (), token.text)
            if self.token.text == "(" and not self.token.space:
                return self.parse_application(node)
            if self.token.text == "[" and node.value in ("E", "P") and self.depth == 0:
                return self.parse_expectation(node)
            return node
        if token.text in ("(", "["):
            inside = self.nested(self.parse_brackets)
            is_composed = inside.kind == "index" and inside.args[-1] == Node("text", (), "of")
            if is_composed and self.token.text == "(":
                return self.parse_application(inside)
            return inside
        if token.text == "]" and self.depth == 0:  # ]0, 1[ as written in France
            return self.nested(self._parse_reversed_interval)
        if token.text == "{":
            self.take()
            return self.parse_brace("}")
        if token.text in ("\\{", "\\lbrace"):
            self.take()
            return self.parse_brace("\\}", "\\rbrace")
        if token.text in ("|", "\\lvert", "\\vert", "\\|", "\\lVert", "\\Vert"):
            return self._parse_bars()
        if token.kind == "command":
            return parse_command(self)
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
            return Node("number", (), read_repeating(digits, block))
        following = self.token, self.peek(), self.peek(2)
        if [t.kind for t in following] == ["number", "mark", "number"] and following[1].text == "/":
            return self._parse_mixed(digits)
        return Node("number", (), read_number(digits))

    def _parse_mixed(self, whole: str) -> Node:
        """``1 1/2``: a whole number, a space, a proper fraction."""
        top, _, bottom = self.take(), self.take(), self.take()
        part = [Node("number", (), read_number(t.text)) for t in (top, bottom)]
        mixed = join_factors(Node("number", (), read_number(whole)), Node("frac", tuple(part)))
        if mixed.kind != "add" or not top.space:
            raise ParseError("two numbers side by side")
        return Node("group", (mixed,))

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

    def parse_application(self, name: Node) -> Node:
        """``f(x)``: kept as written; what it means is decided where it is evaluated."""
        inside = self.nested(lambda: self.parse_brackets(in_application=True))
        if inside.kind == "tuple" and inside.value != "()":
            raise ParseError("not an argument list")
        if self.token.text in ("^", "**", "!"):  # x(x + 1)^2: only the bracket is squared
            return Node("mul", (name, self._parse_postfix(inside)), "juxtaposed")
        args = inside.args if inside.kind == "tuple" else (inside,)
        return Node("apply", (name, *args))

    def parse_expectation(self, name: Node) -> Node:
        """``E[X]``: the expectation of X."""
        inside = self.nested(lambda: self.parse_brackets(in_application=True))
        return Node("index", (name, inside, Node("text", (), "[]")))

    def parse_brackets(self, in_application: bool = False) -> Node:
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

    def parse_brace(self, *closers: str) -> Node:
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
