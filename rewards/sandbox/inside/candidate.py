"""The candidate's process: runs the model's code and calls its functions as the checker asks.

Everything in here may have been changed by that code. So none of it decides anything: what is sent
back is only what the functions are said to return.
"""

import types
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
    Message,
    describe,
    make_exception,
    make_module,
)

_ITERATORS: tuple[type, ...] = (
    types.GeneratorType, map, filter, zip, enumerate, reversed,
    type({}.keys()), type({}.values()), type({}.items()),
    type(iter([])), type(iter(())), type(iter("")), type(iter(range(0))), type(iter(set())),
    type(iter({})),
)  # fmt: skip


def serve_candidate(code: str) -> int:
    """Run ``code``, then call its functions as the checker asks, until the checker is gone."""
    return Candidate(make_module("solution")).serve(code)


class Candidate:
    """Calls what the model's code defines. Its objects that are not plain data stay here."""

    def __init__(self, namespace: dict[str, Any]):
        self.namespace = namespace
        self.objects: list[object] = []

    def serve(self, code: str) -> int:
        try:
            exec(compile(code, "<solution>", "exec", dont_inherit=True), self.namespace)
        except BaseException as error:
            send_frame(CHANNEL_FD, describe(error))
            return 1
        send_frame(CHANNEL_FD, {"value": None})
        while True:
            try:
                request = receive_frame(CHANNEL_FD)
            except EOFError:
                return 0
            self.reply(request)

    def reply(self, request: Message) -> None:
        answer = self.answer(request)
        try:
            send_frame(CHANNEL_FD, answer)
        except (PlainDataError, MemoryError) as error:  # too large; nothing has been sent yet
            send_frame(CHANNEL_FD, describe(error))

    def answer(self, request: Message) -> Message:
        try:
            return self._answer(request)
        except BaseException as error:
            return describe(error)

    def _answer(self, request: Message) -> Message:
        target = self._find(request["target"])
        match request["do"]:
            case "next":
                try:
                    return {"value": encode(next(target), self._refer)}
                except StopIteration:
                    return {"stop": True}
            case "get":
                return {"value": encode(getattr(target, request["name"]), self._refer)}
            case "set":
                setattr(target, request["name"], decode(request["value"], self._resolve))
                return {"value": None}
        args = decode(request["args"], self._resolve)
        kwargs = {k: decode(v, self._resolve) for k, v in request["kwargs"].items()}
        value = target(*args, **kwargs)
        reply = {"value": encode(value, self._refer)}
        if value is None or request["in_place"]:
            changed = [a for a in (*args, *kwargs.values()) if isinstance(a, MUTABLE)]
            reply["changed"] = [encode(a, self._refer) for a in changed]
        return reply

    def _find(self, target: str | int) -> Any:
        if isinstance(target, int):
            return self.objects[target]
        if target in self.namespace:
            return self.namespace[target]
        if not target.isidentifier():  # an entry point such as Solution().solve
            owner, _, name = target.rpartition(".")
            return self._find_method(eval(owner, self.namespace), name)
        module = self.namespace["__name__"]
        for kind in (self.namespace.get("Solution"), *self.namespace.values()):
            if isinstance(kind, type) and kind.__module__ == module and target in vars(kind):
                return self._find_method(kind, target)
        raise NameError(f"name {target!r} is not defined")

    def _find_method(self, owner: object, name: str) -> object:
        """Return an object's method, or a class's: bound to a new object where it needs one."""
        if isinstance(owner, type):
            found = next((vars(k)[name] for k in owner.__mro__ if name in vars(k)), None)
            owner = owner if isinstance(found, staticmethod | classmethod) else owner()
        return getattr(owner, name)

    def _refer(self, value: object) -> Message:
        if isinstance(value, CheckersFunction):
            return {"callback": value.number}
        self.objects.append(value)
        kind = "iterator" if isinstance(value, _ITERATORS) else "object"
        return {kind: len(self.objects) - 1}

    def _resolve(self, key: str, content: Any) -> object:
        if key == "callback":
            return CheckersFunction(self, content)
        if key in ("object", "iterator"):
            return self.objects[content]
        raise PlainDataError(f"a value of unknown type {key!r}")


class CheckersFunction:
    """Stands for a function that the test passes in: calling it asks the checker."""

    def __init__(self, candidate: Candidate, number: int):
        self.candidate, self.number = candidate, number

    def __call__(self, *args: object) -> object:
        refer = self.candidate._refer
        message = {"callback": self.number, "args": [encode(arg, refer) for arg in args]}
        send_frame(CHANNEL_FD, message)
        while True:
            reply = receive_frame(CHANNEL_FD)
            if "do" not in reply:
                break
            self.candidate.reply(reply)  # the test's function calls back
        if "raised" in reply:
            raise make_exception(*reply["raised"])
        return decode(reply["value"], self.candidate._resolve)
