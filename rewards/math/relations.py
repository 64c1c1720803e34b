"""Compare equations and inequalities by the values of their sides."""

from mpmath import mp, mpf

from rewards.math.evaluate import POINTS, Evaluator, Point, Undefined, Value, divide, is_real, to_mp
from rewards.math.node import Node
from rewards.math.scalars import close
from rewards.math.structure import free_names

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~"}


def are_proportional(gold: Node, answer: Node) -> bool:
    left, right = (Node("add", (n.args[0], Node("neg", (n.args[1],)))) for n in (gold, answer))
    factors = []
    for point in POINTS:
        try:
            bottom, top = (Evaluator(point).value(side) for side in (left, right))
            factors.append(divide(top, bottom))
        except Undefined:
            continue
    if len(factors) < 2 or factors[0] == 0 or not all(mp.isfinite(to_mp(f)) for f in factors):
        return False
    if not all(close(factor, factors[0]) for factor in factors):
        return False
    if gold.value[0] in ("=", "!="):
        return bool(gold.value == answer.value)
    if not is_real(factors[0]):
        return False
    operator = answer.value[0]
    positive = to_mp(factors[0]).real > 0
    return bool(gold.value[0] == (operator if positive else FLIPPED[operator]))


def solves(equation: Node, answer: Node) -> bool:
    """Say whether an expression is the explicit form of an equation in one more variable.

    ``6/x`` for the gold ``xy = 6``: put in for y, which the equation holds once, linearly, it
    satisfies it. The other way round an unsolved equation would pass for an answer.
    """
    if equation.value != ("=",) or len(free_names(equation)) < 2:
        return False
    missing = free_names(equation) - free_names(answer)
    if len(missing) != 1 or "_index" in missing or not free_names(answer) < free_names(equation):
        return False
    name = missing.pop()
    left, right = equation.args
    difference = Node("add", (left, Node("neg", (right,))))
    for point in POINTS[:2]:
        root = Evaluator(point).value(answer)

        def side(value: Value, point: Point = point) -> mpf:
            return to_mp(Evaluator(point.with_value(name, value)).value(difference))

        at_root, slopes = side(root), [side(2) - side(1), side(3) - side(2), side(8) - side(7)]
        scale = max(abs(slope) for slope in slopes)
        if not scale or abs(at_root) > scale * mpf(10) ** -20:
            return False
        if any(abs(slope - slopes[0]) > scale * mpf(10) ** -20 for slope in slopes):
            return False
    return True
