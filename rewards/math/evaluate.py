"""Evaluate a parsed expression at a point, exactly where it can be, to many digits where not.

Two expressions are compared by their values at a few fixed pseudo-random points, which for
analytic expressions is a test of identity (Schwartz-Zippel for polynomials). It costs
milliseconds, where computer algebra may take for ever. What has no numeric meaning here (an
unbounded sum, ``F_{n-1}``, ``\\int``) is evaluated as an unknown function of the values inside
it, so that equal arguments give equal values and nothing else does.

Cost is bounded: sizes of exact numbers, magnitudes of arguments and the number of steps have
caps; beyond them a value is ``Undefined``.
"""

import functools
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm
from typing import TypeAlias, TypeGuard

import mpmath
from mpmath import mp, mpc, mpf

from rewards.math.node import Node
from rewards.math.vocabulary import ANALYTIC_FUNCTIONS

MAX_BITS = 100_000  # of an exact number
MAX_EXPONENT = 10**6  # |log| of an inexact number
MAX_STEPS = 100_000
MAX_TERMS = 1_000  # of a sum or product that is written out

# Letters that conventionally stand for integers; all others are sampled between integers.
INTEGER_LETTERS = frozenset("knmjNM")

Value: TypeAlias = int | Fraction | mpf | mpc


class Undefined(ValueError):
    """The expression has no value here, or none within the limits."""


class Mode:
    """How the ambiguous notations of one comparison are read."""

    def __init__(self, percent: bool = True, degrees: bool = True, log10: bool = False):
        self.percent = Fraction(1, 100) if percent else 1
        self.degrees = degrees  # True: converted to radians
        self.log10 = log10


class Point:
    """A deterministic pseudo-random value for every name."""

    def __init__(self, seed: int, residue: int, low: int, high: int, sign: int = 1):
        self.seed, self.residue = seed, residue
        self.low, self.high, self.sign = low, high, sign
        self.given: Mapping[str, Value] = {}

    def with_value(self, name: str, value: Value) -> "Point":
        point = Point(self.seed, self.residue, self.low, self.high, self.sign)
        point.given = {**self.given, name: value}
        return point

    def sample(self, name: str) -> Value:
        if name in self.given:
            return self.given[name]
        if name in INTEGER_LETTERS:
            return 6 * _draw(self.seed, name, 1, 3) + self.residue
        return self.sign * Fraction(_draw(self.seed, name, self.low, self.high), 211)


@functools.lru_cache(maxsize=256)  # seeding costs as much as parsing a short answer
def _draw(seed: int, name: str, low: int, high: int) -> int:
    return random.Random(f"{seed}:{name}").randint(low, high)


# Reals between 0 and 1 (where roots and inverse functions are real), above 1, and below 0;
# integers of all residues modulo 2 and 3, which floors and powers of -1 depend on.
POINTS = (Point(1, 2, 20, 200), Point(2, 3, 230, 900), Point(3, 7, 230, 900, sign=-1))
# Far from zero, for floor, gcd and the like: near zero they take few values.
FAR_POINTS = (Point(4, 11, 3_000, 20_000), Point(5, 10, 3_000, 20_000))


def exact(value: Value) -> TypeGuard[int | Fraction]:
    return isinstance(value, (int, Fraction))


def is_integer(value: Value) -> bool:
    return exact(value) and value.denominator == 1


def to_mp(value: Value) -> mpf | mpc:
    if isinstance(value, Fraction):
        return mpf(value.numerator) / value.denominator
    return mpf(value) if isinstance(value, int) else value


def is_real(value: Value) -> bool:
    return not isinstance(value, mpc) or abs(value.imag) <= abs(value) * mpf(10) ** (10 - mp.dps)


def real_part(value: Value) -> Value:
    if not is_real(value):
        raise Undefined("not real")
    return value.real if isinstance(value, mpc) else value


class Evaluator:
    """Evaluates nodes at one point in one mode, counting its steps."""

    def __init__(self, point: Point, mode: Mode | None = None):
        self.point = point
        self.mode = mode or Mode()
        self.steps = 0
        self.has_left_reals = False  # an intermediate value was complex

    def value(self, node: Node) -> Value:
        """Return the value of a scalar expression; raise ``Undefined`` if it has none."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Undefined("too many steps")
        method = getattr(self, "_" + node.kind, None)
        if method is None:
            raise Undefined(f"{node.kind} is not a number")
        try:
            value = _checked(method(node))
        except Undefined:
            raise
        except (ArithmeticError, ValueError, TypeError, mp.NoConvergence) as error:  # mpmath's
            raise Undefined(f"{type(error).__name__}: {error}") from error
        if isinstance(value, mpc) and not is_real(value):
            self.has_left_reals = True
        return value

    def _number(self, node: Node) -> Value:
        value = node.value.value
        return int(value) if value.denominator == 1 else value

    def _group(self, node: Node) -> Value:
        return self.value(node.args[0])

    def _unit(self, node: Node) -> Value:
        return self.value(node.args[0])

    def _name(self, node: Node) -> Value:
        name = node.value
        if name in self.point.given:
            return self.point.given[name]
        constant = {"pi": mp.pi, "e": mp.e, "infinity": mp.inf}.get(name)
        if constant is not None:
            return +constant
        if name == "i":
            return mpc(0, 1)
        return self.point.sample(name)

    def _neg(self, node: Node) -> Value:
        return -self.value(node.args[0])

    def _add(self, node: Node) -> Value:
        return _binary(self.value(node.args[0]), self.value(node.args[1]), lambda a, b: a + b)

    def _mul(self, node: Node) -> Value:
        return _binary(self.value(node.args[0]), self.value(node.args[1]), lambda a, b: a * b)

    def _div(self, node: Node) -> Value:
        return divide(self.value(node.args[0]), self.value(node.args[1]))

    _frac = _div

    def _ratio(self, node: Node) -> Value:
        if len(node.args) != 2:
            raise Undefined("a ratio of several terms is not a number")
        return self._div(node)

    def _pow(self, node: Node) -> Value:
        base, exponent = node.args
        if exponent.kind == "name" and exponent.value in ("T", "prime"):
            return self._opaque("transpose", base)
        return power(self.value(base), self.value(exponent))

    def _root(self, node: Node) -> Value:
        return root(self.value(node.args[0]), self.value(node.args[1]))

    def _percent(self, node: Node) -> Value:
        return _binary(self.value(node.args[0]), self.mode.percent, lambda a, b: a * b)

    def _degree(self, node: Node) -> Value:
        value = self.value(node.args[0])
        return to_mp(value) * mp.pi / 180 if self.mode.degrees else value

    def _mod(self, node: Node) -> Value:
        return self.value(node.args[0])

    def _abs(self, node: Node) -> Value:
        return abs(self.value(node.args[0]))

    def _base(self, node: Node) -> Value:
        digits, base = (int(arg.value.value) for arg in node.args)
        try:
            return int(str(digits), base)
        except ValueError as error:
            raise Undefined("not a numeral of that base") from error

    def _factorial(self, node: Node) -> Value:
        value = self.value(node.args[0])
        if not exact(value):
            return mpmath.gamma(_limited(value, 10_000) + 1)
        if value.denominator != 1:
            return mpmath.gamma(_limited(to_mp(value), 10_000) + 1)
        if not 0 <= value <= 5_000:
            raise Undefined("factorial out of range")
        return factorial(int(value))

    def _binomial(self, node: Node) -> Value:
        top, bottom = (self.value(arg) for arg in node.args)
        if is_integer(top) and is_integer(bottom) and 0 <= bottom <= top <= 10_000:
            return comb(int(top), int(bottom))
        top, bottom = _limited(to_mp(top), 10_000), _limited(to_mp(bottom), 10_000)
        return mpmath.binomial(top, bottom)

    def _apply(self, node: Node) -> Value:
        # f(x) and a(b + c) look alike. As a product both are compared consistently.
        name, *args = node.args
        if len(args) == 1:
            return _binary(self.value(name), self.value(args[0]), lambda a, b: a * b)
        return self._opaque("apply", name, *args)

    def _index(self, node: Node) -> Value:
        return self.point.sample("_".join(self.key(part) for part in node.args))

    def _big(self, node: Node) -> Value:
        lower, upper, body = node.args
        variable, start = None, lower
        if lower is not None and lower.kind == "relation" and lower.args[0].kind == "name":
            variable, start = lower.args[0].value, lower.args[1]
        if node.value in ("sum", "prod") and variable and upper is not None:
            first, last = self.value(start), self.value(upper)
            if is_integer(first) and is_integer(last) and 0 <= last - first < MAX_TERMS:
                return self._write_out(node.value, body, variable, int(first), int(last))
        inner = self if variable is None else self._bind(variable, Fraction(977, 211))
        bounds = [self.key(bound) if bound is not None else "" for bound in (start, upper)]
        return self.point.sample(f"{node.value} {bounds} {inner.key(body)}")

    def _bind(self, name: str, value: Value) -> "Evaluator":
        inner = Evaluator(self.point.with_value(name, value), self.mode)
        inner.steps = self.steps
        return inner

    def _write_out(self, kind: str, body: Node, name: str, first: int, last: int) -> Value:
        total: Value = 0 if kind == "sum" else 1
        for index in range(first, last + 1):
            inner = self._bind(name, index)
            term = inner.value(body)
            self.steps = inner.steps
            join = (lambda a, b: a + b) if kind == "sum" else (lambda a, b: a * b)
            total = _checked(_binary(total, term, join))
        return total

    def _function(self, node: Node) -> Value:
        name = node.value
        inner = Evaluator(self.point, Mode(True, True, self.mode.log10))
        inner.steps = self.steps
        args = [inner.value(arg) for arg in node.args]
        self.steps = inner.steps
        if name in ("max", "min", "gcd", "lcm", "floor", "ceil"):
            return _integer_function(name, args)
        if name == "log" and len(args) == 2:
            return divide(logarithm(args[0]), logarithm(args[1]))
        if len(args) != 1:
            raise Undefined(f"{name} of {len(args)} arguments")
        if name == "ln" or (name == "log" and not self.mode.log10):
            return logarithm(args[0])
        if name in ("log", "lg"):
            return divide(logarithm(args[0]), logarithm(10))
        if name == "abs":
            return abs(args[0])
        if name == "exp":
            return mpmath.exp(_limited(to_mp(args[0])))
        if name in _MP_FUNCTIONS:
            return _MP_FUNCTIONS[name](_limited(to_mp(args[0])))
        return self._opaque(name, *node.args)

    def _opaque(self, name: str, *args: Node) -> Value:
        return self.point.sample(f"{name} {[self.key(arg) for arg in args]}")

    def key(self, node: Node) -> str:
        """A key by value, so that equal arguments of an unknown function compare equal."""
        if node.kind == "text":
            return str(node.value)
        if node.kind == "name":
            if node.value in self.point.given:
                return _print(self.point.given[node.value])
            return _print(self.value(node)) if node.value in ("pi", "e") else str(node.value)
        try:
            return _print(self.value(node))
        except Undefined:
            parts = [self.key(a) for a in node.args if isinstance(a, Node)]
            return f"{node.kind} {node.value} {parts}"


def _print(value: Value) -> str:
    value = to_mp(value)
    return mpmath.nstr(value, 25) if mpmath.isfinite(value) else str(value)


def _binary(a: Value, b: Value, operation: Callable[[Value, Value], Value]) -> Value:
    if exact(a) and exact(b):
        return operation(a, b)
    return operation(to_mp(a), to_mp(b))


def _checked(value: Value) -> Value:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise Undefined("number too large")
    elif isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise Undefined("number too large")
    elif mpmath.isnan(value):
        raise Undefined("not a number")
    return value


def _limited(value: mpf | mpc, limit: int = MAX_EXPONENT) -> mpf | mpc:
    if abs(value) > limit:
        raise Undefined("argument too large")
    return value


def divide(a: Value, b: Value) -> Value:
    if b == 0:
        raise Undefined("division by zero")
    if exact(a) and exact(b):
        return Fraction(a) / Fraction(b)
    return to_mp(a) / to_mp(b)


def power(base: Value, exponent: Value) -> Value:
    if exact(exponent) and exponent.denominator == 1 and exact(base):
        exponent = int(exponent)
        bits = base.numerator.bit_length() + base.denominator.bit_length()
        if base in (0, 1, -1) or bits * abs(exponent) <= MAX_BITS:
            if base == 0 and exponent <= 0:
                raise Undefined("zero to a power that is not positive")
            return Fraction(base) ** exponent
    if base == 0:
        if not is_real(exponent) or real_part(exponent) <= 0:
            raise Undefined("zero to a power that is not positive")
        return 0
    is_odd_root = exact(exponent) and exponent.denominator > 1 and exponent.denominator % 2 == 1
    if is_odd_root and is_real(base) and real_part(base) < 0:
        size = power(-real_part(base), exponent)
        return -size if exponent.numerator % 2 else size
    base, exponent = to_mp(base), to_mp(exponent)
    if mpmath.isinf(base) or mpmath.isinf(exponent):
        raise Undefined("infinite power")
    _limited(exponent * mpmath.log(base), 10 * MAX_EXPONENT)
    return base**exponent


def root(value: Value, degree: Value) -> Value:
    """The principal root; but the real one of a negative number where the degree is odd."""
    if degree == 2 and exact(value) and value >= 0:
        top, bottom = isqrt(value.numerator), isqrt(value.denominator)
        if top * top == value.numerator and bottom * bottom == value.denominator:
            return Fraction(top, bottom)
    odd = exact(degree) and degree.denominator == 1 and degree % 2 == 1
    if odd and is_real(value) and real_part(value) < 0:
        return -root(-real_part(value), degree)
    if value == 0:
        return 0
    return power(value, divide(1, degree))


def logarithm(value: Value) -> Value:
    if value == 0:
        raise Undefined("logarithm of zero")
    return mpmath.log(to_mp(value))


def _integer_function(name: str, args: list[Value]) -> Value:
    values = [real_part(arg) for arg in args]
    if name in ("max", "min"):
        return (max if name == "max" else min)(values, key=to_mp)
    if name in ("gcd", "lcm"):
        if not all(exact(v) and v.denominator == 1 for v in values):
            raise Undefined(f"{name} of something else than integers")
        return (gcd if name == "gcd" else lcm)(*(int(v) for v in values))
    if len(values) != 1:
        raise Undefined(f"{name} of several arguments")
    value = values[0]
    if not exact(value):
        nearest = mpmath.nint(value)
        if abs(value - nearest) < mpf(10) ** (10 - mp.dps):
            return int(nearest)
        return int(mpmath.floor(value) if name == "floor" else mpmath.ceil(value))
    return value.__floor__() if name == "floor" else value.__ceil__()


_MP_FUNCTIONS = {name: getattr(mpmath, name) for name in ANALYTIC_FUNCTIONS}
