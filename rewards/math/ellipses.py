"""Read the three dots in a sum or a product: ``a_1 + a_2 + \\cdots + a_n`` is a sum over k.

The last operand, with its integer letter taken for the index, is the template; the operands
before the dots must be the template's first ones. Then the dots have one meaning, and the sum or
product is written with bounds, which can be evaluated. Otherwise they are left as they are, and
have no value.
"""

from rewards.math.evaluate import INTEGER_LETTERS, Undefined
from rewards.math.node import Node, read_number
from rewards.math.scalars import same_scalars

_INDEX = "\0k"


def resolve_ellipses(node: Node) -> Node:
    """Return ``node`` with every ellipsis of a sum or product that can be understood resolved."""
    if not has_dots(node):
        return node
    if node.kind in ("add", "mul"):
        operands = _operands(node, node.kind)
        if operands.count(Node("dots")) == 1:
            return _resolve(node.kind, operands) or node
    args = tuple(resolve_ellipses(a) if isinstance(a, Node) else a for a in node.args)
    return node._replace(args=args)


def has_dots(node: Node) -> bool:
    return node.kind == "dots" or any(isinstance(a, Node) and has_dots(a) for a in node.args)


def _operands(node: Node, kind: str) -> list[Node]:
    """Flatten a chain of one operator; they are parsed from the left."""
    operands: list[Node] = []
    while node.kind == kind:
        node, last = node.args
        operands.insert(0, last)
    return [node, *operands]


def _resolve(kind: str, operands: list[Node]) -> Node | None:
    dots = operands.index(Node("dots"))
    before, after = operands[:dots], operands[dots + 1 :]
    if not before or not after:
        return None
    for letter in sorted(_letters(after[0]) & INTEGER_LETTERS):
        template = substitute(after[0], letter, Node("name", (), _INDEX))
        for first in (1, 0, 2):
            matched = _match_suffix(template, before, first)
            if matched >= 2 or matched == len(before):
                bounds = Node("relation", (Node("name", (), _INDEX), _number(first)), ("=",))
                big = (bounds, Node("name", (), letter), template)
                whole = Node("big", big, "sum" if kind == "add" else "prod")
                rest = [*before[: len(before) - matched], *after[1:]]
                for operand in rest:
                    whole = Node(kind, (whole, operand))
                return whole
    return None


def _match_suffix(template: Node, before: list[Node], first: int) -> int:
    """How many operands at the end of ``before`` are the template's, counted from ``first``."""
    for length in range(len(before), 0, -1):
        terms = (substitute(template, _INDEX, _number(first + j)) for j in range(length))
        try:
            pairs = zip(terms, before[-length:], strict=True)
            if all(same_scalars(term, operand) for term, operand in pairs):
                return length
        except Undefined:
            continue
    return 0


def _letters(node: Node) -> set[str]:
    if node.kind == "name":
        return {node.value}
    return set().union(*(_letters(a) for a in node.args if isinstance(a, Node)))


def substitute(node: Node, name: str, value: Node) -> Node:
    """Return ``node`` with every occurrence of a name, in indices too, replaced by ``value``."""
    if node.kind == "name":
        return value if node.value == name else node
    args = tuple(substitute(a, name, value) if isinstance(a, Node) else a for a in node.args)
    return node._replace(args=args)


def _number(value: int) -> Node:
    return Node("number", (), read_number(str(value)))
