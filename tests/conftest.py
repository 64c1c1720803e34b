"""How tests are shared out: among processes (`make test`), and slow ones among runs of CI."""

import gc
import os
from pathlib import Path

import pytest

# Before any test imports torch. A run chooses its threads by the machine's load otherwise, and runs
# that are compared bit by bit need the same number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FINISHED = {
    "test_judged_runs.py",
    "test_on_policy_distill.py",
    "test_resume.py",
    "test_run.py",
    "test_serve.py",
}
"""They look at the `finished` run, which takes a minute to make: one process has them all."""

WAITING = "test_watchdog.py"
"""Mostly sleeps: at the end another process would have nothing to do beside it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--third", type=int, choices=range(3), help="every third of the chosen tests, from this one"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After -m and -k."""
    items.sort(key=lambda item: item.path.name != WAITING)
    first = config.getoption("third")
    if first is not None:
        third = set([*dict.fromkeys(map(find_share, items))][first::3])
        others = [item for item in items if find_share(item) not in third]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if find_share(item) in third]


def pytest_collection_finish() -> None:
    """An engine that closes collects garbage: imports and thousands of tests are none."""
    gc.freeze()


def find_share(item: pytest.Item) -> str:
    """A file whose tests are all slow, because they look at one run, is not split."""
    whole = any(mark.name == "slow" for mark in item.parent.own_markers)
    return str(item.path) if whole else item.nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "finished" if Path(file).name in FINISHED else file

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None
