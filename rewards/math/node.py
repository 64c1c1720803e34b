"""The tree that an answer is parsed into, and how neighbours in it are joined."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple, cast

from rewards.math.lexer import ParseError
from rewards.text.units import find_scales


class Node(NamedTuple):
    """One node: ``kind``, its children, and what else distinguishes it (name, operators, ...).

    ``value`` is a str (of a name, text or sign), a ``Number``, a ``Unit`` or, of a relation, its
    operators. Children are nodes, but for the rows of a ``matrix`` (see ``rows_of``), and None for
    the left side of a unary ``pm`` and for missing bounds of a ``big`` operator.
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


def read_repeating(digits: str, block: str) -> Number:
    """``0.1\\overline{6}``: exactly 1/6."""
    start = read_number(digits)
    if not block.isdigit() or len(block) > 100:
        raise ParseError("not a repeating decimal")
    tail = Fraction(int(block), (10 ** len(block) - 1) * 10**start.decimals)
    return Number(start.value + tail, 0, 0)


def join_factors(left: Node, right: Node) -> Node:
    """Juxtaposition: a whole number before a proper fraction is a mixed number, else a product."""
    if left.kind == "number" and right.kind == "frac" and not left.value.decimals:
        top, bottom = right.args
        if top.kind == bottom.kind == "number" and top.value.value < bottom.value.value:
            return Node("add", (left, right), "done")  # a number, no sum to be worked out
    if left.kind == "number" and right.kind == "number":
        raise ParseError("two numbers side by side")
    return Node("mul", (left, right), "juxtaposed")


def add_subscript(base: Node, script: Node) -> Node:
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


MINUS_ONE = Node("neg", (Node("number", (), read_number("1")),))
