"""A fleet of a trainer of two processes, started as `make grpo NPROC=2` does."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from commands import read_lines, run_ranks, wait_for
from test_fleet import PLACES, SAME, list_descendants, wait_for_end
from test_processes import run_two, start_two
from test_resume import TIMES

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.rl.curriculum import Prompts
from r1pipe.rollout.store import read_rollouts
from r1pipe.runs.folder import find_steps

pytestmark = pytest.mark.slow


def write_recipe(tiny_recipe: Path, folder: Path, name: str, **changes: Any) -> Path:
    """Random weights, then GRPO with these changes."""
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    stages["grpo"] |= {"from": "random", "max_completion_length": 32, "prompts_per_step": 7}
    stages["grpo"] |= {"routing_replay": False, "learning_rate": 1e-4, **changes}
    values |= {"name": name, "runs_dir": str(folder)}
    values["stages"] = [stages[stage] for stage in ("random", "grpo")]
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    return recipe


def set_fleet(kind: str) -> tuple[str, str]:
    place = PLACES[kind].model_dump(exclude_none=True) | (
        {"reward_workers": 2} if kind == "ray" else {}
    )
    return "--set", f"sampler={yaml.safe_dump(place, default_flow_style=True).strip()}"


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tiny_recipe, tmp_path_factory.mktemp("ranks"), "colocated", max_steps=2)


@pytest.fixture(scope="module")
def colocated(recipe: Path) -> Path:
    """The folder of a run whose two processes have an engine each in them."""
    result = run_ranks(2, "run", recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    return recipe.parent / "colocated" / "grpo"


@pytest.mark.parametrize("kind", PLACES)
def test_losses_and_rollouts_are_those_of_colocated_engines(
    kind: str, recipe: Path, colocated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ray":
        pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = run_ranks(2, "run", recipe, "--set", f"name={kind}", *set_fleet(kind))
    assert result.returncode == 0, result.stderr[-3000:]
    folder = recipe.parent / kind / "grpo"
    expected, rows = (read_lines(place / "metrics.jsonl") for place in (colocated, folder))
    for step, other in zip(expected, rows, strict=True):
        assert {"idle/engine_0", "idle/engine_1"} < other.keys()
        for name, value in step.items():
            if not name.startswith((*TIMES, "sync")):
                assert other[name] == pytest.approx(value, rel=SAME, abs=SAME), name
        assert other["sync/logprob_diff_mean"] < 1e-5
    floats = ("logprobs", "advantage")
    columns = (*floats, "step", "problem_id", "sample", "completion_ids")
    expected, rollouts = (list(read_rollouts(f, columns=columns)) for f in (colocated, folder))
    for row, other in zip(expected, rollouts, strict=True):
        for name in floats:
            assert other.pop(name) == pytest.approx(row.pop(name), rel=SAME, abs=SAME)
        assert other == row


def find_engine(process: int, number: int) -> int:
    """Among what the process has started: an engine has a core of its own."""
    core = sorted(os.sched_getaffinity(0))[number]
    below = list_descendants(process)
    (found,) = (child for child in below if os.sched_getaffinity(child) == {core})
    return found


def test_in_flight_killed_and_resumed(tiny_recipe: Path, tmp_path: Path) -> None:
    """An engine of the second process dies, then all do: every prompt is trained on once."""
    changes = {"max_steps": 6, "save_steps": 1, "max_staleness": 2, "in_flight": True}
    recipe = write_recipe(tiny_recipe, tmp_path, "killed", **changes)
    command = ("run", recipe, *set_fleet("processes"))
    partial = tmp_path / "killed" / ".grpo.partial"
    process = start_two(*command)
    wait_for(lambda: any(partial.glob("checkpoints/step-*")))
    os.kill(find_engine(process.pid, 1), signal.SIGKILL)
    wait_for(lambda: max(find_steps(partial / "checkpoints"), default=0) >= 3)
    below = list_descendants(process.pid)
    for target in (process.pid, *below):
        psutil.Process(target).kill()
    _, errors = process.communicate()
    assert "sampler: engine 1 was lost" in errors
    for descendant in below:
        wait_for_end(descendant)
    result = run_ranks(2, *command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step" in result.stderr
    folder = tmp_path / "killed" / "grpo"
    (grpo,) = (s for s in yaml.safe_load(recipe.read_text())["stages"] if s["kind"] == "grpo")
    problems = load_problems(ProblemSet.model_validate(grpo["data"]))
    drawn = [problem.id for problem in Prompts(problems, 0).draw(6 * 7)]
    rows = list(read_rollouts(folder, columns=("step", "problem_id", "sample")))
    assert [row["problem_id"] for row in rows] == [name for name in drawn for _ in range(4)]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 7))
    assert max(row["staleness/max"] for row in metrics) in (1, 2)
    assert all(row["sync/logprob_diff_mean"] < 1e-5 for row in metrics)


def test_engines_that_cannot_be_shared_out_are_one_line(recipe: Path) -> None:
    result = run_two("run", recipe, "--set", "name=odd", "--set", "sampler.kind=fleet")
    assert result.returncode == 2, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("r1pipe: ")]
    assert len(lines) == 1
    assert "sampler.engines 1: the trainer's 2 processes have as many each: take 2" in lines[0]
