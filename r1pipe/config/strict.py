"""What every model of the schema is built on."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


def refuse_idle(settings: BaseModel, idle: Mapping[str, Any], prefix: str = "") -> None:
    """Reject keys that are set and have no effect.

    `idle` maps a key to the words that say when it has none, or to a false value where it has one.
    A key counts as set if it differs from its default: a recipe that was dumped has all keys.
    Raises ValueError.
    """
    for key, when in idle.items():
        if when and getattr(settings, key) != type(settings).model_fields[key].get_default():
            raise ValueError(f"{prefix}{key} does nothing {when}; leave it out")
