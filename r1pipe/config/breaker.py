"""The limits of the circuit breaker, which stop a run that has gone wrong."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    create_model,
)

from r1pipe.config.base import Strict
from r1pipe.config.checks import CHECKS, Action, Check


class Limit(Strict):
    """Of one check of the circuit breaker; what a recipe leaves out is the check's own."""

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


def make_breaker(name: str, checks: dict[str, Check]) -> type[BreakerSettings]:
    return create_model(
        name,
        __base__=BreakerSettings,
        __doc__="When training must not go on as it does: a Limit for each of checks.CHECKS.",
        **{
            name: (
                Annotated[Limit, BeforeValidator(partial(complete_limit, check))],
                Limit(limit=check.limit, action=check.action),
            )
            for name, check in checks.items()
        },
    )


Breaker = make_breaker("Breaker", CHECKS)
# A student becomes as sure as its teacher is: that its entropy falls is no collapse.
DistillBreaker = make_breaker(
    "DistillBreaker",
    CHECKS
    | {name: replace(CHECKS[name], action="ignore") for name in ("entropy", "entropy_collapse")},
)
