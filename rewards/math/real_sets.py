"""Sets of real numbers: intervals, unions, inequalities and set-builders, compared as sets.

A set is held as its critical points and a rule of membership that cannot change between them.
Two sets are equal if they agree at every critical point of either, and between neighbours.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from mpmath import mp, mpf

from rewards.math.evaluate import Evaluator, Undefined, Value, real_part, to_mp
from rewards.math.node import Node
from rewards.math.structure import free_names, names_quantity

MAX_WHOLE = 1_000


class RealSet(NamedTuple):
    points: list[mpf]
    contains: Callable[[mpf], bool]
    has_gaps: bool = False  # whole numbers only: membership changes at each of them


def equal_sets(a: RealSet, b: RealSet) -> bool:
    probes = _probes([*a.points, *b.points], a.has_gaps or b.has_gaps)
    return all(a.contains(x) == b.contains(x) for x in probes)


def is_empty(a: RealSet) -> bool:
    return not any(a.contains(x) for x in _probes(a.points, a.has_gaps))


def _probes(points: list[mpf], whole: bool = False) -> list[mpf]:
    """Every critical point, and one number in every gap between and beyond them.

    ``whole``: the whole numbers from the first to the last of them, too.
    """
    finite = [mpf(0), *(p for p in points if abs(p) != mp.inf)]
    if whole:
        low, high = int(mp.floor(min(finite))) - 2, int(mp.ceil(max(finite))) + 2
        if high - low > MAX_WHOLE:
            raise Undefined("too many whole numbers")
        points = [*points, *(mpf(n) for n in range(low, high + 1))]
    ordered: list[mpf] = []
    for point in sorted(p for p in points if abs(p) != mp.inf):
        if not ordered or not _near(point, ordered[-1]):
            ordered.append(point)
    if not ordered:
        return [mpf(0)]
    middles = [(a + b) / 2 for a, b in pairwise(ordered)]
    return [ordered[0] - 1, *ordered, *middles, ordered[-1] + 1]


def _near(a: mpf, b: mpf) -> bool:
    if a == b or mp.inf in (abs(a), abs(b)):
        return bool(a == b)
    return bool(abs(a - b) <= max(abs(a), abs(b), mpf(10) ** -20) * mpf(10) ** (12 - mp.dps))


def interval(low: mpf, high: mpf, brackets: str) -> RealSet:
    if low > high or (low == high and brackets != "[]"):
        raise Undefined("an empty interval is none that anyone means")

    def contains(x: mpf) -> bool:
        if _near(x, low):
            return brackets[0] == "[" and (low < high or brackets == "[]")
        if _near(x, high):
            return brackets[1] == "]" and low < high
        return bool(low < x < high)

    return RealSet([low, high], contains)


def all_reals() -> RealSet:
    return RealSet([], lambda x: True)


def whole_numbers(least: int | None = None) -> RealSet:
    return RealSet(
        [] if least is None else [mpf(least)],
        lambda x: _near(x, mp.nint(x)) and (least is None or x > least - 0.5),
        True,
    )


def points(values: list[mpf]) -> RealSet:
    return RealSet(values, lambda x: any(_near(x, value) for value in values))


def combine(a: RealSet, b: RealSet, rule: Callable[[bool, bool], bool]) -> RealSet:
    return RealSet(
        [*a.points, *b.points],
        lambda x: rule(a.contains(x), b.contains(x)),
        a.has_gaps or b.has_gaps,
    )


RULES = {
    "union": lambda p, q: p or q,
    "intersection": lambda p, q: p and q,
    "difference": lambda p, q: p and not q,
}

# The sets of whole numbers that have a letter; zero is a natural number (ISO 80000-2).
_WHOLE = {Node("name", (), "mathbb Z"): None, Node("name", (), "mathbb N"): 0}
_ORDER = {"<", ">", "<=", ">=", "!="}


def describes_set(node: Node) -> bool:
    """Say whether ``node`` can only be read as a set of reals."""
    if node.kind in ("union", "intersection", "difference", "builder"):
        return True
    if node.kind == "relation" and node.value == ("in",):
        return node.args[1] in _WHOLE
    if node.kind == "relation":
        return bool(set(node.value) & _ORDER) and set(node.value) <= _ORDER | {"="}
    if node.kind == "tuple":
        return node.value in ("[)", "(]")
    if node.kind == "add":
        return any(describes_set(part) or part.kind == "set" for part in node.args)
    if node.kind == "neg":
        return describes_set(node.args[0])
    return node == Node("name", (), "mathbb R")


def build_set(node: Node, evaluate: Evaluator) -> RealSet:
    """Return the set that ``node`` describes at the evaluator's point, or raise ``Undefined``."""
    if node.kind in RULES:
        left, right = (build_set(part, evaluate) for part in node.args)
        return combine(left, right, RULES[node.kind])
    if node.kind == "add" and node.args[1].kind == "neg":  # A - B, for sets
        left, right = (build_set(n, evaluate) for n in (node.args[0], node.args[1].args[0]))
        return combine(left, right, RULES["difference"])
    if node.kind == "tuple" and len(node.args) == 2:
        low, high = (real_value(part, evaluate) for part in node.args)
        return interval(low, high, node.value)
    if node.kind == "set":
        return points([real_value(part, evaluate) for part in node.args])
    if node == Node("name", (), "mathbb R"):
        return all_reals()
    if node in _WHOLE:
        return whole_numbers(_WHOLE[node])
    if node.kind == "builder":
        return _build_builder(node, evaluate)
    if node.kind == "relation":
        if node.value == ("in",):
            return build_set(node.args[1], evaluate)
        return solve_relation(node, evaluate)
    if node.kind == "list":
        return _build_list(node, evaluate)
    raise Undefined(f"{node.kind} is not a set of reals")


def _build_builder(node: Node, evaluate: Evaluator) -> RealSet:
    element, condition = node.args
    if element.kind == "relation" and element.value == ("in",):
        domain = build_set(element.args[1], evaluate)
        element = element.args[0]
    else:
        domain = all_reals()
    if element.kind != "name":
        raise Undefined("a set of something else than one variable")
    parts = condition.args if condition.kind == "list" else (condition,)
    if unknowns(condition) != {element.value}:
        raise Undefined("a condition on something else than the element")
    for part in parts:
        if part.kind == "relation" and part.value == ("=",):
            raise Undefined("a set of solutions")
        rule = "union" if condition.kind == "list" and condition.value == "or" else "intersection"
        inner = build_set(part, evaluate)
        domain = (
            inner if rule == "union" and part is parts[0] else combine(domain, inner, RULES[rule])
        )
    return domain


def _build_list(node: Node, evaluate: Evaluator) -> RealSet:
    """``x < 1 or x > 3``. A comma or "and" means both, unless no number satisfies both.

    A logical sign and its Chinese words mean both whatever satisfies them.
    """
    if len(unknowns(node)) > 1:
        raise Undefined("conditions on several variables")
    sets = [build_set(part, evaluate) for part in node.args]
    if node.value != "or" and any(part.kind == "relation" for part in node.args):
        both = sets[0]
        for other in sets[1:]:
            both = combine(both, other, RULES["intersection"])
        if node.value == "both" or not is_empty(both):
            return both
    union = sets[0]
    for other in sets[1:]:
        union = combine(union, other, RULES["union"])
    return union


def real_value(node: Node, evaluate: Evaluator) -> mpf:
    return to_mp(real_part(evaluate.value(node)))


def unknowns(node: Node) -> set[str]:
    """The variables that the relations in a condition are about, parameters left out."""
    if node.kind == "relation":
        named = [arg.value for arg in node.args if arg.kind == "name" and names_quantity(arg)]
        return set(named[:1]) or set().union(*(free_names(arg) for arg in node.args))
    return set().union(*(unknowns(arg) for arg in node.args if isinstance(arg, Node)))


def solve_relation(node: Node, evaluate: Evaluator) -> RealSet:
    """The values that an inequality, or a chain of them, allows its one unknown.

    The unknown is the operand that names a quantity (``x``, ``f(x)``, ``a_n``), else the only
    variable, in which each side must be linear or quadratic, also inside ``|...|``.
    """
    unknown = next((arg for arg in node.args if names_quantity(arg)), None)
    names = sorted(set().union(*(free_names(arg) for arg in node.args)))
    others = [arg for arg in node.args if arg is not unknown]
    if unknown is not None and not (
        unknown.kind == "name" and any(unknown.value in free_names(arg) for arg in others)
    ):
        hidden = "\0unknown"
        args = tuple(Node("name", (), hidden) if arg is unknown else arg for arg in node.args)
    elif len(names) == 1 and names[0] != "_index":
        hidden, args = names[0], node.args
    else:
        raise Undefined("more than one unknown")

    def side_at(arg: Node, x: Value) -> mpf:
        inner = Evaluator(evaluate.point.with_value(hidden, x), evaluate.mode)
        return real_value(arg, inner)

    pairs = list(zip(args, node.value, args[1:], strict=False))
    critical: list[mpf] = []
    for left, _, right in pairs:
        for variant in _without_bars(Node("add", (left, Node("neg", (right,))))):
            critical += _roots(partial(side_at, variant))

    def contains(x: mpf) -> bool:
        try:
            return all(_holds(side_at(a, x), op, side_at(b, x)) for a, op, b in pairs)
        except Undefined:
            return False

    return RealSet(critical, contains)


def _holds(left: mpf, operator: str, right: mpf) -> bool:
    same = _near(left, right) or abs(left - right) < mpf(10) ** (15 - mp.dps)
    if operator in ("=", "!="):
        return same == (operator == "=")
    if same:
        return operator in ("<=", ">=")
    return bool(left < right) == (operator in ("<", "<="))


def _without_bars(node: Node) -> list[Node]:
    """Replace each ``|u|`` by u and by -u, so that every root is a root of one of the results."""
    if node.kind == "abs":
        inner = _without_bars(node.args[0])
        return [*inner, *(Node("neg", (u,)) for u in inner)]
    if not any(isinstance(part, Node) for part in node.args):
        return [node]
    variants: list[tuple[Node, ...]] = [()]
    for part in node.args:
        choices = _without_bars(part) if isinstance(part, Node) else [part]
        variants = [(*done, choice) for done in variants for choice in choices]
        if len(variants) > 16:
            raise Undefined("too many absolute values")
    return [node._replace(args=args) for args in variants]


def _roots(function: Callable[[Value], mpf]) -> list[mpf]:
    """The real roots of a polynomial of degree at most two, given as a function."""
    f0, f1, f2, f3, f7 = (function(x) for x in (0, 1, 2, 3, 7))
    if abs(f0) == mp.inf:
        return []
    a = (f2 - 2 * f1 + f0) / 2
    b = f1 - f0 - a
    scale = max(abs(f0), abs(f1), abs(f2), mpf(1))
    tiny = scale * mpf(10) ** (15 - mp.dps)
    if any(abs(a * x * x + b * x + f0 - f) > 100 * tiny for x, f in ((3, f3), (7, f7))):
        raise Undefined("neither linear nor quadratic")
    if abs(a) <= tiny:
        return [] if abs(b) <= tiny else [-f0 / b]
    square = b * b - 4 * a * f0
    if square < -tiny:
        return []
    root = mp.sqrt(max(square, mpf(0)))
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]
