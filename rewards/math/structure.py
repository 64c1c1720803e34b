"""Questions about a parsed answer's form: which letters it has, and whether it is only a name."""

from itertools import chain

from rewards.math.node import Node, rows_of


def free_names(node: Node) -> set[str]:
    """Return the variables of an expression, constants left out; an indexed name counts whole."""
    if node.kind == "name":
        return set() if node.value in ("pi", "e", "i", "infinity") else {node.value}
    if node.kind == "index":
        return {"_index"}
    names: set[str] = set()
    for part in node.args if node.kind != "matrix" else chain(*rows_of(node)):
        if part is not None:
            names |= free_names(part)
    return names


def names_quantity(node: Node) -> bool:
    """Say whether an expression only names something: ``x``, ``f(x)``, ``S_n``, ``|AB|``, ``AB``.

    Such a left side of an equation says what the right side is the value of. ``a^2 + b`` and
    ``xy`` are not names: an equation in them is itself the answer.
    """
    if node.kind == "name":
        return node.value not in ("pi", "e", "i", "infinity")
    if node.kind == "index":
        return True
    if node.kind == "apply":
        return names_quantity(node.args[0])
    if node.kind == "function":
        return bool(node.args) and all(names_quantity(arg) for arg in node.args)
    if node.kind == "group":
        return names_quantity(node.args[0])
    if node.kind == "text":
        return True
    if node.kind == "mul" and node.args[0] == Node("name", (), "m"):  # the measure of an angle
        return node.args[1].kind == "index"
    if node.kind == "mul" and _is_differential(node):  # \Delta x
        return True
    if node.kind == "mul" and all(_is_vector(part) for part in node.args):  # a scalar product
        return True
    if node.kind == "mul":  # a segment AB, a figure MBCN: capitals side by side
        return node.value == "juxtaposed" and all(_is_capital(part) for part in node.args)
    if node.kind == "abs":
        return _is_segment(node.args[0]) or node.value == "norm" or _is_vector(node.args[0])
    if node.kind == "big":  # a limit, an integral or a sum names itself
        return True
    if node.kind in ("union", "intersection", "difference"):
        return all(names_quantity(arg) for arg in node.args)
    if node.kind in ("ratio", "div", "frac"):
        if all(_is_differential(arg) for arg in node.args):
            return True
        return all(names_quantity(arg) for arg in node.args)
    if node.kind == "tuple":
        return node.value == "()" and all(names_quantity(arg) for arg in node.args)
    return False


def _is_vector(node: Node) -> bool:
    """Say whether an expression is of vectors alone: ``\\vec a``, ``\\vec a + \\vec b``."""
    if node.kind in ("add", "neg", "group"):
        return all(_is_vector(arg) for arg in node.args)
    if node.kind == "mul":  # 2\vec a
        return node.args[0].kind == "number" and _is_vector(node.args[1])
    if node.kind == "index":
        return node.args[-1] == Node("text", (), "vec") or _is_vector(node.args[0])
    return node.kind == "name" and node.value.startswith("mathbf ")


def _is_differential(node: Node) -> bool:
    """``dx``, ``\\partial f``, ``\\Delta x``; ``d`` and ``d^2`` alone, too, in a quotient."""
    if node.kind != "mul":
        return False
    first = node.args[0]
    while first.kind == "mul":
        first = first.args[0]
    if first.kind == "pow":
        first = first.args[0]
    is_sign = first.kind == "name" and first.value in ("d", "partial", "Delta", "nabla")
    return is_sign and (node.args[1].kind in ("name", "index", "apply", "pow"))


def _is_capital(node: Node) -> bool:
    if node.kind == "mul":
        return node.value == "juxtaposed" and all(_is_capital(part) for part in node.args)
    return node.kind == "name" and node.value.isupper()


def _is_segment(node: Node) -> bool:
    return _is_capital(node) or (node.kind == "index" and _is_segment(node.args[0]))
