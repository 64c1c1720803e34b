"""The checker's process: runs a test's code, in which the candidate's functions are stand-ins.

A stand-in asks the candidate's process; arguments and results cross as plain data. The report of
how the tests went is written to a pipe that the candidate does not have.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import json
import os
import sys
import types

from rewards.code_protocol import (
    CHANNEL_FD,
    REPORT_FD,
    CandidateError,
    describe,
    make_exception,
    make_module,
)
from rewards.plain_data import (
    MUTABLE,
    PlainDataError,
    decode,
    encode,
    receive_frame,
    send_frame,
)


class CandidateGone(CandidateError):
    """The candidate's process has ended, or does not keep to the protocol."""


class Link:
    """The checker's end of the channel. ``error`` is what the candidate raised last."""

    def __init__(self, in_place: bool):
        self.in_place = in_place
        self.functions: list[object] = []
        self.objects: dict[int, CandidateObject] = {}
        self.error: BaseException | None = None
        self.has_started = self.is_gone = False

    def start(self) -> None:
        """Wait until the candidate's code has run; raise what it raised."""
        self._receive()
        self.has_started = True

    def ask(self, target: str | int, do: str, **details) -> dict:
        self._send({"target": target, "do": do, **details})
        return self._receive()

    def call(self, target: str | int, args: tuple, kwargs: dict) -> object:
        reply = self.ask(
            target,
            "call",
            args=[encode(arg, self._refer) for arg in args],
            kwargs={name: encode(value, self._refer) for name, value in kwargs.items()},
            in_place=self.in_place,
        )
        value = self.read(reply)
        if value is None or self.in_place:
            mutable = [a for a in (*args, *kwargs.values()) if isinstance(a, MUTABLE)]
            for argument, new in zip(mutable, reply.get("changed", ())):
                _restore(argument, self._decode(new))
        return value

    def read(self, reply: dict) -> object:
        return self._decode(reply.get("value"))

    def encode(self, value: object) -> object:
        return encode(value, self._refer)

    def _decode(self, data: object) -> object:
        try:
            return decode(data, self._resolve)
        except PlainDataError as error:
            raise self._lose(error) from None

    def _send(self, message: dict) -> None:
        if self.is_gone:
            raise self._lose("it has ended")
        try:
            send_frame(CHANNEL_FD, message)
        except OSError as error:
            raise self._lose(error) from None

    def _receive(self) -> dict:
        while True:
            try:
                message = receive_frame(CHANNEL_FD)
            except (EOFError, OSError, PlainDataError) as error:
                raise self._lose(error) from None
            if not isinstance(message, dict):
                raise self._lose("a message is not an object")
            if "callback" in message:
                self._send(self._call_back(message))
            elif "raised" in message:
                raised = message["raised"]
                well_formed = isinstance(raised, list) and len(raised) == 2
                self.error = make_exception(*raised if well_formed else ("Exception", ""))
                raise self.error
            else:
                return message

    def _call_back(self, message: dict) -> dict:
        number, args = message["callback"], message.get("args")
        if not isinstance(number, int) or not 0 <= number < len(self.functions):
            raise self._lose("a function is called that was never passed")
        try:
            return {"value": self.encode(self.functions[number](*self._decode(args or [])))}
        except CandidateGone:
            raise
        except Exception as error:
            return describe(error)

    def _lose(self, reason: object) -> CandidateGone:
        self.is_gone = True
        self.error = CandidateGone(str(reason))
        return self.error

    def _refer(self, value: object) -> dict:
        if isinstance(value, CandidateObject):
            return {"object": value._number}
        if isinstance(value, CandidateIterator):
            return {"iterator": value._number}
        if isinstance(value, types.FunctionType | functools.partial):
            self.functions.append(value)
            return {"callback": len(self.functions) - 1}
        raise BadTests(f"the tests pass a {type(value).__name__}, which cannot cross")

    def _resolve(self, key: str, content: object) -> object:
        if type(content) is not int or content < 0:
            raise PlainDataError("a reference is not a number")
        if key == "object":
            return self.objects.setdefault(content, CandidateObject(self, content))
        if key == "iterator":
            return CandidateIterator(self, content)
        if key == "callback" and content < len(self.functions):
            return self.functions[content]
        raise PlainDataError(f"a value of unknown type {key!r}")


class CandidateFunction:
    """Stands for a function or class that the candidate defines under a name. Can be called."""

    def __init__(self, link: Link, name: str):
        self._link, self._name = link, name

    def __call__(self, *args, **kwargs):
        return self._link.call(self._name, args, kwargs)


class CandidateObject:
    """Stands for an object of the candidate's: it can be called and has attributes.

    It equals nothing but itself, whatever the object overrides, and has no length, order, items
    or members: tests that compare have to get at plain data.
    """

    def __init__(self, link: Link, number: int):
        vars(self).update(_link=link, _number=number)

    def __call__(self, *args, **kwargs):
        return self._link.call(self._number, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.read(self._link.ask(self._number, "get", name=name))

    def __setattr__(self, name: str, value: object) -> None:
        self._link.ask(self._number, "set", name=name, value=self._link.encode(value))


class CandidateIterator:
    """Stands for a generator or the like of the candidate's: it can be gone through once."""

    def __init__(self, link: Link, number: int):
        self._link, self._number, self._ended = link, number, False

    def __iter__(self):
        return self

    def __next__(self):
        reply = {"stop": True} if self._ended else self._link.ask(self._number, "next")
        if "stop" in reply:
            self._ended = True
            raise StopIteration
        return self._link.read(reply)


def _restore(old: object, new: object) -> None:
    """Give an argument the contents that the candidate left in its own copy of it."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        pairs = zip(old, new)
        kept = [_restored(before, after) for before, after in pairs]
        old[:] = kept + new[len(kept) :]
    elif isinstance(old, dict):
        changed = {key: _restored(old.get(key), after) for key, after in new.items()}
        old.clear()
        old.update(changed)
    elif isinstance(old, bytearray):
        old[:] = new
    else:
        old.clear()
        (old.update if isinstance(old, set) else old.extend)(new)


def _restored(old: object, new: object) -> object:
    if isinstance(old, MUTABLE) and type(old) is type(new):
        _restore(old, new)
        return old
    return new


class BadTests(BaseException):
    """The tests ask for something that cannot be done here, whatever the candidate is.

    Not an Exception, so that a test which expects one does not take it for the candidate's.
    """


class Count:
    """Counts the asserts of the tests as they are executed."""

    def __init__(self, stop_at_failure: bool):
        self.passed = self.failed = 0
        self.error = ""
        self.stop_at_failure = stop_at_failure

    def note_pass(self) -> None:
        self.passed += 1

    def note_failure(self) -> None:
        """Called in the handler of an assert that failed; raises again if that ends the tests."""
        error = sys.exception()
        self.failed += 1
        self.error = self.error or _tell(error)
        if self.stop_at_failure or isinstance(error, BadTests):
            raise error


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
    report = {"completed": False, "bad_tests": None}
    try:
        report["completed"] = _check(link, count, units, entry_point, prompt)
    except BadTests as error:
        report["bad_tests"] = str(error)
    except BaseException as error:
        count.error = count.error or _tell(error)
        if isinstance(error, ImportError) and error is not link.error:
            report["bad_tests"] = f"the tests need what the sandbox does not have: {error}"
    report |= {"passed": count.passed, "failed": count.failed, "error": count.error}
    report |= {"started": link.has_started, "gone": link.is_gone}
    with os.fdopen(REPORT_FD, "w") as file:
        json.dump(report, file)
    return 0


def _check(link: Link, count: Count, units: list, entry_point: str | None, prompt: str) -> bool:
    """Run the units one after another; say whether all of them ran to their end."""
    namespace = make_module("tests")
    trees = [ast.parse(unit) for unit in units]
    if prompt:  # the problem's own helpers, which the tests may use; its stub is replaced below
        with contextlib.suppress(Exception):
            exec(compile(prompt, "<prompt>", "exec", dont_inherit=True), namespace)
    _bind_names(namespace, trees, link, entry_point)
    namespace["__count__"] = count
    link.start()
    completed = True
    for tree in trees:
        try:
            code = compile(_count_asserts(tree), "<tests>", "exec", dont_inherit=True, optimize=0)
            exec(code, namespace)
        except Exception as error:
            if count.stop_at_failure or (
                isinstance(error, ImportError) and error is not link.error
            ):
                raise
            count.error = count.error or _tell(error)
            completed = False
    if entry_point and defines_check(trees):
        namespace["check"](CandidateFunction(link, entry_point))  # whatever has its name by now
    return completed


def defines_check(trees: list[ast.Module]) -> bool:
    """Say whether the tests are HumanEval's: a function ``check`` to be given the candidate."""
    return any(isinstance(n, ast.FunctionDef) and n.name == "check" for t in trees for n in t.body)


def _bind_names(namespace: dict, trees: list, link: Link, entry_point: str | None) -> None:
    """Let the names that the tests use and nobody defines stand for the candidate's functions.

    Modules are this process's own: a test's ``math.isclose`` must not be the candidate's.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    for name in used - set(namespace) - set(vars(builtins)):
        module = _find_module(name, nodes) if name != entry_point else None
        namespace[name] = module or CandidateFunction(link, name)
    if entry_point:
        namespace[entry_point] = namespace["candidate"] = CandidateFunction(link, entry_point)


def _find_module(name: str, nodes: list[ast.AST]) -> types.ModuleType | None:
    """Return the module that a name stands for: not for a function ``select``, a variable ``nt``.

    It is never called, and something that the module has is asked of it.
    """
    if name not in sys.stdlib_module_names:
        return None
    of_name = [
        n for n in nodes if isinstance(getattr(n, "func", getattr(n, "value", None)), ast.Name)
    ]
    if any(isinstance(n, ast.Call) and n.func.id == name for n in of_name):
        return None
    attributes = [n.attr for n in of_name if isinstance(n, ast.Attribute) and n.value.id == name]
    try:
        module = importlib.import_module(name) if attributes else None
    except ImportError:
        return None
    return module if any(hasattr(module, attribute) for attribute in attributes) else None


class _AssertCounter(ast.NodeTransformer):
    """Wraps every assert so that it is counted: try it, and note how it ended."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        passed, failed = ast.parse("__count__.note_pass()\n__count__.note_failure()").body
        return ast.Try([node], [ast.ExceptHandler(None, None, [failed])], [passed], [])


def _count_asserts(tree: ast.Module) -> ast.Module:
    return ast.fix_missing_locations(_AssertCounter().visit(tree))
