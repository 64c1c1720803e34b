"""A calculator for models: exact, without evaluating what they wrote."""

import ast
import contextlib
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 300
MAX_BITS = 4000
"""Of a numerator or denominator."""

MAX_TRIES = 20

OPERATORS: dict[type[ast.AST], Callable[..., Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
SIGNS = {"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: Numbers, + - * / // % ** and parentheses, such as (3 + 4) * 12.
    """
    text = str(expression)
    if len(text) > MAX_CHARS:
        raise ValueError(f"the expression has more than {MAX_CHARS} characters")
    for sign, plain in SIGNS.items():
        text = text.replace(sign, plain)
    try:
        value = compute(parse(text.strip()), text.strip())
    except SyntaxError as error:
        raise ValueError(f"not an arithmetic expression: {text}") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.12g}"
    except OverflowError as error:
        raise ValueError("the result is too large") from error


def parse(text: str) -> ast.expr:
    """Tools run in threads, and in Python 3.11 threads that parse at the same time may be told of a
    "recursion depth mismatch", whatever their texts."""
    for _ in range(MAX_TRIES):
        with contextlib.suppress(SystemError):
            return ast.parse(text, mode="eval").body
    return ast.parse(text, mode="eval").body


def compute(node: ast.AST, text: str) -> Fraction:
    """Raises ValueError for anything but arithmetic, and for numbers of more than MAX_BITS."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            value = Fraction(ast.get_source_segment(text, node) or "")
        case ast.BinOp(op=ast.Pow()):
            value = power(compute(node.left, text), compute(node.right, text))
        case ast.BinOp() if type(node.op) in OPERATORS:
            value = Fraction(
                OPERATORS[type(node.op)](compute(node.left, text), compute(node.right, text))
            )
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            value = Fraction(OPERATORS[type(node.op)](compute(node.operand, text)))
        case _:
            raise ValueError(f"not arithmetic: {ast.get_source_segment(text, node)}")
    return check_size(value)


def power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("only whole exponents")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > MAX_BITS and base not in (0, 1, -1):
        raise ValueError("the result is too large")
    return Fraction(base**exponent.numerator)


def check_size(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the result is too large")
    return value
