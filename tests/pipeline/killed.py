"""Runs a command of r1pipe, and kills it (SIGKILL) in a given phase of a given step:

    python tests/pipeline/killed.py updating 1 0.2 METRICS grpo configs/demo.yaml

kills it 0.2 s after it has begun to update with at least 1 line in the file METRICS. A thread looks
at the stacks of the others for that; the program itself knows nothing of it.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from r1pipe.cli import main

# Phase: the function that is running in some thread, and its file.
PHASES = {
    "sampling": ("rollout.py", "generate"),
    "scoring": ("scoring.py", "score"),
    "updating": ("update.py", "step"),
    "syncing": ("rollout.py", "load_weights"),
    "saving": ("checkpoints.py", "save"),
    "finishing": ("models.py", "save_checkpoint"),
    "supervised": ("trainer.py", "training_step"),
}


def is_running(file: str, function: str) -> bool:
    for frame in sys._current_frames().values():
        while frame:
            code = frame.f_code
            if code.co_name == function and code.co_filename.endswith(f"/{file}"):
                return True
            frame = frame.f_back
    return False


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_in(phase: str, lines: int, delay_s: float, metrics: Path) -> None:
    while count_lines(metrics) < lines or not is_running(*PHASES[phase]):
        time.sleep(0.0005)
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    phase, lines, delay_s, metrics, *command = sys.argv[1:]
    arguments = (phase, int(lines), float(delay_s), Path(metrics))
    threading.Thread(target=kill_in, args=arguments, daemon=True).start()
    sys.exit(main(command))
