"""Runs a command of r1pipe, and kills it (SIGKILL) in a given phase of a given step. A thread looks
at the stacks of the others for that; the program itself knows nothing of it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from r1pipe.cli.main import main
from r1pipe.runs.folder import find_steps
from r1pipe.runs.logs import read_metrics

# Phase: the function that is running in some thread, and its file.
PHASES = {
    "sampling": ("engine.py", "generate_groups"),
    "turning": ("path.py", "take_turn"),
    "scoring": ("scoring.py", "score"),
    "updating": ("update.py", "step"),
    "syncing": ("engine.py", "load_weights"),
    "saving": ("checkpoints.py", "save"),
    "finishing": ("weights.py", "save_checkpoint"),
    "supervised": ("trainer.py", "take_step"),
}


def is_running(file: str, function: str) -> bool:
    for frame in sys._current_frames().values():
        while frame:
            code = frame.f_code
            if code.co_name == function and code.co_filename.endswith(f"/{file}"):
                return True
            frame = frame.f_back
    return False


def count_steps(folder: Path) -> int:
    """As far as the log and the checkpoints tell."""
    steps = [row["step"] for row in read_metrics(folder)][-1:]
    return max([0, *steps, *find_steps(folder / "checkpoints")])


def kill_in(phase: str, steps: int, delay_s: float, folder: Path) -> None:
    while count_steps(folder) < steps or not is_running(*PHASES[phase]):
        time.sleep(0.001)
    time.sleep(delay_s)
    phases = [name for name, place in PHASES.items() if is_running(*place)]
    os.write(2, f"killed: {' '.join(phases)}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_kill(arguments: list[str]) -> int:
    """`arguments`: phase; how many steps the stage in a folder has behind it; seconds since the
    phase began; the folder; the command. Says in which phases it was."""
    phase, steps, delay_s, folder, *command = arguments
    where = (phase, int(steps), float(delay_s), Path(folder))
    threading.Thread(target=kill_in, args=where, daemon=True).start()
    return main(command)
