"""The exceptions that end a run in one line."""

import errno

FULL = (
    "the disk is full; checkpoints and finished stages are kept: make room, and the same command "
    "resumes"
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

RESUME_HINT = "the same command resumes from the last checkpoint or finished stage"
LOST, HUNG = 3, 4
"""Exit codes of a process that has lost another rank, or that the hang guard ended. A UserError's
is 2."""


class UserError(Exception):
    """A fault that a user can fix: what is wrong, where (file, key, row), what to do. The CLI exits
    with 2."""


class OutOfBudget(UserError):
    """A judge's budget is used up: the run ends as it is, and resumes when it is raised."""


class LostRank(Exception):
    """Another process of the run is gone. The CLI exits with `LOST`."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for lack of space: safetensors says so in its text only, torch in the
    error's cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


class Tripped(UserError):
    """The circuit breaker ends the run. `rollback`: resume from the newest checkpoint with good
    rollouts, not from the newest one."""

    def __init__(self, line: str, rollback: bool):
        super().__init__(line)
        self.rollback = rollback


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # A KeyError's text is the key alone.
    return f"{name}: {text}" if with_type or isinstance(error, LookupError) else text
