"""The hang guard: a run in which nothing goes on for `phase_timeout_s` ends, and says where it was.

Whoever works beats (phases.py): each step of vLLM, each group judged, each micro-batch, each
collective. A thread of every rank watches that, because a signal's handler does not run while its
thread is inside a C call. When it has been silent for too long, the stacks of all threads of all
ranks are written into the run folder, runs/<name>/.stacks/, the ranks tell each other by a file
there, and the process ends at once with exit code 4. What was saved before is as good as after any
other death of the run.

A thread of Python is blind where the interpreter itself is held, as by a regular expression that
backtracks for ever. So each rank has a guardian besides, a small process that it ticks once a
second. It asks the silent one for its stacks by SIGUSR1, which faulthandler answers without the
interpreter (anyone may ask: `kill -USR1 PID`), and ends it by SIGALRM, exit code 142 in a shell.
"""

import contextlib
import faulthandler
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from r1pipe.utils import distributed
from r1pipe.utils.errors import GOES_ON, HUNG
from r1pipe.utils.phases import describe_phases, heartbeat, seconds_since_heartbeat

POLL_S = 1.0
OTHERS_S = 5.0
"""How long the rank that noticed waits for the others' stacks."""
MARKER = "hung"
"""The file by which a rank tells the others; who makes it speaks."""


class Watchdog:
    """Within it, the process ends when nothing goes on for `limit_s` (None: never). Every rank has
    one, with the same `folder`, which `clear_stacks` has emptied before."""

    def __init__(self, folder: Path, limit_s: float | None):
        self.folder, self.limit_s = folder, limit_s
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.limit_s is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder / f"rank-{distributed.rank()}.txt"
            self._file = self._path.open("w", encoding="utf-8")
            faulthandler.register(signal.SIGUSR1, self._file, all_threads=True)
            self._guardian = start_guardian(self.folder, self.limit_s)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            heartbeat()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.limit_s is None:
            return
        self._ended.set()
        self._thread.join()
        self._guardian.stdin.close()
        self._guardian.wait()
        faulthandler.unregister(signal.SIGUSR1)
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _watch(self) -> None:
        interval, last = min(POLL_S, self.limit_s / 4), time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - last > 10 * interval:
                heartbeat()  # all of the process slept, as after Ctrl-Z: that is no hang
            last = now
            tick(self._guardian)
            if (self.folder / MARKER).exists():
                self._end()
            if seconds_since_heartbeat() > self.limit_s:
                line = (
                    f"rank {distributed.rank()}: nothing went on for {self.limit_s:g} s (in "
                    f"{describe_phases()})"
                )
                if claim(self.folder, line):
                    self._end(wait_for_others=True)
                self._end()

    def _end(self, wait_for_others: bool = False) -> None:
        threads = "".join(f"0x{t.ident:016x} {t.name}\n" for t in threading.enumerate())
        self._file.write(
            f"rank {distributed.rank()}, process {os.getpid()} on {socket.gethostname()}, in "
            f"{describe_phases()}\n{threads}\n"
        )
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        deadline = time.monotonic() + OTHERS_S
        while wait_for_others and time.monotonic() < deadline:
            written = [p for p in self.folder.glob("rank-*.txt") if p.stat().st_size]
            wait_for_others = len(written) < distributed.world_size()
            time.sleep(0.1)
        os._exit(HUNG)


def clear_stacks(folder: Path) -> None:
    """Before any rank watches: what an earlier run has left would end this one."""
    shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path, line: str) -> bool:
    """Tell the person and the other ranks, if none of them has; whether this one was first."""
    try:
        (folder / MARKER).open("x").close()
    except FileExistsError:
        return False
    # Not by print: another thread may hold the stream.
    os.write(2, f"r1pipe: {line}; the stacks are in {folder}; {GOES_ON}\n".encode())
    return True


# --- The guardian -------------------------------------------------------------------------------


def start_guardian(folder: Path, limit_s: float) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from r1pipe.utils.watchdog import guard; "
        f"guard({os.getpid()}, {str(folder)!r}, {limit_s!r})"
    )
    guardian = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE)
    os.set_blocking(guardian.stdin.fileno(), False)
    return guardian


def tick(guardian: subprocess.Popen) -> None:
    # It may have ended, or sleep and have ticks enough.
    with contextlib.suppress(OSError):
        os.write(guardian.stdin.fileno(), b".")


def guard(pid: int, folder: str, limit_s: float) -> None:
    """The guardian's life: until its process has ended or does not tick any more."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Twice: if all of them slept, as after Ctrl-Z, the other has to wake up too.
    while any(select.select([0], [], [], seconds)[0] for seconds in (limit_s, 2 * POLL_S)):
        if not os.read(0, 4096):
            return
    claim(
        Path(folder),
        f"rank {distributed.rank()}: the interpreter was held for {limit_s:g} s, by a C call or a "
        "regular expression",
    )
    for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGKILL):
        os.kill(pid, number)
        time.sleep(1.0)
