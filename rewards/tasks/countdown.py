"""Countdown: does an expression make the target of exactly the given numbers?

The expression is read by Python's parser, which runs nothing, and computed here with fractions:
only + - * / of whole numbers are known, and its length is bounded.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction

from rewards.text.answers import extract_answer
from rewards.text.completions import Completion, completion_text

MAX_CHARS = 300
_SIGNS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-"}


def countdown_correct(
    completions: Sequence[Completion], tests: Sequence[object], **kwargs: object
) -> list[float | None]:
    """Return 1.0 where the answer's expression has the value ``target`` and uses each of
    ``numbers`` exactly once, else 0.0.

    ``tests`` is the dataset's column: {"numbers": [...], "target": n}, or JSON of it; None where it
    is not that. An equation counts by its left side: ``3 * 4 = 12``.
    """
    if len(completions) != len(tests):
        raise ValueError(f"{len(completions)} completions but {len(tests)} tests")
    return [_judge(completion_text(c), _read(t)) for c, t in zip(completions, tests)]


def _read(tests: object) -> tuple[list[int], int] | None:
    try:
        tests = json.loads(tests) if isinstance(tests, str) else tests
    except ValueError:
        return None
    if not isinstance(tests, Mapping):
        return None
    numbers, target = tests.get("numbers"), tests.get("target")
    if not isinstance(numbers, list) or type(target) is not int:
        return None
    return (numbers, target) if all(type(number) is int for number in numbers) else None


def _judge(text: str, task: tuple[list[int], int] | None) -> float | None:
    if task is None:
        return None
    numbers, target = task
    answer = extract_answer(text)
    if answer is None or len(answer) > MAX_CHARS:
        return 0.0
    for sign, plain in _SIGNS.items():
        answer = answer.replace(sign, plain)
    try:
        used: list[int] = []
        value = _compute(ast.parse(answer.partition("=")[0].strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(value == target and sorted(used) == sorted(numbers))


def _compute(node: ast.expr, used: list[int]) -> Fraction:
    """Return the value of an expression, adding its numbers to ``used``."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_compute(node.operand, used)
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, right = _compute(node.left, used), _compute(node.right, used)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError("another operator")
