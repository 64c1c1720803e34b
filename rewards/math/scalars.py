"""Compare two expressions by value, in every reading of the marks that only one of them has."""

from fractions import Fraction

from mpmath import mp, mpf

from rewards.math.evaluate import (
    FAR_POINTS,
    POINTS,
    Evaluator,
    Mode,
    Point,
    Undefined,
    Value,
    exact,
    is_real,
    to_mp,
)
from rewards.math.node import Node, Number
from rewards.math.structure import free_names
from rewards.text.units import Unit, find_scales, is_rate_of, names_no_unit

# Working precision, and the one at which an equality is confirmed.
DIGITS, MORE_DIGITS = 40, 110

# A decimal stands for an exact value that it is the correct rounding of, if it has at least so
# many significant digits: more where the answer rounds than where the gold's author did.
GOLD_DIGITS, ANSWER_DIGITS = 2, 4
# This many digits are a float printed in full, whose last digits may be noise.
FLOAT_DIGITS = 12


def same_scalars(gold: Node, answer: Node) -> bool:
    """Compare two expressions by value, in every reading of what only one of them marks.

    A percent or degree sign, a unit or a numeral's base that one side has and the other lacks
    may have been asked for in the question. Raises ``Undefined`` if neither has a value.
    """
    unit, other = unit_of(gold), unit_of(answer)
    if unit and other and unit != other:
        return _same_quantities(gold, answer, unit, other)
    if ("base" in _features(gold)) != ("base" in _features(answer)):
        gold, answer = _drop_base(gold), _drop_base(answer)
    return any(_same_in_mode(gold, answer, mode) for mode in _modes(gold, answer))


def _modes(gold: Node, answer: Node) -> list[Mode]:
    ours, theirs = _features(gold), _features(answer)
    one_sided = ours ^ theirs
    percents = (True, False) if "percent" in one_sided else (True,)
    degrees = (False, True) if "degree" in one_sided else (True,)
    logs = (False, True) if "log" in ours | theirs else (False,)
    return [Mode(p, d, t) for p in percents for d in degrees for t in logs]


def _features(node: Node) -> set[str]:
    features = {node.kind} & {"percent", "degree", "base"}
    if node.kind == "function" and node.value == "log" and len(node.args) == 1:
        features.add("log")
    if node.kind == "unit" and node.value == (("radian", 1),):
        features.add("degree")  # says that angles are in radians: not ambiguous
    for part in node.args:
        if isinstance(part, Node):
            features |= _features(part)
    return features


def _drop_base(node: Node) -> Node:
    if node.kind == "base":
        return node.args[0]
    args = tuple(_drop_base(a) if isinstance(a, Node) else a for a in node.args)
    return node._replace(args=args)


def unit_of(node: Node) -> Unit | None:
    if node.kind == "unit":
        unit: Unit = node.value
        return unit
    return unit_of(node.args[0]) if node.kind == "neg" else None


def _same_quantities(gold: Node, answer: Node, unit: Unit, other: Unit) -> bool:
    """Both state a unit and the units differ: equal only if a known conversion makes them so."""
    gold, answer = strip_unit(gold), strip_unit(answer)
    if names_no_unit(unit) or names_no_unit(other) or is_rate_of(unit, other):
        # "5 square units" names none; "5 dollars" an hour may leave the hour to the question.
        return same_scalars(gold, answer)
    scaled = (
        Node("mul", (answer, Node("number", (), Number(scale, 0, 0))), "done")
        for scale in find_scales(unit, other)
    )
    return any(same_scalars(gold, quantity) for quantity in scaled)


def strip_unit(node: Node) -> Node:
    if node.kind == "neg":
        return Node("neg", (strip_unit(node.args[0]),))
    return node.args[0] if node.kind == "unit" else node


def _same_in_mode(gold: Node, answer: Node, mode: Mode) -> bool:
    names = free_names(gold) | free_names(answer)
    if not names:
        return _same_constants(gold, answer, mode)
    agreed, complex_agreed, complex_differ = 0, 0, 0
    points = points_for(names) + (FAR_POINTS if _jumps(gold) or _jumps(answer) else ())
    for point in points:
        evaluators = Evaluator(point, mode), Evaluator(point, mode)
        try:
            a, b = evaluators[0].value(gold), evaluators[1].value(answer)
        except Undefined:
            continue
        same = close(a, b)
        of_gold, of_answer = (evaluator.has_left_reals for evaluator in evaluators)
        if not of_gold and not same and (not of_answer or _takes_modulus(gold)):
            return False  # ln x is not ln|x|
        if not of_gold and not of_answer:
            agreed += 1
        elif same:
            complex_agreed += 1
        else:
            complex_differ += 1
    if _mentions_i(gold) or _mentions_i(answer):
        return complex_differ == 0 and agreed + complex_agreed > 0
    if agreed:  # branches of roots and logarithms are not compared where they are complex
        return _confirm(gold, answer, mode, names)
    if complex_agreed + complex_differ == 0:
        raise Undefined("no value at any sample")
    return complex_differ == 0


def points_for(names: set[str]) -> tuple[Point, ...]:
    return POINTS if names else POINTS[:1]


def _jumps(node: Node) -> bool:
    if node.kind == "function" and node.value in ("floor", "ceil", "max", "min", "gcd", "lcm"):
        return True
    return any(_jumps(arg) for arg in node.args if isinstance(arg, Node))


def _takes_modulus(node: Node) -> bool:
    return node.kind == "abs" or any(
        _takes_modulus(arg) for arg in node.args if isinstance(arg, Node)
    )


def _mentions_i(node: Node) -> bool:
    if node.kind == "name" and node.value == "i" and not node.args:
        return True
    return any(_mentions_i(arg) for arg in node.args if isinstance(arg, Node))


def _confirm(gold: Node, answer: Node, mode: Mode, names: set[str]) -> bool:
    """Check an agreement with many more digits, where a near miss of the first pass shows."""
    with mp.workdps(MORE_DIGITS):
        for point in points_for(names):
            evaluators = Evaluator(point, mode), Evaluator(point, mode)
            try:
                a, b = evaluators[0].value(gold), evaluators[1].value(answer)
            except Undefined:
                continue
            left = any(evaluator.has_left_reals for evaluator in evaluators)
            if not left and not close(a, b):
                return False
    return True


def close(a: Value, b: Value) -> bool:
    """Equal up to rounding error: exactly if both are exact, else to most of the digits."""
    if exact(a) and exact(b):
        return a == b
    a, b = to_mp(a), to_mp(b)
    if a == b or mp.isinf(a) or mp.isinf(b):
        return bool(a == b)
    difference, scale = abs(a - b), max(abs(a), abs(b))
    if difference > scale * mpf(10) ** (18 - mp.dps):
        # Cancellation leaves only rounding error, which shrinks with more digits.
        return bool(scale < mpf(10) ** (12 - mp.dps) and (a == 0 or b == 0))
    return True


def _same_constants(gold: Node, answer: Node, mode: Mode) -> bool:
    if _is_undone(answer) and _is_plain(gold) and not _is_undone(gold):
        return False
    point = POINTS[0]
    a, b = (Evaluator(point, mode).value(node) for node in (gold, answer))
    if close(a, b):
        if exact(a) and exact(b):
            return True
        for value, node in ((a, answer), (b, gold)):
            if value == 0:
                return _vanishes(node, mode)
        with mp.workdps(MORE_DIGITS):
            return close(*(Evaluator(point, mode).value(node) for node in (gold, answer)))
    if _is_rounding(gold, a, b, mode, GOLD_DIGITS):
        return True
    return _is_rounding(answer, b, a, mode, ANSWER_DIGITS)


def _is_plain(node: Node) -> bool:
    """Say whether an expression is made of numerals and the four operations and powers only."""
    if node.kind == "number":
        return True
    kinds = ("neg", "group", "unit", "percent", "degree", "frac", "div", "pow", "add", "mul")
    return node.kind in kinds and all(_is_plain(arg) for arg in node.args)


def _is_undone(node: Node) -> bool:
    """Say whether a plain expression leaves a sum or a product to be worked out: ``7 + 3 - 9``.

    Numbers that are merely written with several numerals are done: fractions, mixed numbers,
    powers, scientific notation.
    """
    return _is_plain(node) and _has_undone(node)


def _has_undone(node: Node) -> bool:
    if node.kind == "add" and node.value != "done":
        return True
    if node.kind == "mul" and node.value != "done" and not _is_power_of_ten(node.args[1]):
        return True
    return any(_has_undone(arg) for arg in node.args)


def _is_power_of_ten(node: Node) -> bool:
    node = node.args[0] if node.kind == "group" else node
    base = node.args[0] if node.kind == "pow" else node
    return node.kind == "pow" and base.kind == "number" and base.value.value == 10


def _vanishes(node: Node, mode: Mode) -> bool:
    """Tell zero from a tiny number: zero shrinks with more digits."""
    sizes = []
    for digits in (MORE_DIGITS, 2 * MORE_DIGITS):
        with mp.workdps(digits):
            sizes.append(abs(to_mp(Evaluator(POINTS[0], mode).value(node))))
    return bool(sizes[1] <= sizes[0] * mpf(10) ** -DIGITS)


def _is_rounding(node: Node, value: Value, other: Value, mode: Mode, least_digits: int) -> bool:
    """Say whether ``node`` is a decimal literal that ``other``, not itself one, rounds to."""
    literal, scale = _literal(node, mode)
    if literal is None or literal.significant < least_digits:
        return False
    if literal.decimals < 2 and scale != mpf(1) / 100:  # 41.4% has three decimals, 41.4 has one
        return False
    if not is_real(other) or (exact(other) and _terminates(other)):
        return False
    step = mpf(10) ** -literal.decimals * scale
    error = abs(to_mp(other).real - to_mp(value).real)
    return bool(error <= (step if literal.significant >= FLOAT_DIGITS else step / 2))


def _literal(node: Node, mode: Mode) -> tuple[Number | None, mpf]:
    scale = mpf(1)
    while node.kind in ("neg", "unit", "group", "percent", "degree"):
        if node.kind == "percent":
            scale *= to_mp(mode.percent)
        if node.kind == "degree" and mode.degrees:
            scale *= mp.pi / 180
        node = node.args[0]
    return (node.value, scale) if node.kind == "number" else (None, scale)


def _terminates(value: Value) -> bool:
    """Say whether an exact value has a finite decimal, short enough to have been written out."""
    bottom = Fraction(value).denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1
