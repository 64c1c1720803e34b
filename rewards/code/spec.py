"""The ``tests`` column of a code dataset: its forms, read into one of two records."""

import ast
import builtins
import functools
import inspect
import json
import re
import symtable
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rewards.code.reach import asserts_something


class BadTestsError(ValueError):
    """Tests that cannot be used. The message says why, in one line."""


# The imports that LeetCode, LiveCodeBench and APPS put before a solution.
_MODULES = "typing collections heapq bisect itertools functools math string operator re random copy"
JUDGE_SETUP = "\n".join(f"from {m} import *\nimport {m}" for m in _MODULES.split()) + (
    "\nfrom datetime import *\nimport datetime, json, sys, statistics"
)


Tests = Mapping[str, Any]  # one cell of the column


class FunctionTests(NamedTuple):
    """Python code that calls the candidate: each of ``units`` is executed, in one namespace.

    entry_point: the function, if it is known: a name, which may be that of a method of a class
    ``Solution``, or an expression such as ``Solution().solve``. prompt: the code that the problem
    begins with, up to the function's body; "" if there is none. in_place: a call's changes to its
    arguments reach the test even if the call returns a value. setup: code with names that
    a solution may use without defining them.
    """

    units: tuple[str, ...]
    entry_point: str | None = None
    prompt: str = ""
    in_place: bool = False
    setup: str = ""

    @property
    def num_asserts(self) -> int:
        """How many asserts are written down; a loop may execute one many times."""
        return sum(isinstance(node, ast.Assert) for node in _list_nodes(self.units))

    @property
    def called(self) -> str | None:
        """The name that a solution has to define: the entry point's, or what is called first."""
        if self.entry_point:
            return _find_root(self.entry_point).id
        calls = (node.func for node in _list_nodes(self.units) if isinstance(node, ast.Call))
        names = [call.id for call in calls if isinstance(call, ast.Name)]
        asked = list_asked_names(self.units)
        return next((name for name in names if name in asked), min(asked, default=None))


class ProgramTests(NamedTuple):
    """Standard inputs, and the outputs that are expected for them."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prompt: str = ""
    called: str | None = None
    setup: str | None = None


def read_tests(tests: object) -> FunctionTests | ProgramTests:
    """Read one cell of the column: a dict, or JSON of one. Raises ``BadTestsError``.

    - ``{"entry_point": name, "code": "..."}``: HumanEval's, where the code defines
      ``check(candidate)``, or plain asserts that call the function by its name.
    - ``{"test_list": ["assert ...", ...]}``: MBPP's, with ``test_setup_code`` or ``test_imports``
      if need be; ``entry_point`` is optional in it and with plain asserts.
    - ``{"fn_name": name, "inputs": [...], "outputs": [...]}``: APPS's, TACO's and LiveCodeBench's
      calls of a function or of a method of ``Solution``. An input is a list of arguments, or text
      with the JSON of one on each line; then the output is JSON, too. The name may also be the
      ``func_name`` in ``metadata``, or ``entry_point``.
    - ``{"inputs": [text, ...], "outputs": [text, ...]}``: what a program reads and prints.

    The others may have a ``prompt``, the code that a completion continues, and the first two
    ``in_place``.
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
    if not has_texts or has_code:
        return _read_function_tests(tests)
    name = _find_function_name(tests)
    return _read_call_tests(tests, name) if name else _read_program_tests(tests)


def _find_function_name(tests: Tests) -> str | None:
    """Return the name of the function that ``inputs`` are for; None if a program reads them."""
    metadata, kind = tests.get("metadata"), str(tests.get("testtype") or "").lower()
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            metadata = None
    metadata = metadata if isinstance(metadata, Mapping) else {}
    names = [metadata.get("func_name"), metadata.get("fn_name"), tests.get("entry_point")]
    name = next(filter(None, [tests.get("fn_name"), tests.get("func_name"), *names]), None)
    if kind in ("stdin", "stdin_stdout"):
        return None
    if name is None and kind == "functional":
        raise BadTestsError("the tests are functional, but there is no 'fn_name'")
    if name is not None and not isinstance(name, str):
        raise BadTestsError("'fn_name' is not a string")
    return name


def _check_pairs(tests: Tests) -> tuple[Sequence[Any], Sequence[Any]]:
    inputs: Any = tests.get("inputs")
    outputs: Any = tests.get("outputs")
    for name, values in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(values, list | tuple):
            raise BadTestsError(f"{name!r} is not a list")
    if len(inputs) != len(outputs) or not inputs:
        raise BadTestsError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    return inputs, outputs


def _read_call_tests(tests: Tests, name: str) -> FunctionTests:
    inputs, outputs = _check_pairs(tests)
    # Many outputs of APPS and TACO are wrapped in a list, without a mark.
    may_unwrap = all(isinstance(i, list | tuple) for i in inputs) and all(
        isinstance(o, list | tuple) and len(o) == 1 for o in outputs
    )
    units = ["import json\n" + inspect.getsource(is_same_value)]
    for number, (given, wanted) in enumerate(zip(inputs, outputs), 1):
        try:
            arguments = _read_arguments(given)
            goal = _read_value(wanted) if isinstance(given, str) else wanted
            texts = _write(arguments), _write(goal)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise BadTestsError(f"test {number} of {name}: {error}"[:300]) from error
        call = "candidate(*{}), {}".format(*texts)
        units.append(f"assert is_same_value({call}, {may_unwrap})")
    entry_point, prompt = _check_entry_point(name), tests.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise BadTestsError("'prompt' is not a string")
    return FunctionTests(tuple(units), entry_point, prompt or "", setup=JUDGE_SETUP)


def _read_arguments(given: object) -> list[object]:
    if isinstance(given, str):
        try:
            return [_read_value(line) for line in given.split("\n") if line.strip()]
        except (ValueError, SyntaxError):
            return [json.loads(given)]  # one, over several lines
    if isinstance(given, Mapping):
        raise ValueError("an input is an object, neither a list of arguments nor their JSON")
    arguments = given if isinstance(given, list | tuple) else [given]
    return [_restore_keys(argument) for argument in arguments]


def _read_value(text: object) -> object:
    """Read JSON, or a literal of Python's: some data sets have ``True`` and ``'a'``."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"{text[:80]!r} is not JSON: {error}") from None


def _restore_keys(value: object) -> object:
    """Restore integer keys that JSON made strings, as APPS's own judge does."""
    if isinstance(value, dict) and all(re.fullmatch(r"-?[0-9]+", str(key)) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _write(value: object) -> str:
    """Return Python source for JSON data: one string, since long lists parse slowly."""
    text = json.dumps(value)
    return repr(value) if json.loads(text) != value else f"json.loads({text!r})"


def is_same_value(value: "Any", goal: "Any", may_unwrap: bool = False) -> bool:
    """Compare a result with JSON data: tuples are lists, keys strings, fractions within 1e-6."""
    if may_unwrap and is_same_value(value, goal[0]):
        return True
    if isinstance(goal, list):
        same_size = isinstance(value, list | tuple) and len(value) == len(goal)
        return same_size and all(map(is_same_value, value, goal))
    if isinstance(goal, dict):
        if not isinstance(value, dict):
            return False
        value = {k if isinstance(k, str) else json.dumps(k): v for k, v in value.items()}
        return value.keys() == goal.keys() and all(is_same_value(value[k], goal[k]) for k in goal)
    if isinstance(goal, float) and isinstance(value, int | float) and value != goal:
        is_tiny = 0 < abs(goal) < 1e-6
        return bool(abs(value - goal) <= (1e-12 if is_tiny else 1e-6 * max(1.0, abs(goal))))
    return bool(value == goal)


def _read_program_tests(tests: Tests) -> ProgramTests:
    inputs, outputs = _check_pairs(tests)
    for name, texts in (("inputs", inputs), ("outputs", outputs)):
        if not all(isinstance(text, str) for text in texts):
            raise BadTestsError(f"{name!r} is not a list of strings")
    return ProgramTests(tuple(inputs), tuple(outputs))


def _read_function_tests(tests: Tests) -> FunctionTests:
    entry_point, prompt = tests.get("entry_point"), tests.get("prompt")
    for name, value in (("entry_point", entry_point), ("prompt", prompt)):
        if value is not None and not isinstance(value, str):
            raise BadTestsError(f"{name!r} is not a string")
    units = _read_units(tests)
    try:
        trees = [ast.parse(unit) for unit in units]
        asked = list_asked_names(units)
        is_idle = not asserts_something(units)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTestsError(f"the tests are not Python: {error}") from error
    if is_idle:
        raise BadTestsError("the tests assert nothing that can be reached")
    has_check = any(
        isinstance(n, ast.FunctionDef) and n.name == "check" for t in trees for n in t.body
    )
    if has_check and not entry_point:
        raise BadTestsError("check() without an 'entry_point' to be checked")
    setup = "\n".join(_read_setup(tests))
    function = _check_entry_point(entry_point) if entry_point else None
    read = FunctionTests(units, function, prompt or "", bool(tests.get("in_place")), setup)
    arguments = {node.arg for node in _list_nodes(units) if isinstance(node, ast.arg)}
    is_given = function is not None and not arguments.isdisjoint(("candidate", function))
    if not has_check and not asked and not is_given:
        builtin = None if function else _find_called_builtin(units)
        if builtin is None:
            raise BadTestsError("the tests call nothing but what they define themselves")
        return read._replace(entry_point=builtin)
    # The prompt's stub has the same name and must not be what is tested.
    return read._replace(entry_point=read.called) if prompt and not function else read


@functools.lru_cache(maxsize=64)
def list_asked_names(units: tuple[str, ...]) -> set[str]:
    """Return the names that test code uses and neither it nor Python defines."""
    used, defined = set(), set(vars(builtins))
    for unit in units:
        tables = [symtable.symtable(unit, "<tests>", "exec")]
        for table in tables:
            tables += table.get_children()
            is_outermost = table.get_type() == "module"
            for symbol in table.get_symbols():
                if is_outermost or symbol.is_global():
                    if symbol.is_referenced():
                        used.add(symbol.get_name())
                    if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                        defined.add(symbol.get_name())
    nodes = _list_nodes(units)
    bases = [
        n.value for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    ]
    num_bases = Counter(base.id for base in bases)  # as in math.pi
    num_uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    modules = {n for n in num_bases.keys() & sys.stdlib_module_names if num_bases[n] == num_uses[n]}
    return used - defined - modules


def _find_called_builtin(units: tuple[str, ...]) -> str | None:
    """Return what the first assert calls: a function may be named ``sum``, as one of MBPP's is."""
    asserts = [node for node in _list_nodes(units) if isinstance(node, ast.Assert)]
    calls = (n for node in asserts for n in ast.walk(node.test) if isinstance(n, ast.Call))
    names = (call.func.id for call in calls if isinstance(call.func, ast.Name))
    return next((name for name in names if hasattr(builtins, name)), None)


def _check_entry_point(name: str) -> str:
    """Return a name, or a method such as ``Solution().solve``. Raises ``BadTestsError``."""
    try:
        function = ast.parse(name.strip(), mode="eval").body
        if isinstance(function, ast.Name | ast.Attribute):
            _find_root(name)
            return ast.unparse(function)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise BadTestsError(f"the entry point {name[:80]!r} is no name, nor like Solution().solve")


def _find_root(entry_point: str) -> ast.Name:
    node = ast.parse(entry_point.strip(), mode="eval").body
    while not isinstance(node, ast.Name):
        if not isinstance(node, ast.Attribute | ast.Call):
            raise ValueError(entry_point)
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def _read_setup(tests: Tests) -> list[Any]:
    imports, setup = tests.get("test_imports") or [], tests.get("test_setup_code") or ""
    return [*(imports if isinstance(imports, list) else [imports]), setup]


def _read_units(tests: Tests) -> tuple[str, ...]:
    """Return the pieces of test code; the set-up, if any, is the first."""
    asserts = tests.get("test_list") or [tests.get("code")]
    parts = [_read_setup(tests), asserts]
    if not isinstance(asserts, list | tuple) or not all(
        isinstance(u, str) for p in parts for u in p
    ):
        raise BadTestsError("neither 'inputs' nor 'code' nor a 'test_list' of strings")
    units = [unit for part in parts for unit in part]
    return tuple(unit for unit in units if unit.strip())


@functools.lru_cache(maxsize=64)  # asked for each completion of a group
def _list_nodes(units: tuple[str, ...]) -> tuple[ast.AST, ...]:
    return tuple(node for unit in units for node in ast.walk(ast.parse(unit)))
