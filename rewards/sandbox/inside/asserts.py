"""Analyse the tests' source: wrap asserts so that they are counted, refuse undefined helpers."""

import ast
import importlib
import sys
import types
from collections.abc import Iterator

from rewards.sandbox.inside.protocol import BadTests


def find_module(name: str, nodes: list[ast.AST]) -> types.ModuleType | None:
    """Return the module that a name stands for: not for a function ``select``, a variable ``nt``.

    It is never called, and something that the module has is asked of it.
    """
    if name not in sys.stdlib_module_names:
        return None
    called = [n.func for n in nodes if isinstance(n, ast.Call)]
    if any(isinstance(function, ast.Name) and function.id == name for function in called):
        return None
    owners = [(n.value, n.attr) for n in nodes if isinstance(n, ast.Attribute)]
    attributes = [attr for node, attr in owners if isinstance(node, ast.Name) and node.id == name]
    try:
        module = importlib.import_module(name) if attributes else None
    except ImportError:
        return None
    return module if any(hasattr(module, attribute) for attribute in attributes) else None


def refuse_helpers(trees: list[ast.Module], used: set[str], allowed: set[str]) -> None:
    """Raise ``BadTests`` if an assert leaves the verdict to a helper that nobody defines.

    The candidate could define it, too, as one that is always true.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    made: set[str | None] = {
        n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
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


class AssertCounter(ast.NodeTransformer):
    """Wraps every assert so that it is counted: try it, and note how it ended."""

    def __init__(self) -> None:
        self.places = 0

    def _wrap(self, node: ast.stmt) -> ast.Try:
        self.places += 1
        passed, failed = ast.parse(
            f"__count__.note_pass({self.places})\n__count__.note_failure({self.places})"
        ).body
        return ast.Try([node], [ast.ExceptHandler(None, None, [failed])], [passed], [])

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        return self._wrap(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(ast.Attribute(ast.Name("unittest"), "main")):
                return ast.Pass()  # the checker calls test classes itself
        return self._wrap(node) if _is_assert_method(node.value) else self.generic_visit(node)

    def visit_With(self, node: ast.With) -> ast.stmt | list[ast.stmt]:
        is_assert = any(_is_assert_method(item.context_expr) for item in node.items)
        is_reached = _fails(node.body)
        self.generic_visit(node)
        if is_assert:
            return self._wrap(node)
        return [node, *ast.parse("__count__.note_reached()").body] if is_reached else node

    def visit_If(self, node: ast.If) -> ast.If:
        if _fails(node.body) or _fails(node.orelse):
            node.test = _note_reached(node.test)
        self.generic_visit(node)
        return node

    def visit_Match(self, node: ast.Match) -> ast.Match:
        if any(_fails(case.body) for case in node.cases):
            node.subject = _note_reached(node.subject)
        self.generic_visit(node)
        return node

    def visit_Try(self, node: ast.Try) -> ast.Try:
        expects = _fails(node.body) or _fails(node.orelse)
        leaves = ast.Return | ast.Continue | ast.Break
        for handler in node.handlers:
            if expects or isinstance(handler.body[-1], leaves):
                handler.body[:0] = ast.parse("__count__.note_reached()").body
        self.generic_visit(node)
        return node


def _note_reached(value: ast.expr) -> ast.Call:
    return ast.Call(ast.parse("__count__.note_reached", mode="eval").body, [value], [])


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
