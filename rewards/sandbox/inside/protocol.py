"""What the two processes of a function test have in common: descriptors, modules, exceptions."""

import builtins
import contextlib
import sys
import types
from typing import Any

PAYLOAD_FD, CHANNEL_FD, REPORT_FD = FDS = (3, 4, 5)

Message = dict[str, Any]  # one JSON object


def make_module(name: str) -> dict[str, Any]:
    """Register a module, which dataclasses and pickles of its classes look up; its namespace."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


def describe(error: BaseException) -> Message:
    """Return the message that tells of an exception: its type's name and its text."""
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return {"raised": [type(error).__name__[:100], text]}


class CandidateError(Exception):
    """What the candidate raised, if that is not of a builtin type or must not pass as such."""


class BadTests(BaseException):
    """The tests ask for something that cannot be done here, whatever the candidate is.

    Not an Exception, so that a test which expects one does not take it for the candidate's.
    """


# Raised in a test's ``all(map(...))`` this would end the loop early, as if all had passed.
_NOT_TO_BE_RAISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit")


def make_exception(name: object, text: object) -> BaseException:
    """Return the builtin exception of that name, ``CandidateError`` for all others."""
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, BaseException) and name not in _NOT_TO_BE_RAISED:
        with contextlib.suppress(TypeError):  # UnicodeDecodeError takes five arguments
            return kind(str(text))
    return CandidateError(f"{name}: {text}")
