"""Runs inside the sandbox: a reasoning-gym task's own scorer on one answer.

Some of these scorers pass the answer to ``eval``, or to sympy's ``parse_expr``, which is an eval.
The sandbox bounds what that can do; what it must not do even there is to change the verdict. So an
answer to such a task that is more than the task's kind of answer is wrong before it gets there.
"""

import ast
import json
import re

from rewards.sandbox.inside.protocol import Message

LITERAL_TASKS = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
"""Tasks that call eval on an answer, which may be a list of lists."""
EXPRESSION_TASKS = {
    "simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24",
    "countdown",
}  # fmt: skip
"""Tasks that call parse_expr on an answer, which is a formula."""
TUPLE_TASKS = {"arc_agi", "rearc"}
"""Tasks whose scorers compare with tuples, which JSON has turned into lists."""

MAX_CHARS = 20_000
_LITERAL_NODES = (
    ast.Expression, ast.List, ast.Tuple, ast.Set, ast.Constant, ast.Name, ast.Load, ast.UnaryOp,
    ast.USub, ast.UAdd,
)  # fmt: skip
_FORMULA = re.compile(r"[\w\s+\-*/^().,]*", re.ASCII)
_NAME = re.compile(r"[^\W\d]\w*", re.ASCII)
_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp",
    "log", "ln", "sqrt", "pi", "Abs",
}  # fmt: skip
_ATTRIBUTE = re.compile(r"[\w)]\s*\.\s*[A-Za-z_]")


def score_answer(task: str, config: Message, entry: Message, answer: str) -> int:
    """Print the score as JSON, ``{"score": 0.0 to 1.0}``; return the exit status."""
    score = 0.0
    if is_plain(task, answer):
        import reasoning_gym

        if task in TUPLE_TASKS:
            entry = {**entry, "metadata": _make_tuples(entry["metadata"])}
        dataset = reasoning_gym.create_dataset(task, **config, size=1, seed=0)
        score = float(dataset.score_answer(answer, entry))
    print(json.dumps({"score": min(1.0, max(0.0, score))}), flush=True)
    return 0


def is_plain(task: str, answer: str) -> bool:
    """Say whether an answer may be given to a task's scorer: it holds no program for its eval."""
    if len(answer) > MAX_CHARS:
        return False
    if task in LITERAL_TASKS:
        try:
            tree = ast.parse(answer.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return True  # eval raises, too
        return all(isinstance(node, _LITERAL_NODES) for node in ast.walk(tree))
    if task in EXPRESSION_TASKS:
        names = set(_NAME.findall(answer))
        return (
            _FORMULA.fullmatch(answer) is not None
            and _ATTRIBUTE.search(answer) is None
            and all(len(name) == 1 or name in _FUNCTIONS for name in names)
        )
    return True


def _make_tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _make_tuples(part) for key, part in value.items()}
    return tuple(map(_make_tuples, value)) if isinstance(value, list) else value
