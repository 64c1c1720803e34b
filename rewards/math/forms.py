"""Rewrite parsed answers: split them into named items, write out signs, rename parameters."""

from collections.abc import Callable, Iterable, Iterator
from itertools import product

from rewards.math.ellipses import resolve_ellipses, substitute
from rewards.math.evaluate import Undefined
from rewards.math.node import Node, make_matrix, read_number, rows_of
from rewards.math.scalars import same_scalars
from rewards.math.structure import free_names, names_quantity

MAX_ITEMS = 128


class Item:
    """One part of an answer: its value, and the name it is given (``x = 5``), if any."""

    def __init__(self, node: Node):
        self.node = node
        self.name, self.value = _split_name(_cut_approximation(ungroup(node)))


def ungroup(node: Node) -> Node:
    while node.kind == "group":
        node = node.args[0]
    return node


def _cut_approximation(node: Node) -> Node:
    """``x = 1/3 \\approx 0.33`` says 1/3; ``x \\approx 0.33`` says 0.33."""
    if node.kind != "relation" or "~" not in node.value:
        return node
    cut = node.value.index("~")
    if cut == 0:
        stated = node.args[1] if names_quantity(node.args[0]) else node.args[0]
        return ungroup(stated)
    return Node("relation", node.args[: cut + 1], node.value[:cut])


def _split_name(node: Node) -> tuple[Node | None, Node]:
    """Split ``f(x) = x + 1`` into its name and its value; a value alone has no name."""
    if node.kind == "apply" and len(node.args) > 2:
        name, *coordinates = node.args
        if name.kind == "name" and len(name.value) == 1 and name.value.isupper():  # A(1, 2)
            return name, Node("tuple", tuple(coordinates), "()")
    if node.kind != "relation":
        return None, node
    name = node.args[0]
    if node.value == ("mapsto",):  # f: n \\mapsto n + 3
        if name.kind == "ratio" and len(name.args) == 2:
            name = Node("apply", name.args)
        return (name if names_quantity(name) else None), ungroup(node.args[1])
    if set(node.value) == {"="}:
        if len(node.args) > 2 and names_quantity(node.args[-1]):
            return None, node  # a = b = c: nothing is given a value
        if all(names_quantity(arg) for arg in node.args[:-1]):
            return name, ungroup(node.args[-1])
        if not any(free_names(arg) for arg in node.args):
            return None, _consistent_value(node)
        if (
            len(node.args) > 2
            and names_quantity(name)
            and not any(free_names(a) for a in node.args[1:])
        ):
            return name, _consistent_value(node._replace(args=node.args[1:]))  # x = 6/2 = 3
    if node.value == ("in",) and names_quantity(name):
        return name, ungroup(node.args[1])
    return None, node


def _consistent_value(node: Node) -> Node:
    """``2^3 = 8`` is 8. A chain of unequal numbers has no value."""
    first, *rest = node.args
    if all(same_scalars(first, other) for other in rest):
        return ungroup(node.args[-1])
    raise Undefined("a chain of unequal numbers")


def simplify_form(node: Node) -> Node:
    """Write out what stands for several answers in one: families, and exclusions of values."""
    node = fold_matrices(resolve_ellipses(ungroup(node)))
    if node.kind == "builder":
        element, condition = node.args
        if condition.kind == "relation" and condition.value == ("!=",) and _has_sign(condition):
            return node._replace(args=(element, simplify_form(condition)))
        return _open_family(node)
    if node.kind == "difference" and node.args[1].kind == "set" and _has_sign(node.args[1]):
        points = tuple(p for part in node.args[1].args for p in _expand_signs(part))
        return node._replace(args=(node.args[0], Node("set", points)))
    if node.kind == "relation" and node.value == ("!=",) and _has_sign(node):
        return Node("list", tuple(_expand_signs(node)), "and")
    if node.kind == "list" and node.args[0].kind == "relation" and node.args[0].value == ("!=",):
        name = node.args[0].args[0]
        parts = (
            p if p.kind == "relation" else Node("relation", (name, p), ("!=",)) for p in node.args
        )
        return node._replace(args=tuple(parts), value="and")
    return node


def spread_chain(item: Item) -> list[Item]:
    """``x = y = z = 1`` gives each of its names the value."""
    node = item.node
    if item.name is not None and item.name.kind == item.value.kind == "tuple":
        names, values = item.name.args, item.value.args
        if len(names) == len(values) and all(names_quantity(name) for name in names):
            return [
                Item(Node("relation", pair, ("=",))) for pair in zip(names, values, strict=True)
            ]
    if item.name is None or node.kind != "relation" or len(node.args) < 3:
        return [item]
    return [Item(Node("relation", (name, item.value), ("=",))) for name in node.args[:-1]]


def fold_matrices(node: Node) -> Node:
    """Carry out multiples and transposes of matrices and vectors."""
    if not any(part.kind in ("matrix", "tuple") for part in _parts(node)):
        return node
    args = tuple(fold_matrices(a) if isinstance(a, Node) else a for a in node.args)
    node = node._replace(args=args)
    if node.kind == "neg" and args[0].kind in ("matrix", "tuple"):
        return _map_entries(args[0], lambda entry: Node("neg", (entry,)))
    if node.kind == "pow" and args[1] == Node("name", (), "T"):
        return _transpose(args[0])
    if node.kind in ("mul", "div") and args[0].kind in ("matrix", "tuple"):
        return _map_entries(args[0], lambda entry: Node(node.kind, (entry, args[1]), "done"))
    if node.kind == "mul" and args[1].kind in ("matrix", "tuple"):
        return _map_entries(args[1], lambda entry: Node("mul", (args[0], entry), "done"))
    return node


def read_vector(node: Node, width: int) -> tuple[Node, ...] | None:
    """The coordinates of ``3i - 2j``, ``3\\hat{i} - 2\\hat{j}`` or ``\\binom{3}{-2}``."""
    if node.kind == "binomial" and width == 2:
        return node.args
    if width not in (2, 3):
        return None
    found: dict[str, Node] = {}
    _find_basis(node, found)
    if not found.keys() & {"j", "k"} or not found.keys() <= set("ijk"[:width]):
        return None
    coordinates = []
    for axis in "ijk"[:width]:
        values = {basis: "1" if letter == axis else "0" for letter, basis in found.items()}
        coordinates.append(_put_in(node, values))
    origin = _put_in(node, dict.fromkeys(found.values(), "0"))
    if not same_scalars(origin, Node("number", (), read_number("0"))):
        return None
    return tuple(coordinates)


def _find_basis(node: Node, found: dict[str, Node]) -> None:
    letter = None
    if node.kind == "name":
        letter = node.value.removeprefix("mathbf ")
    elif node.kind == "index" and node.args[-1].kind == "text" and node.args[0].kind == "name":
        letter = node.args[0].value if node.args[-1].value in ("hat", "vec", "bar") else None
    if letter in ("i", "j", "k"):
        found[letter] = node
        return
    for arg in node.args:
        if isinstance(arg, Node):
            _find_basis(arg, found)


def _put_in(node: Node, values: dict[Node, str]) -> Node:
    if node in values:
        return Node("number", (), read_number(values[node]))
    args = tuple(_put_in(a, values) if isinstance(a, Node) else a for a in node.args)
    return node._replace(args=args, value="done" if node.kind in ("add", "mul") else node.value)


def _parts(node: Node) -> Iterator[Node]:
    """The node and, through arithmetic, its operands."""
    left = [node]
    while left:
        node = left.pop()
        yield node
        if node.kind in ("neg", "pow", "mul", "div", "relation", "list", "group", "set"):
            left += node.args


def _map_entries(node: Node, change: Callable[[Node], Node]) -> Node:
    if node.kind == "tuple":
        return node._replace(args=tuple(change(entry) for entry in node.args))
    return make_matrix(tuple(change(entry) for entry in row) for row in rows_of(node))


def _transpose(node: Node) -> Node:
    if node.kind == "tuple":
        return node._replace(value="()")  # a column: vectors are compared as tuples
    rows = rows_of(node) if node.kind == "matrix" else ()
    if not rows or len({len(row) for row in rows}) != 1:
        raise Undefined("not a matrix")
    return make_matrix(zip(*rows, strict=True))


def _open_family(node: Node) -> Node:
    """``{k pi | k in Z}`` and ``{x | x = k pi, k in Z}`` are the family k pi."""
    element, condition = node.args
    parts = condition.args if condition.kind == "list" else (condition,)
    parts = tuple(part for part in parts if not _is_integer_domain(part))
    if not parts and element.kind != "name":
        return element
    if len(parts) == 1 and parts[0].kind == "relation" and parts[0].value == ("=",):
        name, value = parts[0].args
        if name == element:
            return value
    return node


def _is_integer_domain(node: Node) -> bool:
    return (
        node.kind == "relation"
        and node.value == ("in",)
        and node.args[1] in (Node("name", (), "mathbb Z"), Node("name", (), "mathbb N"))
    )


def read_items(node: Node) -> tuple[str, list[Item]]:
    """Return what kind of collection an answer is (list, set or one) and its items."""
    node = ungroup(node)
    kind = node.kind if node.kind in ("list", "set") else "one"
    if kind == "one":
        item = Item(node)
        if item.value.kind in ("list", "set") and item.value.args:
            return item.value.kind, _expand(item.value.args)
        parts = _expand([node])
        return ("list" if len(parts) > 1 else "one"), parts
    items = _expand(node.args)
    if kind == "list":
        items = _gather_groups(items)
    if len(items) > MAX_ITEMS:
        raise Undefined("too many items")
    return kind, items


def _expand(nodes: Iterable[Node]) -> list[Item]:
    """Write out every plus-minus sign: one item for each choice of signs."""
    items: list[Item] = []
    for node in nodes:
        item = Item(node)
        if item.value.kind == "tuple":  # signs in different coordinates are independent
            if _has_sign(item.value, "\\mp"):  # (\\pm 1, \\mp 2): one choice for both
                choices = [_choose_sign(item.value, upper).args for upper in (True, False)]
            else:
                choices = list(product(*[_expand_signs(part) for part in item.value.args]))
            for args in choices:
                expanded = Item(node)
                expanded.value = item.value._replace(args=args)
                items.append(expanded)
        else:
            items += [Item(chosen) for chosen in _expand_signs(node)]
        if len(items) > MAX_ITEMS:
            raise Undefined("too many items")
    return items


def _expand_signs(node: Node) -> list[Node]:
    if not _has_sign(node):
        return [node]
    return [_choose_sign(node, upper) for upper in (True, False)]


def _has_sign(node: Node, sign: str | None = None) -> bool:
    if node.kind == "pm" and sign in (None, node.value):
        return True
    return any(isinstance(a, Node) and _has_sign(a, sign) for a in node.args)


def _choose_sign(node: Node, upper: bool) -> Node:
    args = tuple(_choose_sign(a, upper) if isinstance(a, Node) else a for a in node.args)
    if node.kind != "pm":
        return node._replace(args=args)
    left, right = args
    if (node.value == "\\mp") == upper:
        right = Node("neg", (right,))
    return right if left is None else Node("add", (left, right))


def _gather_groups(items: list[Item]) -> list[Item]:
    """``p = 5, q = 2, p = 7, q = 2`` is two pairs: repeated names make tuples."""
    names = [item.name for item in items]
    if None in names or len(set(names)) < 2:
        return items
    width = names.index(names[0], 1) if names[0] in names[1:] else 0
    if width < 2 or len(items) % width or names != names[:width] * (len(items) // width):
        return items
    groups = [items[i : i + width] for i in range(0, len(items), width)]
    return [Item(Node("tuple", tuple(i.value for i in group), "()")) for group in groups]


def rename_parameter(gold: Node, answer: Node) -> tuple[Node, Node]:
    """Give a free parameter one name: ``f(n) = n`` and ``f(m) = m``, ``k\\pi`` and ``n\\pi``.

    Only where the letter is the answer's own: the argument of the function that it defines, or
    the one integer parameter of a solution of the form ``x = ...`` or ``(x, y) = ...``.
    """
    ours, theirs = Item(gold), Item(answer)
    definitions = [i.name for i in (ours, theirs) if i.name is not None and i.name.kind == "apply"]
    if len(definitions) == 2 and definitions[0].args[0] == definitions[1].args[0]:
        argument, own = (name.args[1] for name in definitions)
        if own.kind == argument.kind == "name" and all(len(d.args) == 2 for d in definitions):
            answer = substitute(answer, own.value, argument)
            return gold, _rename_constant(ours.value, Item(answer).value, argument.value, answer)
    named = [item.name for item in (ours, theirs) if item.name is not None]
    values = [free_names(ours.value), free_names(theirs.value)]
    if any(len(names) != 1 or "_index" in names for names in values):
        return gold, answer
    new, old = (next(iter(names)) for names in values)
    if new == old or any(free_names(name) & {new, old} for name in named):
        return gold, answer
    is_family = (named and all(item.value.kind == "tuple" for item in (ours, theirs))) or (
        {new, old} <= set("kmnt") and _mentions_pi(ours.value) and _mentions_pi(theirs.value)
    )
    return (gold, substitute(answer, old, Node("name", (), new))) if is_family else (gold, answer)


def _mentions_pi(node: Node) -> bool:
    if node.kind == "degree" or node == Node("name", (), "pi"):
        return True
    return any(_mentions_pi(arg) for arg in node.args if isinstance(arg, Node))


def _rename_constant(gold: Node, value: Node, argument: str, answer: Node) -> Node:
    """``f(x) = kx`` and ``f(x) = cx``: one free constant, under any letter."""
    ours, theirs = (free_names(node) - {argument} for node in (gold, value))
    if len(ours) == len(theirs) == 1 and ours != theirs and "_index" not in ours | theirs:
        return substitute(answer, theirs.pop(), Node("name", (), ours.pop()))
    return answer
