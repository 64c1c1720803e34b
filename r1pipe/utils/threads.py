"""How many CPU threads a run computes with. Imports no torch.

Two threads that spin while they wait, on two cores of which others use one, are up to 40 times
slower than one thread; threads that never spin are 2.5 times slower than spinning ones when both
cores are free (docs/log.md). So they spin for a moment (r1pipe/__init__.py), and a run takes as
many as the machine has cores to spare when it begins. It keeps that number: float sums, and with
them weights, differ in their last bits between numbers of threads.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from r1pipe.utils.progress import log_line

VARIABLE = "OMP_NUM_THREADS"
"""The user's own number; OpenMP's variable, which everything below torch reads."""
SHORTEST_LOOK_S = 0.5
"""Time over which the load of others is measured, at least."""


class Usage(NamedTuple):
    """Seconds of CPU time so far: of the whole machine, and of this process and its children."""

    at: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> "Usage":
        own = os.times()
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return cls(time.monotonic(), 0.0, 0.0)
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(own[:4]))

    def busy_since(self, start: "Usage") -> float:
        """Cores that others have used on average."""
        others = (self.machine - start.machine) - (self.own - start.own)
        return max(0.0, others / (self.at - start.at))


_start = Usage.now()


def available_cores() -> int:
    """Cores that this process may use, by its affinity and its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, round(find_quota(Path("/sys/fs/cgroup")) or allowed)))


def find_quota(root: Path) -> float | None:
    """CPU time per wall time that the cgroup mounted at `root` grants (version 2, then 1); None
    without a limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (root / "cpu" / f"cpu.cfs_{key}_us").read_text() for key in ("quota", "period")
            )
        except OSError:
            return None
    if limit == "max" or int(limit) <= 0:
        return None
    return int(limit) / int(period)


def threads_in_use() -> int:
    """Cores that this process computes with: its threads, but no more than it may use."""
    asked = os.environ.get(VARIABLE, "")
    cores = available_cores()
    return min(cores, int(asked)) if asked.isdigit() and int(asked) else cores


def settle_threads(run_dir: Path, num_engines: int = 0) -> None:
    """Compute with as many threads as the run began with, or, if it begins now, as there are cores
    that others leave, and the run's own engines that work at the same time, a core each; with
    OMP_NUM_THREADS if the user has set it."""
    if os.environ.get(VARIABLE) or "torch" in sys.modules:
        # torch has read its number; another one would hold in this thread alone, and vLLM's kernels
        # end a run whose threads differ.
        return
    note, cores = run_dir / ".threads", available_cores()
    count = read_count(note)
    if count is None:
        busy = measure_others()
        left = max(1, min(cores, round(cores - busy)))
        count = max(1, left - num_engines)
        note.write_text(f"{count}\n")
        if left < cores:
            log_line(
                f"{count} of {cores} threads: others keep {busy:.1f} cores busy; {VARIABLE}="
                f"{cores} would take all"
            )
    os.environ[VARIABLE] = str(count)


def measure_others() -> float:
    """Cores that others have used since this module was imported."""
    time.sleep(max(0.0, _start.at + SHORTEST_LOOK_S - time.monotonic()))
    return Usage.now().busy_since(_start)


def read_count(note: Path) -> int | None:
    try:
        found = re.fullmatch(r"([1-9]\d*)\n", note.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None
