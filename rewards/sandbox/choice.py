"""Which sandbox is in use: the strongest mechanism that works on this machine."""

import logging
import os
from collections.abc import Sequence

from rewards.sandbox.client import CHOICES, MECHANISMS, SandboxError
from rewards.workers import pool

_logger = logging.getLogger(__name__)

PROBE_LIMIT_S = 120.0


_choice = "auto"
_found: dict[str, tuple[str, str]] = {}


def configure_sandbox(mechanism: str = "auto") -> None:
    """Choose how model code is confined from now on: one of ``rewards.sandbox.client.CHOICES``.

    ``REWARDS_SANDBOX`` in the environment takes the place of ``auto``. Raises ``ValueError`` for
    another name. It is first tried when needed.
    """
    global _choice
    _choice = _check_choice(mechanism, "the sandbox")


def sandbox_in_use() -> str:
    """Say how model code is confined here, after having run a program in it.

    Returns, for example, ``namespaces+landlock+seccomp`` or ``none``. Raises ``SandboxError``,
    with the reason for each mechanism that was tried, if none works.
    """
    return _find_sandbox()[1]


def find_mechanism() -> str:
    """Return the name of the sandbox that is used here. Raises ``SandboxError`` as above."""
    return _find_sandbox()[0]


def _check_choice(mechanism: str, what: str) -> str:
    if mechanism not in CHOICES:
        raise ValueError(f"{what} is {mechanism!r}, not one of {', '.join(CHOICES)}")
    return mechanism


def _find_sandbox() -> tuple[str, str]:
    choice = _choice
    if choice == "auto":
        choice = _check_choice(os.environ.get("REWARDS_SANDBOX") or "auto", "REWARDS_SANDBOX")
    if choice not in _found:
        _found[choice] = _try_sandboxes(MECHANISMS if choice == "auto" else (choice,))
    return _found[choice]


def _try_sandboxes(mechanisms: Sequence[str]) -> tuple[str, str]:
    """Return the name and the description of the first that works; log which one it is."""
    reasons = []
    for mechanism in mechanisms:
        (result,) = pool.run_task("rewards.code.runs:probe", [(mechanism,)], PROBE_LIMIT_S)
        answer = (
            result.value
            if result.status == pool.OK
            else {"error": str(result.value or result.status)}
        )
        if "description" in answer:
            level = logging.WARNING if mechanism == "none" else logging.INFO
            _logger.log(level, "model code is confined by: %s", answer["description"])
            return mechanism, answer["description"]
        reasons.append(f"{mechanism}: {answer['error']}")
    raise SandboxError(
        f"no sandbox works here ({'; '.join(reasons)}); model code is run without one only if "
        "REWARDS_SANDBOX=none or configure_sandbox('none') says so"
    )
