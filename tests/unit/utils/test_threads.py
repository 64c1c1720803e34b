import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1pipe import pipeline
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import SamplerPlace
from r1pipe.utils import threads
from r1pipe.utils.threads import VARIABLE, Usage, find_quota, settle_threads, threads_in_use

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them, no quota, and OMP_NUM_THREADS not set by the user."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "find_quota", lambda _: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv(VARIABLE, "")


@pytest.mark.parametrize(
    ("others", "count"), [(0.0, 8), (0.4, 8), (0.6, 7), (5.2, 3), (8.0, 1), (40.0, 1)]
)
def test_a_run_takes_the_cores_that_others_leave(
    others: float, count: int, cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "measure_others", lambda: others)
    settle_threads(tmp_path)
    assert os.environ[VARIABLE] == str(count)


@pytest.mark.parametrize(("others", "engines", "count"), [(0.0, 2, 6), (5.2, 2, 1), (0.0, 9, 1)])
def test_engines_that_sample_meanwhile_have_a_core_each(
    others: float,
    engines: int,
    count: int,
    cores: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "measure_others", lambda: others)
    settle_threads(tmp_path, engines)
    assert os.environ[VARIABLE] == str(count)


@pytest.mark.parametrize(
    ("sampler", "staleness", "engines"),
    [
        ({"kind": "fleet", "engines": 3}, 1, 3),
        ({"kind": "fleet", "engines": 3}, 0, 0),
        ({"kind": "colocated"}, 1, 0),
    ],
)
def test_a_run_counts_the_engines_that_sample_while_it_trains(
    sampler: dict, staleness: int, engines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(pipeline, "settle_threads", lambda folder, count: told.append(count))
    recipe = load_recipe(DEMO)
    stages = [
        stage.model_copy(update={"max_staleness": staleness}) if stage.kind == "grpo" else stage
        for stage in recipe.stages
    ]
    changes = {"runs_dir": str(tmp_path), "sampler": SamplerPlace(**sampler), "stages": stages}
    with pipeline.open_run(recipe.model_copy(update=changes)):
        assert told == [engines]


def test_a_run_keeps_its_number(
    cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for others in (5.0, 0.0):  # its resume finds an idle machine
        monkeypatch.setattr(threads, "measure_others", lambda others=others: others)
        monkeypatch.setenv(VARIABLE, "")
        settle_threads(tmp_path)
        assert os.environ[VARIABLE] == "3"


def test_the_users_number_stands(
    cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "6")
    settle_threads(tmp_path)
    assert os.environ[VARIABLE] == "6"
    assert not list(tmp_path.iterdir())


def test_the_number_that_torch_has_read_stands(
    cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    settle_threads(tmp_path)
    assert not os.environ[VARIABLE]
    assert not list(tmp_path.iterdir())


def test_cores_are_those_that_compute(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, count in (("", 8), ("2", 2), ("64", 8), ("x", 8)):
        monkeypatch.setenv(VARIABLE, asked)
        assert threads_in_use() == count
    monkeypatch.setattr(threads, "find_quota", lambda _: 2.5)
    assert threads_in_use() == 2


def test_the_quota_of_a_cgroup(tmp_path: Path) -> None:
    assert find_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1", None), ("150000", 1.5)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert find_quota(tmp_path) == cores
    for text, cores in (("max 100000", None), ("400000 100000", 4.0)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert find_quota(tmp_path) == cores


def test_own_work_is_not_that_of_others() -> None:
    start = Usage(at=10.0, machine=100.0, own=7.0)
    assert Usage(at=12.0, machine=104.0, own=8.0).busy_since(start) == 1.5
    assert Usage(at=12.0, machine=101.0, own=9.0).busy_since(start) == 0.0


def test_usage_counts_what_this_process_does() -> None:
    start = Usage.now()
    while (now := Usage.now()).own < start.own + 0.3:
        pass
    assert now.machine > start.machine


def test_waiting_threads_sleep_after_a_moment() -> None:
    """What OpenMP itself has read, in a process that imports r1pipe and then torch."""
    # An engine of another test in this process has set LD_PRELOAD, to an OpenMP of its own.
    foreign = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    shown = [
        subprocess.run(
            [sys.executable, "-c", "import r1pipe, torch"],
            env={**environment, **own, "OMP_DISPLAY_ENV": "verbose"},
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for own in ({}, {"OMP_WAIT_POLICY": "passive"})
    ]
    assert "GOMP_SPINCOUNT = '3000'" in shown[0]
    assert "GOMP_SPINCOUNT = '0'" in shown[1]  # the user's policy
