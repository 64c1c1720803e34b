"""The hang guard, on processes that hang in each way in which one can."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from r1pipe.utils.errors import HUNG
from r1pipe.utils.watchdog import clear_stacks

ROOT = Path(__file__).parents[3]

# What the main thread does within the watchdog.
SLEEPS = "time.sleep(100)"
WORKS = "for _ in range(30): time.sleep(0.2); heartbeat()"
PATIENT_S = 4.0
"""The limit of those that work, longer: a busy machine may keep them waiting."""
# A C call that lets the interpreter go, and that a signal's handler cannot interrupt.
WAITS_IN_C = "lock = threading.Lock(); lock.acquire(); lock.acquire()"
HOLDS_THE_INTERPRETER = "re.match(r'(a+)+$', 'a' * 60 + 'b')"
ANOTHER_THREAD_HANGS = (
    "thread = threading.Thread(target=wait_for_ever, name='judge'); thread.start(); thread.join()"
)
ANOTHER_THREAD_WORKS = (
    "thread = threading.Thread(target=work, name='judge'); thread.start(); thread.join()"
)


def start(
    folder: Path, action: str, limit_s: float = 1.0, rank: int = 0, world_size: int = 1
) -> subprocess.Popen:
    program = f"""
import os, re, signal, threading, time
from pathlib import Path
from r1pipe.utils.phases import heartbeat, phase
from r1pipe.utils.watchdog import Watchdog

def wait_for_ever():
    with phase("scoring"):
        time.sleep(100)

def work():
    with phase("scoring"):
        {WORKS}

def do_what_hangs():
    print("begun", flush=True)
    {action}

signal.signal(signal.SIGTERM, lambda *_: None)
with Watchdog(Path({str(folder)!r}), {limit_s}), phase("update"):
    do_what_hangs()
"""
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **ranks, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


# (what the main thread does, exit code, words of the line, words of the stacks)
HANGS = {
    "sleep": (SLEEPS, HUNG, "in update", "do_what_hangs"),
    "C call": (WAITS_IN_C, HUNG, "in update", "do_what_hangs"),
    "interpreter": (HOLDS_THE_INTERPRETER, -signal.SIGALRM, "interpreter was held", r"re\W.*match"),
    "thread": (ANOTHER_THREAD_HANGS, HUNG, "update, scoring", "wait_for_ever"),
}


@dataclass
class Begun:
    folder: Path
    """Of its stacks."""
    process: subprocess.Popen
    at: float = field(default_factory=time.monotonic)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Begun]:
    """Side by side, as most of them sleep. One is asked for its stacks, one is stopped."""
    folder = tmp_path_factory.mktemp("stacks")
    actions = {name: (case[0], 1.0) for name, case in HANGS.items()}
    actions |= {"works": (WORKS, PATIENT_S), "another works": (ANOTHER_THREAD_WORKS, PATIENT_S)}
    actions |= {"asked": (WORKS, PATIENT_S), "stopped": (WORKS, 2.0)}
    begun = {name: Begun(folder / name, start(folder / name, *a)) for name, a in actions.items()}
    for name in ("asked", "stopped"):
        assert begun[name].process.stdout.readline() == "begun\n"
    begun["asked"].process.send_signal(signal.SIGUSR1)
    os.killpg(begun["stopped"].process.pid, signal.SIGSTOP)
    return begun


@pytest.mark.parametrize("case", ["works", "another works"])
def test_work_is_left_alone_and_nothing_is_left_of_the_watch(
    case: str, begun: dict[str, Begun]
) -> None:
    process = begun[case].process
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert not begun[case].folder.exists()


@pytest.mark.parametrize("case", HANGS)
def test_a_hang_ends_with_the_stacks(case: str, begun: dict[str, Begun]) -> None:
    _, code, words, stacks = HANGS[case]
    folder, process = begun[case].folder, begun[case].process
    _, err = process.communicate(timeout=60)  # left alone they take 100 s, or for ever
    assert process.returncode == code, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("r1pipe: rank 0: ")
    assert words in lines[0]
    assert str(folder) in lines[0]
    assert "the same command resumes" in lines[0]
    written = (folder / "rank-0.txt").read_text()
    assert re.search(stacks, written), written


def test_all_ranks_write_their_stacks_and_one_speaks(tmp_path: Path) -> None:
    """The second works, but for ever in vain: the first waits for it."""
    in_vain = "while True: time.sleep(0.2); heartbeat()"
    processes = [
        start(tmp_path, action, rank=rank, world_size=2)
        for rank, action in enumerate((WAITS_IN_C, in_vain))
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [HUNG, HUNG], errors
    assert len("".join(errors).splitlines()) == 1
    for rank in (0, 1):
        assert "do_what_hangs" in (tmp_path / f"rank-{rank}.txt").read_text()


def test_what_an_earlier_run_left_is_no_hang(tmp_path: Path) -> None:
    folder = tmp_path / "stacks"
    start(folder, SLEEPS).communicate(timeout=60)
    assert list(folder.iterdir())
    clear_stacks(folder)
    process = start(folder, WORKS, PATIENT_S)
    process.communicate(timeout=300)
    assert process.returncode == 0


def test_anyone_may_ask_for_the_stacks(begun: dict[str, Begun]) -> None:
    process = begun["asked"].process
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert "do_what_hangs" in (begun["asked"].folder / "rank-0.txt").read_text()


def test_a_process_that_was_stopped_has_not_hung(begun: dict[str, Begun]) -> None:
    """As by Ctrl-Z: its guardian too."""
    process = begun["stopped"].process
    # Longer than ten times the watch's interval, half a second.
    time.sleep(max(0.0, begun["stopped"].at + 7 - time.monotonic()))
    os.killpg(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
