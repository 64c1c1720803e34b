"""The exceptions that end a run in one line."""

import errno

FULL = (
    "the disk is full; checkpoints and finished stages are kept: make room, and the same command "
    "goes on"
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


GOES_ON = "the same command goes on from the last checkpoint or finished stage"
LOST, HUNG = 3, 4
"""Exit codes of a process that ends because another one of the run is gone, or because nothing went
on for too long. What a user can put right is 2."""


class UserError(Exception):
    """What a user can put right: what is wrong, where (file, key, row), what to do. The CLI exits
    with 2."""


class LostRank(Exception):
    """Another process of the run is gone, so this one cannot go on. The CLI exits with 1."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for lack of room: safetensors tells by text only, and torch by the
    error that it was busy with."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


class Tripped(UserError):
    """A check of the circuit breaker ends the run; `rollback`: with the newest checkpoint that made
    good rollouts, not with the newest of all."""

    def __init__(self, line: str, rollback: bool):
        super().__init__(line)
        self.rollback = rollback


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # A KeyError's text is the key alone.
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text
