"""Progress of a stage: a bar on a terminal, a line every ten seconds elsewhere; and Ctrl-C."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from r1pipe.utils.distributed import alone, is_first
from r1pipe.utils.phases import heartbeat

console = Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 10.0
ECHO_S = 3.0
"""In a run of several processes, a second signal within this time is the same one."""


class Interrupt:
    """Ctrl-C or SIGTERM: raise KeyboardInterrupt at once, and again at the next step if a library's
    callback swallowed the first. Within `deferred` the first signal only sets `asked`; the second,
    or the end of the grace period, raises."""

    asked = False
    signal_number: int | None = None
    _asked_at = 0.0
    _grace_s = 0.0
    _waiting = False
    _again: threading.Timer | None = None
    """Sends the second signal when the grace period is over."""

    @classmethod
    def handle(cls, signal_number: int, frame: FrameType | None) -> None:
        since_s = time.monotonic() - cls._asked_at
        if cls._waiting and not alone() and since_s < min(ECHO_S, cls._grace_s):
            return  # from the scheduler, which signals every process, and from torchrun
        first, cls.asked, cls.signal_number = not cls.asked, True, signal_number
        cls._asked_at = time.monotonic()
        cls._waiting = first and cls._grace_s > 0
        if not cls._waiting:
            raise KeyboardInterrupt
        # Not log_line: the signal may have come in the middle of a print.
        if is_first():
            os.write(2, b"ending after this step, to save it; once more to end at once\n")
        cls._again = threading.Timer(cls._grace_s, os.kill, (os.getpid(), signal_number))
        cls._again.daemon = True
        cls._again.start()

    @classmethod
    @contextmanager
    def deferred(cls, grace_s: float) -> Iterator[None]:
        """Within it, the training loop checks `asked` after each step, saves, and raises."""
        cls._grace_s = grace_s
        try:
            yield
        finally:
            cls._grace_s, cls._waiting = 0.0, False
            if cls._again:
                cls._again.cancel()

    @classmethod
    def check(cls) -> None:
        """Raise again, where a library swallowed the first or work runs in another thread."""
        if cls.asked and not cls._waiting:
            raise KeyboardInterrupt


class StageProgress:
    """Progress of one stage over `total` steps. Use as a context manager.

    `advance(reward=0.5)` counts a step and shows the given figures beside it. `note(seconds left)`
    gives text to append.
    """

    def __init__(self, label: str, total: int, note: Callable[[float], str] | None = None):
        self.label, self.total, self.done, self.note = label, total, 0, note
        self._done_before = 0
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if console.is_terminal and is_first():
            self._bar = Progress(
                TextColumn("[bold]{task.description:<18}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(label, total=total, figures="")

    def __enter__(self) -> "StageProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def start_at(self, done: int) -> None:
        """Steps done before: not counted in the estimate of the time left."""
        self.done = self._done_before = done
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total)

    def advance(self, steps: int = 1, **figures: float) -> None:
        Interrupt.check()
        heartbeat()
        self.done += steps
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        now = time.monotonic()
        pace = (now - self._started) / (self.done - self._done_before)
        left = pace * (self.total - self.done)
        note = f"  {self.note(left)}" if self.note else ""
        if self._bar:
            self._bar.update(self._task, advance=steps, figures=text + note)
        elif now - self._last_line > SECONDS_BETWEEN_LINES or self.done >= self.total:
            self._last_line = now
            log_line(f"{self.label}: {self.done}/{self.total}  {text}  {left:.0f} s left{note}")


def format_size(num_bytes: float) -> str:
    """ "1.5 GiB", or in the unit in which it is not 0.0."""
    sizes = (
        (num_bytes / 2**power, unit) for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB"))
    )
    size, unit = next(((s, u) for s, u in sizes if s >= 0.05), (num_bytes, "B"))
    return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"


def log_line(text: str, *, from_any_rank: bool = False) -> None:
    """Print a line on stderr (stdout is for results), on rank 0 only unless it is a rank's own."""
    if not (is_first() or from_any_rank):
        return
    console.print(text, markup=False, soft_wrap=True)
    sys.stderr.flush()
