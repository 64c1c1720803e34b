"""Find the program in a completion. One extractor for every kind of test.

In this order, and only outside the thinking:

1. the last fenced block that is marked as Python (``python``, ``py``, ``python3``) and defines
   the entry point, if one is known;
2. the last block marked as Python;
3. the last block without a mark that is Python, entry point first again;
4. a text without any fence that is Python as a whole and does something: more than names,
   numbers and strings, which prose may be, too;
5. with a ``prompt`` (HumanEval), a text that begins with white space and continues it.

A fence that is never closed runs to the end. What is found may be a whole program, or, with a
prompt, the body of the function that the prompt begins: then it is put behind it. A program that
defines the entry point itself is put behind the prompt as well, whose imports and helpers it may
use; so the prompt's own stub is replaced.
"""

import ast
import re
import textwrap
import warnings

from rewards.completions import split_thinking

MAX_CHARS = 200_000

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<mark>[\w+.#-]*)[^\n`]*\n"
    r"(?P<body>.*?)(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_PYTHON_MARKS = {"python", "py", "python3"}


def extract_code(text: str, entry_point: str | None = None, prompt: str = "") -> str | None:
    """Return the program that a completion gives, ready to be run; None if there is none."""
    text = split_thinking(text)[1]
    if len(text) > MAX_CHARS:
        return None
    code = _find_code(text, entry_point, prompt)
    return None if code is None else _join(prompt, code, entry_point)


def _find_code(text: str, entry_point: str | None, prompt: str) -> str | None:
    blocks = [
        (m["mark"].lower(), textwrap.dedent(m["body"]) if m["indent"] else m["body"])
        for m in _FENCE.finditer(text)
    ]
    marked = [body for mark, body in blocks if mark in _PYTHON_MARKS and body.strip()]
    if marked:
        return _choose(marked, entry_point)
    unmarked = [body for mark, body in blocks if not mark and is_program(body, prompt)]
    if unmarked:
        return _choose(unmarked, entry_point)
    if blocks:
        return None
    return text if is_program(text, prompt) else None


def _choose(blocks: list[str], entry_point: str | None) -> str:
    defining = [body for body in blocks if entry_point and defines(body, entry_point)]
    return (defining or blocks)[-1]


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings are theirs
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_program(text: str, prompt: str = "") -> bool:
    """Say whether a text is code: Python that does something, or the rest of the prompt."""
    tree = _parse(text)
    if tree is not None:
        return any(not _is_idle(statement) for statement in tree.body)
    return bool(prompt) and text[:1].isspace() and _parse(prompt + text) is not None


def _is_idle(statement: ast.stmt) -> bool:
    """Say whether a statement only mentions things, as a line of prose or an answer would."""
    if isinstance(statement, ast.AnnAssign):  # "Answer: 42"
        return statement.value is None
    if not isinstance(statement, ast.Expr):
        return False
    return not any(isinstance(node, ast.Call) for node in ast.walk(statement))


def defines(code: str, name: str) -> bool:
    """Say whether ``code`` gives ``name`` a value at its top level."""
    tree = _parse(code)
    return tree is not None and any(name in _bound_names(statement) for statement in tree.body)


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.If | ast.Try | ast.With):
        return {
            n.id
            for n in ast.walk(statement)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        } | {n.name for n in ast.walk(statement) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return set()


def _join(prompt: str, code: str, entry_point: str | None) -> str:
    """Return the code with what it needs of the prompt in front of it."""
    if not prompt:
        return code
    if entry_point and defines(code, entry_point):
        return f"{prompt}\n\n{code}" if _parse(prompt) else code
    for body in (code, textwrap.indent(code, "    ")):
        if body[:1].isspace() and _parse(prompt + body):
            return prompt + body
    return code
