"""The ``tests`` column of a code dataset: what is accepted, read into one of two records."""

import ast
import builtins
import functools
import json
from collections.abc import Mapping
from typing import NamedTuple


class BadTestsError(ValueError):
    """Tests that cannot be used. The message says why, in one line."""


class FunctionTests(NamedTuple):
    """Python code that calls the candidate: each of ``units`` is executed, in one namespace.

    entry_point: the function's name, if it is known. prompt: the code that the problem begins
    with, up to the function's body; "" if there is none. in_place: a call's changes to its
    arguments reach the test even if the call returns a value.
    """

    units: tuple[str, ...]
    entry_point: str | None = None
    prompt: str = ""
    in_place: bool = False

    @property
    def num_asserts(self) -> int:
        """How many asserts are written down; a loop may execute one many times."""
        return sum(isinstance(node, ast.Assert) for node in _list_nodes(self.units))

    @property
    def called(self) -> str | None:
        """The name of the function under test: the entry point, or what is called first."""
        if self.entry_point:
            return self.entry_point
        calls = (node.func for node in _list_nodes(self.units) if isinstance(node, ast.Call))
        names = (call.id for call in calls if isinstance(call, ast.Name))
        return next((name for name in names if not hasattr(builtins, name)), None)


class ProgramTests(NamedTuple):
    """Standard inputs, and the outputs that are expected for them."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prompt: str = ""
    called: str | None = None


def read_tests(tests: object) -> FunctionTests | ProgramTests:
    """Read one cell of the column: a dict, or JSON of one. Raises ``BadTestsError``.

    - ``{"entry_point": name, "code": "..."}``: HumanEval's, where the code defines
      ``check(candidate)``, or plain asserts that call the function by its name.
    - ``{"test_list": ["assert ...", ...]}``: MBPP's, with ``test_setup_code`` or ``test_imports``
      if need be; ``entry_point`` is optional in it and with plain asserts.
    - ``{"inputs": [text, ...], "outputs": [text, ...]}``: what a program reads and prints.

    The first two may have a ``prompt``, the code that a completion continues, and ``in_place``.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise BadTestsError(f"not JSON: {error}") from error
    if not isinstance(tests, Mapping):
        raise BadTestsError(f"neither an object nor JSON of one, but {type(tests).__name__}")
    # A table's other forms may be there, too, empty or None.
    has_code = tests.get("code") or tests.get("test_list")
    has_texts = tests.get("inputs") is not None or tests.get("outputs") is not None
    return _read_program_tests(tests) if has_texts and not has_code else _read_function_tests(tests)


def _read_program_tests(tests: Mapping) -> ProgramTests:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    for name, texts in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise BadTestsError(f"{name!r} is not a list of strings")
    if len(inputs) != len(outputs) or not inputs:
        raise BadTestsError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    return ProgramTests(tuple(inputs), tuple(outputs))


def _read_function_tests(tests: Mapping) -> FunctionTests:
    entry_point, prompt = tests.get("entry_point"), tests.get("prompt")
    for name, value in (("entry_point", entry_point), ("prompt", prompt)):
        if value is not None and not isinstance(value, str):
            raise BadTestsError(f"{name!r} is not a string")
    units = _read_units(tests)
    try:
        trees = [ast.parse(unit) for unit in units]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTestsError(f"the tests are not Python: {error}") from error
    if not any(isinstance(node, ast.Assert | ast.Raise) for node in _list_nodes(units)):
        raise BadTestsError("the tests assert nothing")
    has_check = any(
        isinstance(n, ast.FunctionDef) and n.name == "check" for t in trees for n in t.body
    )
    if has_check and not entry_point:
        raise BadTestsError("check() without an 'entry_point' to be checked")
    return FunctionTests(units, entry_point or None, prompt or "", bool(tests.get("in_place")))


def _read_units(tests: Mapping) -> tuple[str, ...]:
    """Return the pieces of test code; the set-up, if any, is the first."""
    imports, setup = tests.get("test_imports") or [], tests.get("test_setup_code") or ""
    asserts = tests.get("test_list") or [tests.get("code")]
    parts = [imports if isinstance(imports, list) else [imports], [setup], asserts]
    if not isinstance(asserts, list | tuple) or not all(
        isinstance(u, str) for p in parts for u in p
    ):
        raise BadTestsError("neither 'inputs' nor 'code' nor a 'test_list' of strings")
    units = [unit for part in parts for unit in part]
    return tuple(unit for unit in units if unit.strip())


@functools.lru_cache(maxsize=64)  # asked for each completion of a group
def _list_nodes(units: tuple[str, ...]) -> tuple[ast.AST, ...]:
    return tuple(node for unit in units for node in ast.walk(ast.parse(unit)))
