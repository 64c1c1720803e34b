"""r1pipe: the R1 recipe for everyone, from cold start to a distilled student."""

import os
import sys
from pathlib import Path

__version__ = "0.1.0"


def put_own_packages_first() -> None:
    """A user's rewards.py on the Python path must not take the place of our package `rewards`."""
    root = str(Path(__file__).parent.parent)
    for place, folder in enumerate(sys.path):
        if folder == root:
            return
        if any(Path(folder, name).exists() for name in ("rewards.py", "rewards/__init__.py")):
            sys.path.insert(place, root)
            return


def put_working_folder_last() -> None:
    """Modules in the working folder are found, whichever way r1pipe was started, but a user's
    datasets.py stands in for no library."""
    try:
        here = str(Path.cwd())
    except OSError:  # it was deleted
        return
    sys.path[:] = [folder for folder in sys.path if folder not in ("", here)] + [here]
    put_own_packages_first()


put_own_packages_first()
# OpenMP reads it once, when torch is imported: threads that wait spin for about 0.1 ms and then
# sleep. See utils/threads.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
