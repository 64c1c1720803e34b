"""Run all tests in two processes: those that drive vLLM and the command line, and the rest.

Each keeps one core busy. The second one's output is printed at the end; the exit code is the first
of pytest's that is not 0.
"""

import os
import subprocess
import sys
import tempfile

FIRST = ["tests/pipeline", "tests/gpu"]
SECOND = ["tests", *(f"--ignore={folder}" for folder in FIRST)]


def main() -> int:
    # Waiting threads sleep: spinning, they would take the other half's core.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    first, second = ([sys.executable, "-m", "pytest", *paths] for paths in (FIRST, SECOND))
    with tempfile.TemporaryFile("w+", encoding="utf-8") as kept:
        beside = subprocess.Popen(second, env=environment, stdout=kept, stderr=subprocess.STDOUT)
        try:
            codes = subprocess.call(first, env=environment), beside.wait()
        finally:
            beside.terminate()  # after Ctrl-C; no effect if it has ended
            beside.wait()
            kept.seek(0)
            print(kept.read(), end="", flush=True)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
