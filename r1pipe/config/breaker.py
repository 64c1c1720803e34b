"""The limits of the circuit breaker, which stop a run that has gone wrong."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, PositiveInt, create_model

from r1pipe.config.checks import CHECKS, Action, Check
from r1pipe.config.strict import Strict

Settings = TypeVar("Settings", bound="BreakerSettings")


class Limit(Strict):
    """Limit and action of one check; what a recipe leaves out is the check's default."""

    limit: float
    action: Action


def complete_limit(check: Check, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if check.at == "step" and value.get("action") == "skip":
        raise ValueError("this is seen after the update, which cannot be skipped then")
    complete = {"limit": check.limit, "action": check.action, **value}
    if complete["action"] == "ignore" and complete["limit"] != check.limit:
        raise ValueError("limit does nothing with action ignore; give another action")
    return complete


class BreakerSettings(Strict):
    window: PositiveInt = 8
    """Steps before the present one that it is compared with; nothing is before there are half as
    many."""
    max_skips: Annotated[int, Field(ge=0)] = 3
    """Steps in a row whose update may be skipped."""


def with_limits(checks: dict[str, Check]) -> Callable[[type[Settings]], type[Settings]]:
    """A field for each check, named after it."""

    def decorate(cls: type[Settings]) -> type[Settings]:
        fields: dict[str, Any] = {
            name: (
                Annotated[Limit, BeforeValidator(partial(complete_limit, check))],
                Limit(limit=check.limit, action=check.action),
            )
            for name, check in checks.items()
        }
        return create_model(
            cls.__name__, __base__=cls, __doc__=cls.__doc__, __module__=cls.__module__, **fields
        )

    return decorate


@with_limits(CHECKS)
class Breaker(BreakerSettings):
    """The circuit breaker: a Limit for each of checks.CHECKS."""


@with_limits(
    {name: replace(CHECKS[name], action="ignore") for name in ("entropy", "entropy_collapse")}
)
class DistillBreaker(Breaker):
    """A student becomes as sure as its teacher is: that its entropy falls is no collapse."""
