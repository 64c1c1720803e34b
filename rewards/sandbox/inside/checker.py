"""The checker's process: runs a test's code, in which the candidate's functions are stand-ins.

A stand-in asks the candidate's process; arguments and results cross as plain data. The report of
how the tests went is written to a pipe that the candidate does not have.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterator

from rewards.sandbox.inside.plain_data import (
    MUTABLE,
    PlainDataError,
    decode,
    encode,
    receive_frame,
    send_frame,
)
from rewards.sandbox.inside.protocol import (
    CHANNEL_FD,
    REPORT_FD,
    CandidateError,
    describe,
    make_exception,
    make_module,
)


class CandidateGone(CandidateError):
    """The candidate's process has ended, or does not keep to the protocol."""


class Link:
    """The checker's end of the channel.

    is_asked: the candidate's code has been called. has_lent: it has raised or returned something
    (a builtin type, an exception) of which the tests may make what cannot cross.
    """

    def __init__(self, in_place: bool):
        self.in_place = in_place
        self.functions: list[object] = []
        self.objects: dict[int, CandidateObject] = {}
        self.has_started = self.is_gone = self.is_asked = self.has_lent = False

    def start(self) -> None:
        """Wait until the candidate's code has run; raise what it raised."""
        self._receive()
        self.has_started = True

    def ask(self, target: str | int, do: str, **details) -> dict:
        self.is_asked = True
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
        self.has_lent = self.has_lent or _holds_builtin(data)
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
                self.has_lent = True
                raise make_exception(*raised if well_formed else ("Exception", ""))
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
        return CandidateGone(str(reason))

    def _refer(self, value: object) -> dict:
        if isinstance(value, CandidateObject):
            return {"object": value._number}
        if isinstance(value, CandidateIterator):
            return {"iterator": value._number}
        if isinstance(value, types.FunctionType | functools.partial):
            self.functions.append(value)
            return {"callback": len(self.functions) - 1}
        message = f"the tests pass a {type(value).__name__}, which cannot cross"
        # A candidate that returns ``object`` where the tests call the result must not end here.
        raise CandidateError(message) if self.has_lent else BadTests(message)

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


def _holds_builtin(data: object) -> bool:
    """Say whether a message names a builtin, at any depth: a value may be nested deeply."""
    todo = [data]
    while todo:
        data = todo.pop()
        if type(data) is dict:
            if "builtin" in data:
                return True
            todo += data.values()
        elif type(data) is list and not {list, dict}.isdisjoint(map(type, data)):
            todo += data
    return False


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
    """Counts the asserts of the tests, each place in the source once, as they are executed.

    is_reached: something was asserted, or an exception that the tests expect was raised.
    """

    def __init__(self, stop_at_failure: bool):
        self._passed, self._failed = set(), set()
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
        error = sys.exception()
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
    report = {"completed": False, "bad_tests": None}
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
        if not link.is_asked:  # if it was, they may be reached with another candidate
            report["bad_tests"] = "the tests reach no assert and never call the candidate"
    report["error"] = count.error
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
    counter = _AssertCounter()
    parts = [functools.partial(_execute, counter, tree, namespace) for tree in trees]
    completed = False not in [_run(part, count) for part in parts]
    parts = list(_list_tests(namespace, trees, link, entry_point))
    return False not in [_run(part, count) for part in parts] and completed


def _execute(counter: "_AssertCounter", tree: ast.Module, namespace: dict) -> None:
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
    namespace: dict, trees: list, link: Link, entry_point: str | None
) -> Iterator[Callable]:
    """Find what is yet to be called: HumanEval's ``check``, and tests as pytest collects them."""
    if entry_point and defines_check(trees) and callable(namespace.get("check")):
        check, candidate = namespace["check"], CandidateFunction(link, entry_point)
        yield functools.partial(check, candidate)  # whatever has its name by now
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for name in dict.fromkeys(defined):
        value = namespace.get(name)
        if name in used or getattr(value, "__module__", None) != "tests":
            continue
        if isinstance(value, type):
            yield from _list_methods(value)
        elif isinstance(value, types.FunctionType) and name.startswith("test"):
            wanted = [
                p.name for p in inspect.signature(value).parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]  # fmt: skip
            if {*wanted} <= {"candidate", entry_point}:
                yield functools.partial(value, *(namespace[name] for name in wanted))


def _list_methods(cls: type) -> Iterator[Callable]:
    unittest = sys.modules.get("unittest")
    if unittest and issubclass(cls, unittest.TestCase):
        yield unittest.defaultTestLoader.loadTestsFromTestCase(cls).debug
    elif cls.__name__.startswith("Test") and cls.__init__ is object.__init__:
        for name in [n for n in dir(cls) if n.startswith("test") and callable(getattr(cls, n))]:
            yield functools.partial(_call_method, cls, name)


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


def _bind_names(namespace: dict, trees: list, link: Link, entry_point: str | None) -> None:
    """Let the names that the tests use and nobody defines stand for the candidate's functions.

    Modules are this process's own: a test's ``math.isclose`` must not be the candidate's.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    defined = set(namespace) | set(vars(builtins)) | sys.stdlib_module_names
    for name in used - set(namespace) - set(vars(builtins)):
        module = _find_module(name, nodes) if name != entry_point else None
        namespace[name] = module or CandidateFunction(link, name)
    if entry_point:
        root = next(n.id for n in ast.walk(ast.parse(entry_point)) if isinstance(n, ast.Name))
        _refuse_helpers(trees, used - defined, {root, "candidate"})
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


def _refuse_helpers(trees: list, used: set, allowed: set) -> None:
    """Raise ``BadTests`` if an assert leaves the verdict to a helper that nobody defines.

    The candidate could define it, too, as one that is always true.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {getattr(n, "name", None) for n in nodes}
    imports = [a for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    made |= {a.asname or a.name.partition(".")[0] for a in imports}
    if "*" in made:
        return
    for node in nodes:
        test = getattr(node, "test", None) if isinstance(node, ast.Assert | ast.If) else None
        for name in _name_deciders(test):
            if name in used - made - allowed:
                raise BadTests(f"the tests call {name}(), which they do not define")


def _name_deciders(test: ast.AST | None) -> Iterator[str]:
    """Yield the names of the functions whose result alone decides whether a test is passed."""
    match test:
        case ast.UnaryOp(ast.Not(), inner) | ast.NamedExpr(_, inner):
            yield from _name_deciders(inner)
        case ast.Compare(inner, _, [ast.Constant(bool())]):
            yield from _name_deciders(inner)
        case ast.Compare(ast.Constant(bool()), _, [inner]):
            yield from _name_deciders(inner)
        case ast.BoolOp(_, parts):
            for part in parts:
                yield from _name_deciders(part)
        case ast.Call(ast.Name("bool" | "all" | "any"), [inner, *_]):
            yield from _name_deciders(inner)
        case ast.Call(ast.Name(name)):
            yield name


class _AssertCounter(ast.NodeTransformer):
    """Wraps every assert so that it is counted: try it, and note how it ended."""

    def __init__(self):
        self.places = 0

    def _wrap(self, node: ast.stmt) -> ast.Try:
        self.places += 1
        passed, failed = ast.parse(
            f"__count__.note_pass({self.places})\n__count__.note_failure({self.places})"
        ).body
        return ast.Try([node], [ast.ExceptHandler(None, None, [failed])], [passed], [])

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        return self._wrap(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return self._wrap(node) if _is_assert_method(node.value) else self.generic_visit(node)

    def visit_With(self, node: ast.With) -> ast.stmt | list:
        is_assert = any(_is_assert_method(item.context_expr) for item in node.items)
        is_reached = _fails(node.body)
        self.generic_visit(node)
        if is_assert:
            return self._wrap(node)
        return [node, *ast.parse("__count__.note_reached()").body] if is_reached else node

    def visit_If(self, node: ast.If) -> ast.If:
        if _fails(node.body) or _fails(node.orelse):
            seen = ast.parse("__count__.note_reached()").body[0].value
            seen.args.append(node.test)
            node.test = seen
        return self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> ast.Try:
        expects = _fails(node.body) or _fails(node.orelse)
        leaves = ast.Return | ast.Continue | ast.Break
        for handler in node.handlers:
            if expects or isinstance(handler.body[-1], leaves):
                handler.body[:0] = ast.parse("__count__.note_reached()").body
        return self.generic_visit(node)


def _fails(body: list[ast.stmt]) -> bool:
    """Say whether statements fail on their own when they are reached: an exception is expected."""
    for node in body:
        match node:
            case ast.Raise() | ast.Assert(ast.Constant(False | 0 | None)):
                return True
            case ast.Expr(ast.Call(ast.Attribute(_, "fail"))):
                return True
    return False


def _is_assert_method(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Attribute(_, name)):
            return name == "fail" or name.startswith("assert")
    return False
