"""The checker's process: runs a test's code, in which the candidate's functions are stand-ins.

The report of how the tests went is written to a pipe that the candidate does not have.
"""

import ast
import builtins
import contextlib
import functools
import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from rewards.sandbox.inside.asserts import AssertCounter, find_module, refuse_helpers
from rewards.sandbox.inside.link import CandidateFunction, Link
from rewards.sandbox.inside.protocol import REPORT_FD, BadTests, Message, make_module


class Count:
    """Counts the asserts of the tests, each place in the source once, as they are executed.

    is_reached: something was asserted, or an exception that the tests expect was raised.
    """

    def __init__(self, stop_at_failure: bool):
        self._passed: set[int] = set()
        self._failed: set[int] = set()
        self.error = ""
        self.is_reached = False
        self.stop_at_failure = stop_at_failure

    @property
    def passed(self) -> int:
        return len(self._passed - self._failed)

    @property
    def failed(self) -> int:
        return len(self._failed)

    def note_pass(self, place: int) -> None:
        self.is_reached = True
        self._passed.add(place)

    def note_reached(self, value: object = None) -> object:
        self.is_reached = True
        return value

    def note_failure(self, place: int) -> None:
        """Called in the handler of an assert that failed; raises again if that ends the tests."""
        error = cast("BaseException", sys.exception())
        self.is_reached = True
        self._failed.add(place)
        self.note_error(error)
        if self.stop_at_failure or isinstance(error, BadTests):
            raise error

    def note_error(self, error: BaseException) -> None:
        self.error = self.error or _tell(error)


def _tell(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:
        return type(error).__name__


def run_checker(
    units: list[str], entry_point: str | None, prompt: str, stop_at_failure: bool, in_place: bool
) -> int:
    """Run the tests' code against the candidate at the other end, and report how it went."""
    link, count = Link(in_place), Count(stop_at_failure)
    report: Message = {"completed": False, "bad_tests": None}
    try:
        report["completed"] = _check(link, count, units, entry_point, prompt)
    except BadTests as error:
        report["bad_tests"] = str(error)
    except BaseException as error:
        count.note_error(error)
        if _is_failed_import(error):
            report["bad_tests"] = f"the tests need what the sandbox does not have: {error}"
    report |= {"passed": count.passed, "failed": count.failed, "error": count.error}
    report |= {"started": link.has_started, "gone": link.is_gone}
    if report["completed"] and not count.is_reached:
        report["completed"] = False
        count.error = "no assert was reached"
        if not link.is_asked:  # if it was, another candidate may reach them
            report["bad_tests"] = "the tests reach no assert and never call the candidate"
    report["error"] = count.error
    with os.fdopen(REPORT_FD, "w") as file:
        json.dump(report, file)
    return 0


def _check(
    link: Link, count: Count, units: list[str], entry_point: str | None, prompt: str
) -> bool:
    """Run the units one after another; say whether all of them ran to their end."""
    namespace = make_module("tests")
    trees = [ast.parse(unit) for unit in units]
    if prompt:  # helpers that the tests may use; the stub is replaced below
        with contextlib.suppress(Exception):
            exec(compile(prompt, "<prompt>", "exec", dont_inherit=True), namespace)
    _bind_names(namespace, trees, link, entry_point)
    namespace["__count__"] = count
    link.start()
    counter = AssertCounter()
    parts = [functools.partial(_execute, counter, tree, namespace) for tree in trees]
    completed = False not in [_run(part, count) for part in parts]
    tests = list(_list_tests(namespace, trees, link, entry_point))
    return False not in [_run(test, count) for test in tests] and completed


def _execute(counter: AssertCounter, tree: ast.Module, namespace: dict[str, Any]) -> None:
    tree = ast.fix_missing_locations(counter.visit(tree))
    exec(compile(tree, "<tests>", "exec", dont_inherit=True, optimize=0), namespace)


def _run(part: Callable[[], object], count: Count) -> bool:
    """Run a part of the tests; say whether it came to its end. Raise if that ends the others."""
    try:
        part()
    except Exception as error:
        if count.stop_at_failure or _is_failed_import(error):
            raise
        count.note_error(error)
        return False
    return True


def _is_failed_import(error: BaseException) -> bool:
    """Say whether an import of the tests has failed; an ImportError of the candidate's is bare."""
    return isinstance(error, ImportError) and error.name is not None


def _list_tests(
    namespace: dict[str, Any], trees: list[ast.Module], link: Link, entry_point: str | None
) -> Iterator[Callable[[], object]]:
    """Yield the calls still to make: HumanEval's ``check``, tests as pytest collects them."""
    if entry_point and defines_check(trees) and callable(namespace.get("check")):
        check, candidate = namespace["check"], CandidateFunction(link, entry_point)
        yield functools.partial(check, candidate)  # also if the tests have rebound its name
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for name in dict.fromkeys(defined):
        value = namespace.get(name)
        if getattr(value, "__module__", None) != "tests":
            continue
        if isinstance(value, type):
            yield from _list_methods(value, name in used)
        elif name in used:
            continue
        elif isinstance(value, types.FunctionType) and name.startswith("test"):
            wanted = [
                p.name for p in inspect.signature(value).parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]  # fmt: skip
            if {*wanted} <= {"candidate", entry_point}:
                yield functools.partial(value, *(namespace[name] for name in wanted))


def _list_methods(cls: type, is_used: bool) -> Iterator[Callable[[], object]]:
    unittest = sys.modules.get("unittest")
    if unittest and issubclass(cls, unittest.TestCase):
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(cls):
            yield functools.partial(_run_case, unittest, test)
    elif not is_used and cls.__name__.startswith("Test") and cls.__init__ is object.__init__:  # type: ignore[misc]  # not called
        for name in [n for n in dir(cls) if n.startswith("test") and callable(getattr(cls, n))]:
            yield functools.partial(_call_method, cls, name)


def _run_case(unittest: types.ModuleType, test: object) -> None:
    with contextlib.suppress(unittest.SkipTest):
        unittest.TestSuite([test]).debug()  # its class's and module's fixtures, too


def _call_method(cls: type, name: str) -> None:
    instance = cls()
    getattr(instance, "setup_method", int)()
    try:
        getattr(instance, name)()
    finally:
        getattr(instance, "teardown_method", int)()


def defines_check(trees: list[ast.Module]) -> bool:
    """Say whether the tests are HumanEval's: a function ``check`` to be given the candidate."""
    nodes = (n for tree in trees for part in tree.body for n in (part, *getattr(part, "body", ())))
    return any(isinstance(n, ast.FunctionDef) and n.name == "check" for n in nodes)


def _bind_names(
    namespace: dict[str, Any], trees: list[ast.Module], link: Link, entry_point: str | None
) -> None:
    """Bind the names that the tests use and do not define to the candidate's functions.

    Modules are this process's own: a test's ``math.isclose`` must not be the candidate's.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    defined = set(namespace) | set(vars(builtins)) | sys.stdlib_module_names
    for name in used - set(namespace) - set(vars(builtins)):
        module = find_module(name, nodes) if name != entry_point else None
        namespace[name] = module or CandidateFunction(link, name)
    if entry_point:
        root = next(n.id for n in ast.walk(ast.parse(entry_point)) if isinstance(n, ast.Name))
        refuse_helpers(trees, used - defined, {root, "candidate"})
        namespace[entry_point] = namespace["candidate"] = CandidateFunction(link, entry_point)
