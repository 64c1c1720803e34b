"""Find the parts of test code that can be reached, whatever the candidate returns."""

import ast
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

# What may call a function without its name in the source.
_INDIRECT = {"eval", "exec", "globals", "locals", "vars", "getattr", "inspect"}


@functools.lru_cache(maxsize=64)  # asked for each completion of a group
def asserts_something(units: tuple[str, ...]) -> bool:
    """Say whether an assert, a ``raise`` or an assert method can be reached at all."""
    return any(map(_is_assertion, _Reach([ast.parse(unit) for unit in units]).list_nodes()))


def _is_assertion(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.Raise():
            return True
        case ast.Call(ast.Attribute(_, name)):
            return name == "fail" or name.startswith("assert")
    return False


class _Reach:
    """Walks test code, but not behind a ``return``, under ``if False`` or in unused functions."""

    def __init__(self, trees: Sequence[ast.Module]):
        self.trees = trees
        nodes = [node for tree in trees for node in ast.walk(tree)]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        self.used = {n.id for n in names if isinstance(n.ctx, ast.Load)} | attributes
        num_stores = Counter(n.id for n in names if isinstance(n.ctx, ast.Store))
        for field in ("arg", "name", "asname"):  # parameters, ``except ... as``, imports, ``case``
            num_stores.update(str(getattr(node, field, "")) for node in nodes)
        self.constants: dict[str, object] = {"__name__": "tests", "__debug__": True}
        for part in (part for tree in trees for part in tree.body):
            match part:
                case ast.ImportFrom("typing", names=aliases) if any(
                    alias.name == "TYPE_CHECKING" for alias in aliases
                ):
                    self.constants["TYPE_CHECKING"] = False
                case ast.Assign([ast.Name(name)], ast.Constant(value)) if num_stores[name] == 1:
                    self.constants[name] = value

    def list_nodes(self) -> Iterator[ast.AST]:
        for tree in self.trees:
            yield from self._walk(tree)

    def _walk(self, node: ast.AST) -> Iterator[ast.AST]:
        yield node
        skipped = self._find_dead_fields(node)
        for name, value in ast.iter_fields(node):
            if name in skipped:
                continue
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    yield from self._walk(part)
                if isinstance(part, ast.Return | ast.Raise | ast.Continue | ast.Break):
                    break

    def _find_dead_fields(self, node: ast.AST) -> tuple[str, ...]:
        match node:
            case ast.If(test) | ast.While(test):
                known = self._evaluate(test)
                return () if known is None else ("orelse",) if known else ("body",)
            case ast.For(iter=ast.List([]) | ast.Tuple([]) | ast.Dict([]) | ast.Constant("")):
                return ("body",)
            case ast.For(iter=ast.Call(ast.Name("range"), [ast.Constant(0)])):
                return ("body",)
            case ast.ClassDef(name, bases=[], decorator_list=[]):
                return () if self._is_used(name) or name.startswith("Test") else ("body",)
            case ast.FunctionDef(name, decorator_list=[]):
                is_test = name == "check" or name.startswith("test")
                return () if self._is_used(name) or is_test or _is_method(node) else ("body",)
            case ast.AsyncFunctionDef(name, decorator_list=[]):
                return () if self._is_used(name) or _is_method(node) else ("body",)
        return ()

    def _is_used(self, name: str) -> bool:
        return name in self.used or not self.used.isdisjoint(_INDIRECT)

    def _evaluate(self, test: ast.AST) -> bool | None:
        """Return what a condition always is; None if that depends."""
        match test:
            case ast.UnaryOp(ast.Not(), inner):
                known = self._evaluate(inner)
                return None if known is None else not known
            case ast.Compare(ast.Name("__name__"), [ast.Eq()], [ast.Constant("__main__")]):
                return False
            case ast.Constant(value):
                return bool(value)
            case ast.Name(name) if name in self.constants:
                return bool(self.constants[name])
        return None


def _is_method(node: Any) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args]
    return bool(arguments) and arguments[0].arg in ("self", "cls")
