"""The hang guard: ends a run without progress for `phase_timeout_s`, and says where it hung.

Work sends heartbeats (phases.py): each step of vLLM, each group judged, each micro-batch, each
collective. A thread of every rank watches them, because a signal's handler does not run while its
thread is inside a C call. After too long a silence the stacks of all threads of all ranks are
written to runs/<name>/.stacks/, a marker file there tells the other ranks, and the process ends at
once with exit code 4. Checkpoints stay valid, as after any other kill.

A Python thread does not run while the interpreter is held, as by a regular expression that
backtracks forever. So each rank also has a guardian, a small process that it ticks once a second.
The guardian asks a silent rank for its stacks by SIGUSR1, which faulthandler answers without the
interpreter (`kill -USR1 PID` works by hand, too), and ends it by SIGALRM, exit code 142 in a shell.
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
from r1pipe.utils.errors import HUNG, RESUME_HINT
from r1pipe.utils.phases import describe_phases, heartbeat, seconds_since_heartbeat

POLL_S = 1.0
OTHERS_S = 5.0
"""How long the rank that noticed waits for the others' stacks."""
MARKER = "hung"
"""Made by the first rank that notices, which then prints; the others end on seeing it."""


class Watchdog:
    """Context manager: the process ends after `limit_s` without a heartbeat (None: never). Every
    rank has one, with the same `folder`, which `clear_stacks` has emptied before."""

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
                heartbeat()  # the whole process slept, as after Ctrl-Z: no hang
            last = now
            tick(self._guardian)
            if (self.folder / MARKER).exists():
                self._end()
            if seconds_since_heartbeat() > self.limit_s:
                line = (
                    f"rank {distributed.rank()}: no progress for {self.limit_s:g} s (in "
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
    """Before any rank watches: an earlier run's marker would end this one."""
    shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path, line: str) -> bool:
    """Print the line and mark the folder, unless another rank has; whether this rank was first."""
    try:
        (folder / MARKER).open("x").close()
    except FileExistsError:
        return False
    # Not by print: another thread may hold the stream's lock.
    os.write(2, f"r1pipe: {line}; the stacks are in {folder}; {RESUME_HINT}\n".encode())
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
    # It may have ended, or its pipe may be full while it sleeps.
    with contextlib.suppress(OSError):
        os.write(guardian.stdin.fileno(), b".")


def guard(pid: int, folder: str, limit_s: float) -> None:
    """The guardian's main function: runs until its process ends or stops ticking."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Twice: after Ctrl-Z both slept, and the other process needs time to wake up.
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
