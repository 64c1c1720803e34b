"""Compare two parsed answers by structure and value. The conventions are in ``grading``."""

from itertools import chain

from mpmath import mp

from rewards.math import real_sets
from rewards.math.evaluate import INTEGER_LETTERS, POINTS, Evaluator, Undefined, exact
from rewards.math.forms import (
    Item,
    read_items,
    read_vector,
    rename_parameter,
    simplify_form,
    spread_chain,
    ungroup,
)
from rewards.math.node import Node, read_number, rows_of
from rewards.math.relations import FLIPPED, are_proportional, solves
from rewards.math.scalars import DIGITS, points_for, same_scalars, strip_unit, unit_of
from rewards.math.structure import free_names, names_quantity


def same_answer(gold: Node, answer: Node) -> bool:
    """Say whether two answers are equal; raise ``Undefined`` if that cannot be decided."""
    with mp.workdps(DIGITS):
        if gold == answer:
            return True
        gold, answer = rename_parameter(simplify_form(gold), simplify_form(answer))
        return _same_lists(gold, answer)


def has_value(gold: Node) -> bool:
    """Say whether a gold can be compared with anything: with a number, or with an interval."""
    zero, one = (Node("number", (), read_number(digits)) for digits in "01")
    probe = Node("tuple", (zero, one), "[)") if _describes_set(_set_node(gold)) else zero
    try:
        same_answer(gold, probe)
    except (Undefined, RecursionError):
        return False
    return True


# --- lists ---


def _same_lists(gold: Node, answer: Node) -> bool:
    options = _letters(gold), _letters(answer)
    if options[0] is not None and options[1] is not None:  # ABD is A, B, D
        return sorted(options[0]) == sorted(options[1])
    if _any_real_set(gold, answer):
        return _same_sets(gold, answer)
    gold_kind, golds = read_items(gold)
    answer_kind, answers = read_items(answer)
    golds, answers = _spread(golds, answers), _spread(answers, golds)
    if len(golds) == len(answers) == 1:
        return _same_items(golds[0], answers[0])
    if len(golds) == 1 and len(answers) > 1:
        if answer.kind == "list" and answer.value == "or" and _agree(answers):
            return all(_same_items(golds[0], item) for item in answers)
        return _tuple_as_list(golds[0], answers, answer_kind)
    if len(answers) == 1 and len(golds) > 1:
        return _tuple_as_list(answers[0], golds, gold_kind, swapped=True)
    if gold_kind == answer_kind == "set" or _are_tuples([*golds, *answers]):
        golds, answers = _distinct_items(golds), _distinct_items(answers)
    if len(golds) != len(answers):
        return False
    return _match(golds, answers)


def _agree(items: list[Item]) -> bool:
    """Say whether alternatives are one value written in several ways: 3/4 or 0.75."""
    return all(_same_values(items[0].value, item.value) for item in items[1:])


def _spread(items: list[Item], others: list[Item]) -> list[Item]:
    """Spread ``x = y = 1`` over its names where the other answer has as many values."""
    if len(items) != 1:
        return items
    spread = spread_chain(items[0])
    coordinates = _coordinates(others[0].value) if len(others) == 1 else None
    width = len(coordinates) if coordinates is not None else len(others)
    return spread if len(spread) == width else items


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
    names = [item.name for item in items if item.name is not None]
    return names if len(names) == len(items) and len(set(names)) == len(names) else []


def _distinct(names: list[Node]) -> bool:
    """Different quantities (``a``, ``b``), rather than the numbered values of one (``x_1``)."""
    return not all(name.kind == "index" and name.args[0] == names[0].args[0] for name in names)


def _letters(node: Node) -> list[str] | None:
    """The options of a multiple-choice answer: ``A, C`` or ``AC``; None if it is not one."""
    node = ungroup(node)
    if (node.kind == "mul" and node.value == "juxtaposed") or node.kind == "list":
        letters: list[str] = []
        for part in node.args:
            more = _letters(part)
            if more is None:
                return None
            letters += more
        return letters if len(set(letters)) == len(letters) else None
    is_option = node.kind == "name" and len(node.value) == 1 and "A" <= node.value <= "H"
    return [node.value] if is_option else None


# --- sets of reals ---


def _set_node(node: Node) -> Node:
    node = ungroup(node)
    if node.kind == "relation" and node.value == ("in",):
        return ungroup(node.args[1])
    if node.kind == "relation" and node.value[0] == "=" and names_quantity(node.args[0]):
        inner = ungroup(node.args[-1])
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


def _kinds_within(node: Node) -> set[str]:
    return {part.kind for part in node.args} if node.kind == "list" else {node.kind}


def _describes_set(node: Node) -> bool:
    if node.kind != "list":
        return real_sets.describes_set(node)
    parts = [ungroup(part) for part in node.args]  # x < -1 or x = 0
    return any(real_sets.describes_set(part) for part in parts) and all(
        real_sets.describes_set(part) or (part.kind == "relation" and part.value == ("=",))
        for part in parts
    )


def _same_sets(gold: Node, answer: Node) -> bool:
    """Compare as sets of reals, at every sample of the letters that are in them."""
    gold, answer = _set_node(gold), _set_node(answer)
    conditions = all("relation" in _kinds_within(node) for node in (gold, answer))
    if conditions and real_sets.unknowns(gold) != real_sets.unknowns(answer):
        return False  # x > 1 does not say y > 1
    decided = False
    for point in points_for(free_names(gold) | free_names(answer)):
        try:
            sets = [real_sets.build_set(n, Evaluator(point)) for n in (gold, answer)]
        except Undefined:
            if gold.kind == answer.kind == "relation":
                return _same_relations(gold, answer)
            if gold.kind == answer.kind == "list":
                return _match([Item(n) for n in gold.args], [Item(n) for n in answer.args])
            raise
        if not real_sets.equal_sets(*sets):
            return False
        decided = True
    return decided


# --- single answers ---


def _same_items(gold: Item, answer: Item) -> bool:
    name, other = gold.name, answer.name
    relations = gold.node.kind == answer.node.kind == "relation"
    if relations and (name is None) != (other is None):
        return _same_relations(gold.node, answer.node)  # y = 2x + 3 and 2x - y + 3 = 0
    if name and other and _are_other_terms(name, other):  # x_{n+1} = ... does not say x_{n-1} = ...
        return False
    letters = _name_letters(name), _name_letters(other)
    if all(letters) and letters[0] != letters[1]:  # x = 5 does not say y = 5, nor AB = 5 AC = 5,
        return relations and _same_relations(gold.node, answer.node)  # but x = 2y says y = x/2
    return _same_values(gold.value, answer.value)


def _are_other_terms(gold: Node, answer: Node) -> bool:
    """Say whether two names are different terms of one sequence: a_n, a_{n+1}."""
    if gold.kind != "index" or answer.kind != "index" or gold.args[0] != answer.args[0]:
        return False
    scripts = gold.args[-1], answer.args[-1]
    are_numbers = all(s.kind != "text" and free_names(s) <= INTEGER_LETTERS for s in scripts)
    return are_numbers and not same_scalars(*scripts)


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
    gold, answer = ungroup(gold), ungroup(answer)
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
        return gold.kind == "relation" and solves(gold, answer)
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
        residue, family = (gold, answer) if gold.kind == "mod" else (answer, gold)
        if len(free_names(family)) == 1 and not free_names(residue):
            return _is_residue_class(residue, family)
        gold, answer = (n.args[0] if n.kind == "mod" else n for n in (gold, answer))
        return _same_values(gold, answer)
    (a, modulus), (b, other) = gold.args, answer.args
    difference = Node("div", (Node("add", (a, Node("neg", (b,)))), modulus))
    if not same_scalars(modulus, other) or free_names(difference):
        return same_scalars(modulus, other) and same_scalars(a, b)
    quotient = Evaluator(POINTS[0]).value(difference)
    return exact(quotient) and quotient.denominator == 1


def _is_residue_class(residue: Node, family: Node) -> bool:
    """``7k + 2`` for ``2 (mod 7)``: linear in one whole number, with the modulus for its slope."""
    (name,) = free_names(family)
    if name not in INTEGER_LETTERS:
        return False
    values = [Evaluator(POINTS[0].with_value(name, k)).value(family) for k in (0, 1, 2)]
    start, modulus = (Evaluator(POINTS[0]).value(arg) for arg in residue.args)
    if not all(exact(v) for v in (*values, start, modulus)) or not modulus:
        return False
    slope = values[1] - values[0]
    is_linear = values[2] - values[1] == slope and abs(slope) == abs(modulus)
    return is_linear and (values[0] - start) % modulus == 0


def _coordinates(node: Node) -> tuple[Node, ...] | None:
    """The entries of a tuple or of a row or column vector; None for anything else."""
    if node.kind == "tuple":
        return node.args
    rows = rows_of(node) if node.kind == "matrix" else ()
    if len(rows) == 1:
        return rows[0]
    if rows and all(len(row) == 1 for row in rows):
        return tuple(row[0] for row in rows)
    return None


def _same_sequences(gold: Node, answer: Node) -> bool:
    """Tuples and vectors, in order. Brackets count for pairs, where they tell intervals apart."""
    if gold.kind == answer.kind == "matrix":
        return _same_matrices(gold, answer)
    if "tuple" in (gold.kind, answer.kind):
        gold, answer = _nest_rows(gold), _nest_rows(answer)
    ours, theirs = _coordinates(gold), _coordinates(answer)
    if ours is None and theirs is not None:
        ours = read_vector(gold, len(theirs))
    if theirs is None and ours is not None:
        theirs = read_vector(answer, len(ours))
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    if gold.kind == answer.kind == "tuple" and len(ours) == 2 and gold.value != answer.value:
        return False
    return all(_same_items(Item(g), Item(a)) for g, a in zip(ours, theirs, strict=True))


def _nest_rows(node: Node) -> Node:
    """Write a matrix as ``[[1, 2], [3, 4]]``; a row or column stays a vector."""
    if node.kind != "matrix" or _coordinates(node) is not None:
        return node
    return Node("tuple", tuple(Node("tuple", row, "[]") for row in rows_of(node)), "[]")


def _same_matrices(gold: Node, answer: Node) -> bool:
    rows, others = rows_of(gold), rows_of(answer)
    if [len(row) for row in rows] != [len(row) for row in others]:
        return False
    entries = zip(chain(*rows), chain(*others), strict=True)
    return all(_same_values(g, a) for g, a in entries)


def _same_ratios(gold: Node, answer: Node) -> bool:
    """Ratios are equal up to a factor: 2:4:6 is 1:2:3."""
    if any(arg.kind == "dots" for arg in (*gold.args, *answer.args)):
        pairs = zip(gold.args, answer.args, strict=True)
        return all(_same_values(g, a) for g, a in pairs)
    if gold.value == answer.value == "clock":  # 6:30 is no ratio that 1:05 could be equal to
        pairs = zip(gold.args, answer.args, strict=True)
        if not all(same_scalars(*map(strip_unit, pair)) for pair in pairs):
            return False
    units = [{unit_of(arg) for arg in node.args} - {None} for node in (gold, answer)]
    if all(units) and units[0] != units[1]:  # 10:30 am, 10:30 pm
        return False
    first = gold.args[0], answer.args[0]
    if any(units) or any(_is_zero(arg) for arg in (*gold.args, *answer.args)):  # 11:00 is a time
        return all(same_scalars(g, a) for g, a in zip(gold.args, answer.args, strict=True))
    return all(
        same_scalars(Node("mul", (first[0], a)), Node("mul", (first[1], g)))
        for g, a in zip(gold.args[1:], answer.args[1:], strict=True)
    )


# --- equations and inequalities ---


def _is_zero(node: Node) -> bool:
    return node.kind == "number" and node.value.value == 0


def _same_relations(gold: Node, answer: Node) -> bool:
    """Equations equal up to a factor, inequalities up to a positive one; chains part by part."""
    if len(gold.value) != len(answer.value):
        return False
    if not set(gold.value) | set(answer.value) <= set(FLIPPED):  # congruence, parallels, ...
        pairs = zip(gold.args, answer.args, strict=True)
        return bool(gold.value == answer.value) and all(_same_values(g, a) for g, a in pairs)
    flipped = tuple(FLIPPED[op] for op in reversed(answer.value))
    for operators, args in ((answer.value, answer.args), (flipped, answer.args[::-1])):
        if operators == gold.value and all(
            _same_values(g, a) for g, a in zip(gold.args, args, strict=True)
        ):
            return True
    if len(gold.value) > 1:
        return False
    return are_proportional(gold, answer)
