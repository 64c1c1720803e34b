"""Plain data that crosses between a judged program and its judge, and nothing else.

Values of Python's own types become JSON and come back as exactly those types: whatever an object
overrides (``__eq__``, ``__hash__``, ``__class__``) stays on its own side, and a subclass of a
builtin type arrives as the builtin value that it holds. JSON's own types stand for themselves,
the others are objects with one key, the type's name. Floats are exact, also nan and inf.

Other objects cross as references, if the ends agree to (``Encoder``): a number that only the side
which owns the object can make anything of.
"""

import builtins
import json
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeVar

T = TypeVar("T")
Refer = Callable[[object], object]
Resolve = Callable[[str, object], object]
Encoder = Callable[[Any, Refer], object]

_HEADER = struct.Struct("!I")
MAX_FRAME_BYTES = 32 << 20
_MORE_FRAMES = 3_000  # for values: they may be nested more deeply than functions call each other
_PLAIN_INT_BITS = 2_000  # longer ones travel in hex: Python limits the digits of decimal ones

# Types, and functions that only compute: they cross by name, and each side takes its own.
_FUNCTIONS = "abs all any ascii bin chr divmod hex len max min oct ord pow repr round sorted sum"
_BUILTINS = {name: value for name, value in vars(builtins).items() if isinstance(value, type)} | {
    name: getattr(builtins, name) for name in _FUNCTIONS.split()
}
_BUILTIN_NAMES = {id(value): name for name, value in reversed(_BUILTINS.items())}
_PASSED_AS_THEY_ARE = {bool, str, float, type(None)}


class PlainDataError(ValueError):
    """A value that cannot cross, or a message that is not what was agreed on."""


def _deeply(function: Callable[..., T], *args: object) -> T:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(min(limit + _MORE_FRAMES, 2**31 - 1))
    try:
        return function(*args)
    finally:
        sys.setrecursionlimit(limit)


def send_frame(fd: int, message: object) -> None:
    """Write one message; raise ``PlainDataError`` if it is too long, ``OSError`` if none reads."""
    body = _deeply(json.dumps, message).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise PlainDataError(f"a value of {len(body)} bytes is too large to be judged")
    rest = memoryview(_HEADER.pack(len(body)) + body)
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive_frame(fd: int) -> Any:
    """Read one message; raise ``EOFError`` at the end, ``PlainDataError`` for anything else."""
    (size,) = _HEADER.unpack(_read_exactly(fd, _HEADER.size))
    if size > MAX_FRAME_BYTES:
        raise PlainDataError("a message is too long")
    try:
        return _deeply(json.loads, _read_exactly(fd, size))
    except (ValueError, RecursionError) as error:
        raise PlainDataError("a message is not JSON") from error


def _read_exactly(fd: int, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = os.read(fd, min(missing, 1 << 20))
        if not part:
            raise EOFError("the other side has gone")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def encode(value: object, refer: Refer | None = None) -> object:
    """Return ``value`` as JSON data. ``refer`` encodes objects of types that are not plain.

    Raises ``PlainDataError`` for such an object if there is no ``refer``, and for cycles.
    """
    try:
        return _deeply(_encode, value, refer or _refuse)
    except RecursionError as error:
        raise PlainDataError("a value is nested too deeply, or holds itself") from error


def _refuse(value: object) -> object:
    raise PlainDataError(f"a value of type {type(value).__name__} is not plain data")


def _encode(value: Any, refer: Refer) -> object:
    kind = type(value)
    if kind in _PASSED_AS_THEY_ARE:
        return value
    if kind is list:
        types = set(map(type, value))
        if types <= _PASSED_AS_THEY_ARE or (types == {int} and _are_short(value)):
            return value
        return [_encode(item, refer) for item in value]
    for base, encoder in _ENCODERS:
        if kind is base or issubclass(kind, base):
            return encoder(value, refer)
    name = _BUILTIN_NAMES.get(id(value))
    return {"builtin": name} if name else refer(value)


def _are_short(values: list[int]) -> bool:
    limit = 1 << _PLAIN_INT_BITS
    return -limit < min(values) and max(values) < limit


def _encode_int(value: int, refer: Refer) -> object:
    plain = int.__index__(value) if type(value) is not int else value
    return plain if plain.bit_length() <= _PLAIN_INT_BITS else {"int": hex(plain)}


def _items(kind: Any, name: str) -> Encoder:
    """An encoder of what a container holds by its base type's own iteration, not by the object's.

    Type checks of the caller have no say in it either: ``kind.__iter__`` is C code.
    """
    return lambda value, refer: {name: [_encode(item, refer) for item in kind.__iter__(value)]}


def _encode_pairs(value: dict[Any, Any], refer: Refer) -> object:
    pairs = dict.items(value)
    return {"dict": [[_encode(key, refer), _encode(item, refer)] for key, item in pairs]}


# In this order: bool is an int, and a subclass is what it holds.
_ENCODERS: tuple[tuple[type, Encoder], ...] = (
    (int, _encode_int),
    (tuple, _items(tuple, "tuple")),
    (dict, _encode_pairs),
    (list, lambda value, refer: [_encode(item, refer) for item in list.__iter__(value)]),
    (str, lambda value, refer: str.__str__(value)),
    (float, lambda value, refer: float.__float__(value)),
    (set, _items(set, "set")),
    (frozenset, _items(frozenset, "frozenset")),
    (complex, lambda value, refer: {"complex": [value.real, value.imag]}),
    (bytes, lambda value, refer: {"bytes": bytes.hex(value)}),
    (bytearray, lambda value, refer: {"bytearray": bytearray.hex(value)}),
    (range, lambda value, refer: {"range": [value.start, value.stop, value.step]}),
    (deque, _items(deque, "deque")),
    (Decimal, lambda value, refer: {"Decimal": Decimal.__str__(value)}),
    (Fraction, lambda value, refer: {"Fraction": [value.numerator, value.denominator]}),
    (datetime, lambda value, refer: {"datetime": datetime.isoformat(value)}),
    (date, lambda value, refer: {"date": date.isoformat(value)}),
    (time, lambda value, refer: {"time": time.isoformat(value)}),
    (
        timedelta,
        lambda value, refer: {"timedelta": [value.days, value.seconds, value.microseconds]},
    ),
    (type(Ellipsis), lambda value, refer: {"builtin": "Ellipsis"}),
)


def decode(data: object, resolve: Resolve | None = None) -> Any:
    """Return the value that JSON data stands for: exactly of builtin types, whoever wrote it.

    ``resolve(key, content)`` is asked about objects with another key, and may raise
    ``PlainDataError``, as this does for whatever was not agreed on.
    """
    try:
        return _deeply(_decode, data, resolve or _refuse_key)
    except PlainDataError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise PlainDataError(f"a value cannot be read: {error}") from error


def _refuse_key(key: str, content: object) -> object:
    raise PlainDataError(f"a value of unknown type {key!r}")


def _decode(data: Any, resolve: Resolve) -> object:
    kind = type(data)
    if kind is list:
        if set(map(type, data)) <= _PASSED_AS_THEY_ARE | {int}:
            return data
        return [_decode(item, resolve) for item in data]
    if kind is not dict:
        return data
    ((key, content),) = data.items()
    if key in _CONTAINERS:
        return _CONTAINERS[key](_decode(item, resolve) for item in content)
    if key == "dict":
        return {_decode(k, resolve): _decode(v, resolve) for k, v in content}
    if key in _READERS:
        return _READERS[key](content)
    return resolve(key, content)


_CONTAINERS: dict[str, Callable[[Iterable[object]], object]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
_READERS: dict[str, Callable[[Any], object]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*map(int, parts)),
    "Decimal": Decimal,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda parts: timedelta(*map(int, parts)),
    "Fraction": lambda parts: Fraction(int(parts[0]), int(parts[1])),
    "builtin": lambda name: ... if name == "Ellipsis" else _BUILTINS[str(name)],
}

MUTABLE = (list, dict, set, bytearray, deque)
