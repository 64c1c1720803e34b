"""Compare two parsed answers by structure and value. The conventions are in ``grading``."""

from fractions import Fraction
from itertools import product

from mpmath import mp, mpf

from rewards import realsets
from rewards.evaluate import (
    POINTS,
    Evaluator,
    Mode,
    Point,
    Undefined,
    Value,
    divide,
    exact,
    is_real,
    to_mp,
)
from rewards.structure import free_names, names_quantity
from rewards.syntax import Node, Number
from rewards.vocabulary import CONVERSIONS

MAX_ITEMS = 128
MAX_SIGNS = 4  # plus-minus signs in one answer: 2 ** MAX_SIGNS readings

# Working precision, and the one at which an equality is confirmed.
DIGITS, MORE_DIGITS = 40, 110

# A decimal stands for an exact value that it is the correct rounding of, if it has at least so
# many significant digits: more where the rounding is the answer's own idea than where the gold's
# author chose it.
GOLD_DIGITS, ANSWER_DIGITS = 2, 4
# This many digits are a float printed in full, whose last digits may be noise.
FLOAT_DIGITS = 12


def same_answer(gold: Node, answer: Node) -> bool:
    """Say whether two answers are equal; raise ``Undefined`` if that cannot be decided."""
    with mp.workdps(DIGITS):
        if gold == answer:
            return True
        gold, answer = _rename_parameter(_simplify_form(gold), _simplify_form(answer))
        return _same_lists(gold, answer)


def _simplify_form(node: Node) -> Node:
    """Write out what stands for several answers in one: families, and exclusions of values."""
    node = _ungroup(node)
    if node.kind == "builder":
        return _open_family(node)
    if node.kind == "relation" and node.value == ("!=",) and _has_sign(node):
        return Node("list", tuple(_expand_signs(node)), "and")
    if node.kind == "list" and node.args[0].kind == "relation" and node.args[0].value == ("!=",):
        name = node.args[0].args[0]
        parts = (
            p if p.kind == "relation" else Node("relation", (name, p), ("!=",)) for p in node.args
        )
        return node._replace(args=tuple(parts), value="and")
    return node


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


# --- lists -----------------------------------------------------------------------------------


class Item:
    """One part of an answer: its value, and the name it is given (``x = 5``), if any."""

    def __init__(self, node: Node):
        self.node = node
        self.name, self.value = _split_name(_cut_approximation(_ungroup(node)))


def _ungroup(node: Node) -> Node:
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
        return _ungroup(stated)
    return Node("relation", node.args[: cut + 1], node.value[:cut])


def _split_name(node: Node) -> tuple[Node | None, Node]:
    """Split ``f(x) = x + 1`` into its name and its value; a value alone has no name."""
    if node.kind != "relation":
        return None, node
    name = node.args[0]
    if set(node.value) == {"="}:
        if all(names_quantity(arg) for arg in node.args[:-1]):
            return name, _ungroup(node.args[-1])
        if not any(free_names(arg) for arg in node.args):
            return None, _consistent_value(node)
    if node.value == ("in",) and names_quantity(name):
        return name, _ungroup(node.args[1])
    return None, node


def _consistent_value(node: Node) -> Node:
    """``2^3 = 8`` is 8. A chain of unequal numbers has no value."""
    first, *rest = node.args
    if all(_same_values(first, other) for other in rest):
        return _ungroup(node.args[-1])
    raise Undefined("a chain of unequal numbers")


def _items(node: Node) -> tuple[str, list[Item]]:
    """Return what kind of collection an answer is (list, set or one) and its items."""
    node = _ungroup(node)
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


def _expand(nodes) -> list[Item]:
    """Write out every plus-minus sign: one item for each choice of signs."""
    items = []
    for node in nodes:
        item = Item(node)
        if item.value.kind == "tuple":  # signs in different coordinates are independent
            choices = [_expand_signs(part) for part in item.value.args]
            values = [item.value._replace(args=args) for args in product(*choices)]
        else:
            values = _expand_signs(item.value)
        for value in values:
            expanded = Item(node)
            expanded.value = value
            items.append(expanded)
        if len(items) > MAX_ITEMS:
            raise Undefined("too many items")
    return items


def _expand_signs(node: Node) -> list[Node]:
    if not _has_sign(node):
        return [node]
    return [_choose_sign(node, upper) for upper in (True, False)]


def _has_sign(node: Node) -> bool:
    return node.kind == "pm" or any(isinstance(a, Node) and _has_sign(a) for a in node.args)


def _choose_sign(node: Node, upper: bool) -> Node:
    args = tuple(_choose_sign(a, upper) if isinstance(a, Node) else a for a in node.args)
    if node.kind != "pm":
        return node._replace(args=args)
    left, right = args
    if (node.value == "\\mp") == upper:
        right = Node("neg", (right,))
    return right if left is None else Node("add", (left, right))


def _gather_groups(items: list[Item]) -> list[Item]:
    """``p = 5, q = 2, p = 7, q = 2`` is two pairs: names that come round again make tuples."""
    names = [item.name for item in items]
    if None in names or len(set(names)) < 2:
        return items
    width = names.index(names[0], 1) if names[0] in names[1:] else 0
    if width < 2 or len(items) % width or names != names[:width] * (len(items) // width):
        return items
    groups = [items[i : i + width] for i in range(0, len(items), width)]
    return [Item(Node("tuple", tuple(i.value for i in group), "()")) for group in groups]


def _same_lists(gold: Node, answer: Node) -> bool:
    if _are_letters(gold) and _are_letters(answer):  # options: ABD is A, B, D
        return sorted(_letters(gold)) == sorted(_letters(answer))
    if _any_real_set(gold, answer):
        return _same_sets(gold, answer)
    gold_kind, golds = _items(gold)
    answer_kind, answers = _items(answer)
    if len(golds) == len(answers) == 1:
        return _same_items(golds[0], answers[0])
    if len(golds) == 1 and len(answers) > 1:
        return _tuple_as_list(golds[0], answers, answer_kind)
    if len(answers) == 1 and len(golds) > 1:
        return _tuple_as_list(answers[0], golds, gold_kind, swapped=True)
    if gold_kind == answer_kind == "set" or _are_tuples([*golds, *answers]):
        golds, answers = _distinct_items(golds), _distinct_items(answers)
    if len(golds) != len(answers):
        return False
    return _match(golds, answers)


def _are_tuples(items: list[Item]) -> bool:
    return all(item.value.kind == "tuple" for item in items)


def _distinct_items(items: list[Item]) -> list[Item]:
    kept: list[Item] = []
    for item in items:
        if not any(_same_items(item, other) for other in kept):
            kept.append(item)
    return kept


def _tuple_as_list(one: Item, many: list[Item], kind: str, swapped: bool = False) -> bool:
    """``(3, 2)`` and ``3, 2``: equal in that order. A set has no order, so it is no tuple."""
    parts = _coordinates(one.value)
    if parts is None or kind == "set" or len(parts) != len(many):
        return False
    if one.value.kind == "tuple" and one.value.value not in ("()", "[]"):
        return False
    pairs = zip(parts, (item.value for item in many), strict=True)
    return all(_same_values(b, a) if swapped else _same_values(a, b) for a, b in pairs)


def _match(golds: list[Item], answers: list[Item]) -> bool:
    """Match items one to one: by name if both name them, in order if one does, else in any."""
    gold_names, answer_names = _plain_names(golds), _plain_names(answers)
    if gold_names and answer_names and set(gold_names) == set(answer_names):
        named = dict(zip(answer_names, answers, strict=True))
        return all(
            _same_values(g.value, named[n].value) for n, g in zip(gold_names, golds, strict=True)
        )
    if all(_same_items(g, a) for g, a in zip(golds, answers, strict=True)):
        return True
    dots = any(item.value.kind == "dots" for item in (*golds, *answers))
    if dots or (bool(gold_names) != bool(answer_names) and _distinct(gold_names or answer_names)):
        return False
    left = list(answers)
    for gold in golds:
        found = next((a for a in left if _same_items(gold, a)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _plain_names(items: list[Item]) -> list[Node]:
    names = [item.name for item in items]
    return names if None not in names and len(set(names)) == len(names) else []


def _distinct(names: list[Node]) -> bool:
    """Different quantities (``a``, ``b``), rather than the numbered values of one (``x_1``)."""
    return not all(name.kind == "index" and name.args[0] == names[0].args[0] for name in names)


def _are_letters(node: Node) -> bool:
    return _letters(node) is not None


def _letters(node: Node) -> list[str] | None:
    """The options of a multiple-choice answer: ``A, C`` or ``AC``; None if it is not one."""
    node = _ungroup(node)
    if (node.kind == "mul" and node.value == "juxtaposed") or node.kind == "list":
        parts = [_letters(part) for part in node.args]
        if any(part is None for part in parts):
            return None
        letters = [letter for part in parts for letter in part]
        return letters if len(set(letters)) == len(letters) else None
    is_option = node.kind == "name" and len(node.value) == 1 and "A" <= node.value <= "H"
    return [node.value] if is_option else None


# --- sets of reals ---------------------------------------------------------------------------


def _set_node(node: Node) -> Node:
    node = _ungroup(node)
    if node.kind == "relation" and node.value == ("in",):
        return _ungroup(node.args[1])
    if node.kind == "relation" and node.value[0] == "=" and names_quantity(node.args[0]):
        inner = _ungroup(node.args[-1])
        return inner if len(node.args) == 2 else node
    return node


def _any_real_set(gold: Node, answer: Node) -> bool:
    """Say whether one of the two can only be a set of reals, and the other can be one."""
    nodes = [_set_node(gold), _set_node(answer)]
    if all(node.kind == "relation" for node in nodes):
        names = [frozenset().union(*(free_names(a) for a in n.args)) for n in nodes]
        return names[0] == names[1] and len(names[0]) == 1 and nodes[0].value != nodes[1].value
    if not any(_describes_set(node) for node in nodes):
        return False
    return all(
        _describes_set(node) or node.kind == "set" or (node.kind == "tuple" and len(node.args) == 2)
        for node in nodes
    )


def _describes_set(node: Node) -> bool:
    if node.kind != "list":
        return realsets.describes_set(node)
    parts = [_ungroup(part) for part in node.args]  # x < -1 or x = 0
    return any(realsets.describes_set(part) for part in parts) and all(
        realsets.describes_set(part) or (part.kind == "relation" and part.value == ("=",))
        for part in parts
    )


def _same_sets(gold: Node, answer: Node) -> bool:
    """Compare as sets of reals, at every sample of the letters that are in them."""
    gold, answer = _set_node(gold), _set_node(answer)
    decided = False
    for point in _points_for(free_names(gold) | free_names(answer)):
        try:
            sets = [realsets.build_set(n, Evaluator(point)) for n in (gold, answer)]
        except Undefined:
            if gold.kind == answer.kind == "relation":
                return _same_relations(gold, answer)
            if gold.kind == answer.kind == "list":
                return _match([Item(n) for n in gold.args], [Item(n) for n in answer.args])
            raise
        if not realsets.equal_sets(*sets):
            return False
        decided = True
    return decided


# --- single answers ----------------------------------------------------------------------------


def _same_items(gold: Item, answer: Item) -> bool:
    names = gold.name, answer.name
    relations = gold.node.kind == answer.node.kind == "relation"
    if relations and (names[0] is None) != (names[1] is None):
        return _same_relations(gold.node, answer.node)  # y = 2x + 3 and 2x - y + 3 = 0
    letters = [_name_letters(name) for name in names]
    if all(letters) and letters[0] != letters[1]:  # x = 5 does not say y = 5, nor AB = 5 AC = 5
        return False
    return _same_values(gold.value, answer.value)


def _name_letters(name: Node | None) -> list[str]:
    """The letters of a plain name (``x``, ``AB``, in any order); none for other names."""
    if name is None:
        return []
    if name.kind == "name":
        return [name.value] if len(name.value) == 1 else []
    if name.kind == "mul":
        return sorted(letter for part in name.args for letter in _name_letters(part))
    return []


def _same_values(gold: Node, answer: Node) -> bool:
    gold, answer = _ungroup(gold), _ungroup(answer)
    if gold == answer:
        return True
    if gold.kind == "mod" or answer.kind == "mod":
        return _same_residues(gold, answer)
    kinds = {gold.kind, answer.kind}
    if kinds & {"text", "dots"}:
        return False
    if kinds == {"relation"}:
        return _same_relations(gold, answer)
    if "relation" in kinds:
        return gold.kind == "relation" and _solves(gold, answer)
    if _coordinates(gold) is not None or _coordinates(answer) is not None:
        return _same_sequences(gold, answer)
    if "matrix" in kinds:
        return kinds == {"matrix"} and _same_matrices(gold, answer)
    if kinds & {"set", "list"}:
        if gold.kind != answer.kind or len(gold.args) != len(answer.args):
            return False
        return _same_lists(gold, answer) if gold.args else True
    if kinds == {"ratio"} and len(gold.args) == len(answer.args):
        return _same_ratios(gold, answer)
    return same_scalars(gold, answer)


def _same_residues(gold: Node, answer: Node) -> bool:
    """``3 (mod 7)``: residues of one modulus if both state it, else the number as it is."""
    if gold.kind != answer.kind:
        gold, answer = (n.args[0] if n.kind == "mod" else n for n in (gold, answer))
        return _same_values(gold, answer)
    (a, modulus), (b, other) = gold.args, answer.args
    difference = Node("div", (Node("add", (a, Node("neg", (b,)))), modulus))
    if not same_scalars(modulus, other) or free_names(difference):
        return same_scalars(modulus, other) and same_scalars(a, b)
    quotient = Evaluator(POINTS[0]).value(difference)
    return exact(quotient) and quotient.denominator == 1


def _coordinates(node: Node) -> tuple[Node, ...] | None:
    """The entries of a tuple or of a row or column vector; None for anything else."""
    if node.kind == "tuple":
        return node.args
    if node.kind == "matrix" and len(node.args) == 1:
        return node.args[0]
    if node.kind == "matrix" and all(len(row) == 1 for row in node.args):
        return tuple(row[0] for row in node.args)
    return None


def _same_sequences(gold: Node, answer: Node) -> bool:
    """Tuples and vectors, in order. Brackets count for pairs, where they tell intervals apart."""
    if gold.kind == answer.kind == "matrix":
        return _same_matrices(gold, answer)
    if "tuple" in (gold.kind, answer.kind):
        gold, answer = _nest_rows(gold), _nest_rows(answer)
    ours, theirs = _coordinates(gold), _coordinates(answer)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    if gold.kind == answer.kind == "tuple" and len(ours) == 2 and gold.value != answer.value:
        return False
    return all(_same_items(Item(g), Item(a)) for g, a in zip(ours, theirs, strict=True))


def _nest_rows(node: Node) -> Node:
    """Write a matrix as ``[[1, 2], [3, 4]]``; a row or column stays a vector."""
    if node.kind != "matrix" or _coordinates(node) is not None:
        return node
    return Node("tuple", tuple(Node("tuple", row, "[]") for row in node.args), "[]")


def _same_matrices(gold: Node, answer: Node) -> bool:
    if [len(row) for row in gold.args] != [len(row) for row in answer.args]:
        return False
    entries = ((g, a) for gs, as_ in zip(gold.args, answer.args, strict=True)
               for g, a in zip(gs, as_, strict=True))  # fmt: skip
    return all(_same_values(g, a) for g, a in entries)


def _same_ratios(gold: Node, answer: Node) -> bool:
    """Ratios are equal up to a factor: 2:4:6 is 1:2:3."""
    if any(arg.kind == "dots" for arg in (*gold.args, *answer.args)):
        pairs = zip(gold.args, answer.args, strict=True)
        return all(_same_values(g, a) for g, a in pairs)
    units = [{_unit(arg) for arg in node.args} - {None} for node in (gold, answer)]
    if all(units) and units[0] != units[1]:  # 10:30 am, 10:30 pm
        return False
    first = gold.args[0], answer.args[0]
    return all(
        same_scalars(Node("mul", (first[0], a)), Node("mul", (first[1], g)))
        for g, a in zip(gold.args[1:], answer.args[1:], strict=True)
    )


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~"}


def _same_relations(gold: Node, answer: Node) -> bool:
    """Equations equal up to a factor, inequalities up to a positive one; chains part by part."""
    if not set(gold.value) | set(answer.value) <= set(_FLIPPED):
        raise Undefined("relation without a rule")
    if len(gold.value) != len(answer.value):
        return False
    flipped = tuple(_FLIPPED[op] for op in reversed(answer.value))
    for operators, args in ((answer.value, answer.args), (flipped, answer.args[::-1])):
        if operators == gold.value and all(
            _same_values(g, a) for g, a in zip(gold.args, args, strict=True)
        ):
            return True
    if len(gold.value) > 1:
        return False
    return _proportional(gold, answer)


def _proportional(gold: Node, answer: Node) -> bool:
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
    if not all(_close(factor, factors[0]) for factor in factors):
        return False
    if gold.value[0] in ("=", "!="):
        return gold.value == answer.value
    if not is_real(factors[0]):
        return False
    operator = answer.value[0]
    positive = to_mp(factors[0]).real > 0
    return gold.value[0] == (operator if positive else _FLIPPED[operator])


def _solves(equation: Node, answer: Node) -> bool:
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

        def side(value: Value, point=point) -> mpf:
            return to_mp(Evaluator(point.with_value(name, value)).value(difference))

        at_root, slopes = side(root), [side(2) - side(1), side(3) - side(2), side(8) - side(7)]
        scale = max(abs(slope) for slope in slopes)
        if not scale or abs(at_root) > scale * mpf(10) ** -20:
            return False
        if any(abs(slope - slopes[0]) > scale * mpf(10) ** -20 for slope in slopes):
            return False
    return True


# --- scalars -------------------------------------------------------------------------------------


def same_scalars(gold: Node, answer: Node) -> bool:
    """Compare two expressions by value, in every reading of what only one of them marks.

    A percent or degree sign, a unit or a numeral's base that one side has and the other lacks
    may have been asked for in the question. Raises ``Undefined`` if neither has a value.
    """
    units = _unit(gold), _unit(answer)
    if all(units) and units[0] != units[1]:
        return _same_quantities(gold, answer, *units)
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
    for part in node.args:
        if isinstance(part, Node):
            features |= _features(part)
    return features


def _drop_base(node: Node) -> Node:
    if node.kind == "base":
        return node.args[0]
    args = tuple(_drop_base(a) if isinstance(a, Node) else a for a in node.args)
    return node._replace(args=args)


def _unit(node: Node) -> str | None:
    if node.kind == "unit":
        return node.value
    return _unit(node.args[0]) if node.kind == "neg" else None


def _same_quantities(gold: Node, answer: Node, unit: str, other: str) -> bool:
    """Both state a unit and the units differ: equal only if a known conversion makes them so."""
    if unit not in CONVERSIONS or other not in CONVERSIONS:
        return _is_generic(unit) or _is_generic(other) if unit in CONVERSIONS else False
    (kind, factor), (other_kind, other_factor) = CONVERSIONS[unit], CONVERSIONS[other]
    if kind != other_kind:
        return False
    scale = Node("number", (), Number(Fraction(other_factor) / Fraction(factor), 0, 0))
    return same_scalars(_strip_unit(gold), Node("mul", (_strip_unit(answer), scale)))


def _is_generic(unit: str) -> bool:
    return unit.replace("square", "").replace("cubic", "") == "unit"


def _strip_unit(node: Node) -> Node:
    if node.kind == "neg":
        return Node("neg", (_strip_unit(node.args[0]),))
    return node.args[0] if node.kind == "unit" else node


def _same_in_mode(gold: Node, answer: Node, mode: Mode) -> bool:
    names = free_names(gold) | free_names(answer)
    if not names:
        return _same_constants(gold, answer, mode)
    agreed, complex_agreed, complex_differ = 0, 0, 0
    for point in _points_for(names):
        evaluators = Evaluator(point, mode), Evaluator(point, mode)
        try:
            a, b = evaluators[0].value(gold), evaluators[1].value(answer)
        except Undefined:
            continue
        same = _close(a, b)
        if not any(evaluator.has_left_reals for evaluator in evaluators):
            if not same:
                return False
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


def _points_for(names: set[str]) -> tuple[Point, ...]:
    return POINTS if names else POINTS[:1]


def _mentions_i(node: Node) -> bool:
    if node == Node("name", (), "i"):
        return True
    return any(_mentions_i(arg) for arg in node.args if isinstance(arg, Node))


def _confirm(gold: Node, answer: Node, mode: Mode, names: set[str]) -> bool:
    """Check an agreement with many more digits, where a near miss of the first pass shows."""
    with mp.workdps(MORE_DIGITS):
        for point in _points_for(names):
            evaluators = Evaluator(point, mode), Evaluator(point, mode)
            try:
                a, b = evaluators[0].value(gold), evaluators[1].value(answer)
            except Undefined:
                continue
            left = any(evaluator.has_left_reals for evaluator in evaluators)
            if not left and not _close(a, b):
                return False
    return True


def _close(a: Value, b: Value) -> bool:
    """Equal up to rounding error: exactly if both are exact, else to most of the digits."""
    if exact(a) and exact(b):
        return a == b
    a, b = to_mp(a), to_mp(b)
    if a == b or mp.isinf(a) or mp.isinf(b):
        return a == b
    difference, scale = abs(a - b), max(abs(a), abs(b))
    if difference > scale * mpf(10) ** (18 - mp.dps):
        # Only rounding error is left of something that cancelled, when more digits leave less.
        return scale < mpf(10) ** (12 - mp.dps) and (a == 0 or b == 0)
    return True


def _same_constants(gold: Node, answer: Node, mode: Mode) -> bool:
    point = POINTS[0]
    a, b = (Evaluator(point, mode).value(node) for node in (gold, answer))
    if _close(a, b):
        if exact(a) and exact(b):
            return True
        for value, node in ((a, answer), (b, gold)):
            if value == 0:
                return _vanishes(node, mode)
        with mp.workdps(MORE_DIGITS):
            return _close(*(Evaluator(point, mode).value(node) for node in (gold, answer)))
    return _is_rounding(gold, a, b, mode, GOLD_DIGITS) or _is_rounding(
        answer, b, a, mode, ANSWER_DIGITS
    )


def _vanishes(node: Node, mode: Mode) -> bool:
    """Tell zero from a tiny number: of zero, more digits leave less."""
    sizes = []
    for digits in (MORE_DIGITS, 2 * MORE_DIGITS):
        with mp.workdps(digits):
            sizes.append(abs(to_mp(Evaluator(POINTS[0], mode).value(node))))
    return sizes[1] <= sizes[0] * mpf(10) ** -DIGITS


def _is_rounding(node: Node, value: Value, other: Value, mode: Mode, least_digits: int) -> bool:
    """Say whether ``node`` is a decimal literal that ``other``, not itself one, rounds to."""
    literal, scale = _literal(node, mode)
    # 41.4% has three decimals.
    if (
        literal is None
        or literal.decimals < 2 - 2 * (scale == mpf(1) / 100)
        or literal.significant < least_digits
    ):
        return False
    if not is_real(other) or (exact(other) and _terminates(other)):
        return False
    step = mpf(10) ** -literal.decimals * scale
    error = abs(to_mp(other).real - to_mp(value).real)
    return error <= (step if literal.significant >= FLOAT_DIGITS else step / 2)


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


# --- renaming ------------------------------------------------------------------------------------


def _rename_parameter(gold: Node, answer: Node) -> tuple[Node, Node]:
    """Give a free parameter one name: ``f(n) = n`` and ``f(m) = m``, ``k\\pi`` and ``n\\pi``.

    Only where the letter is the answer's own: the argument of the function that it defines, or
    the one integer parameter of a solution of the form ``x = ...`` or ``(x, y) = ...``.
    """
    ours, theirs = Item(gold), Item(answer)
    definitions = [i.name for i in (ours, theirs) if i.name is not None and i.name.kind == "apply"]
    if len(definitions) == 2 and definitions[0].args[0] == definitions[1].args[0]:
        new, old = (name.args[1] for name in definitions)
        if old.kind == new.kind == "name" and all(len(d.args) == 2 for d in definitions):
            return gold, _rename(answer, old.value, new.value)
    named = [item for item in (ours, theirs) if item.name is not None]
    values = [free_names(ours.value), free_names(theirs.value)]
    if any(len(names) != 1 or "_index" in names for names in values):
        return gold, answer
    new, old = (next(iter(names)) for names in values)
    if new == old or any(free_names(item.name) & {new, old} for item in named):
        return gold, answer
    is_family = (named and all(item.value.kind == "tuple" for item in (ours, theirs))) or (
        {new, old} <= set("kmnt") and _mentions_pi(ours.value) and _mentions_pi(theirs.value)
    )
    return (gold, _rename(answer, old, new)) if is_family else (gold, answer)


def _mentions_pi(node: Node) -> bool:
    if node.kind == "degree" or node == Node("name", (), "pi"):
        return True
    return any(_mentions_pi(arg) for arg in node.args if isinstance(arg, Node))


def _rename(node: Node, old: str, new: str) -> Node:
    if node.kind == "name":
        return node._replace(value=new) if node.value == old else node
    args = tuple(_rename(a, old, new) if isinstance(a, Node) else a for a in node.args)
    return node._replace(args=args)
