"""The checker's end of the channel: stand-ins for what the candidate defines and returns.

A stand-in asks the candidate's process; arguments and results cross as plain data.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from rewards.sandbox.inside.plain_data import (
    MUTABLE,
    PlainDataError,
    decode,
    encode,
    receive_frame,
    send_frame,
)
from rewards.sandbox.inside.protocol import (
    CHANNEL_FD,
    BadTests,
    CandidateError,
    Message,
    describe,
    make_exception,
)


class CandidateGone(CandidateError):
    """The candidate's process has ended, or does not keep to the protocol."""


class Link:
    """The checker's end of the channel.

    is_asked: the candidate's code has been called. has_lent: it has raised or returned something
    (a builtin type, an exception) of which the tests may make what cannot cross.
    """

    def __init__(self, in_place: bool):
        self.in_place = in_place
        self.functions: list[Callable[..., object]] = []
        self.objects: dict[int, CandidateObject] = {}
        self.has_started = self.is_gone = self.is_asked = self.has_lent = False

    def start(self) -> None:
        """Wait until the candidate's code has run; raise what it raised."""
        self._receive()
        self.has_started = True

    def ask(self, target: str | int, do: str, **details: object) -> Message:
        self.is_asked = True
        self._send({"target": target, "do": do, **details})
        return self._receive()

    def call(
        self, target: str | int, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        reply = self.ask(
            target,
            "call",
            args=[encode(arg, self._refer) for arg in args],
            kwargs={name: encode(value, self._refer) for name, value in kwargs.items()},
            in_place=self.in_place,
        )
        value = self.read(reply)
        if value is None or self.in_place:
            mutable = [a for a in (*args, *kwargs.values()) if isinstance(a, MUTABLE)]
            for argument, new in zip(mutable, reply.get("changed", ())):
                _restore(argument, self._decode(new))
        return value

    def read(self, reply: Message) -> object:
        return self._decode(reply.get("value"))

    def encode(self, value: object) -> object:
        return encode(value, self._refer)

    def _decode(self, data: object) -> Any:
        self.has_lent = self.has_lent or _holds_builtin(data)
        try:
            return decode(data, self._resolve)
        except PlainDataError as error:
            raise self._lose(error) from None

    def _send(self, message: Message) -> None:
        if self.is_gone:
            raise self._lose("it has ended")
        try:
            send_frame(CHANNEL_FD, message)
        except OSError as error:
            raise self._lose(error) from None

    def _receive(self) -> Message:
        while True:
            try:
                message = receive_frame(CHANNEL_FD)
            except (EOFError, OSError, PlainDataError) as error:
                raise self._lose(error) from None
            if not isinstance(message, dict):
                raise self._lose("a message is not an object")
            if "callback" in message:
                self._send(self._call_back(message))
            elif "raised" in message:
                raised = message["raised"]
                well_formed = isinstance(raised, list) and len(raised) == 2
                self.has_lent = True
                raise make_exception(*raised if well_formed else ("Exception", ""))
            else:
                return message

    def _call_back(self, message: Message) -> Message:
        number, args = message["callback"], message.get("args")
        if not isinstance(number, int) or not 0 <= number < len(self.functions):
            raise self._lose("a function is called that was never passed")
        try:
            return {"value": self.encode(self.functions[number](*self._decode(args or [])))}
        except CandidateGone:
            raise
        except Exception as error:
            return describe(error)

    def _lose(self, reason: object) -> CandidateGone:
        self.is_gone = True
        return CandidateGone(str(reason))

    def _refer(self, value: object) -> Message:
        if isinstance(value, CandidateObject):
            return {"object": value._number}
        if isinstance(value, CandidateIterator):
            return {"iterator": value._number}
        if isinstance(value, types.FunctionType | functools.partial):
            self.functions.append(value)
            return {"callback": len(self.functions) - 1}
        message = f"the tests pass a {type(value).__name__}, which cannot cross"
        # A candidate that returns ``object`` where the tests call the result must not end here.
        raise CandidateError(message) if self.has_lent else BadTests(message)

    def _resolve(self, key: str, content: object) -> object:
        if type(content) is not int or content < 0:
            raise PlainDataError("a reference is not a number")
        if key == "object":
            return self.objects.setdefault(content, CandidateObject(self, content))
        if key == "iterator":
            return CandidateIterator(self, content)
        if key == "callback" and content < len(self.functions):
            return self.functions[content]
        raise PlainDataError(f"a value of unknown type {key!r}")


def _holds_builtin(data: Any) -> bool:
    """Say whether a message names a builtin, at any depth: a value may be nested deeply."""
    todo = [data]
    while todo:
        data = todo.pop()
        if type(data) is dict:
            if "builtin" in data:
                return True
            todo += data.values()
        elif type(data) is list and not {list, dict}.isdisjoint(map(type, data)):
            todo += data
    return False


class CandidateFunction:
    """Stands for a function or class that the candidate defines under a name. Can be called."""

    def __init__(self, link: Link, name: str):
        self._link, self._name = link, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._link.call(self._name, args, kwargs)


class CandidateObject:
    """Stands for an object of the candidate's: it can be called and has attributes.

    It equals nothing but itself, whatever the object overrides, and has no length, order, items
    or members: tests that compare have to get at plain data.
    """

    def __init__(self, link: Link, number: int):
        vars(self).update(_link=link, _number=number)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._link.call(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.read(self._link.ask(self._number, "get", name=name))

    def __setattr__(self, name: str, value: object) -> None:
        self._link.ask(self._number, "set", name=name, value=self._link.encode(value))


class CandidateIterator:
    """Stands for a generator or the like of the candidate's: it can be iterated once."""

    def __init__(self, link: Link, number: int):
        self._link, self._number, self._ended = link, number, False

    def __iter__(self) -> "CandidateIterator":
        return self

    def __next__(self) -> object:
        reply = {"stop": True} if self._ended else self._link.ask(self._number, "next")
        if "stop" in reply:
            self._ended = True
            raise StopIteration
        return self._link.read(reply)


def _restore(old: Any, new: Any) -> None:
    """Give an argument the contents that the candidate left in its own copy of it."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        pairs = zip(old, new)
        kept = [_restored(before, after) for before, after in pairs]
        old[:] = kept + new[len(kept) :]
    elif isinstance(old, dict):
        changed = {key: _restored(old.get(key), after) for key, after in new.items()}
        old.clear()
        old.update(changed)
    elif isinstance(old, bytearray):
        old[:] = new
    else:
        old.clear()
        (old.update if isinstance(old, set) else old.extend)(new)


def _restored(old: object, new: object) -> object:
    if isinstance(old, MUTABLE) and type(old) is type(new):
        _restore(old, new)
        return old
    return new
