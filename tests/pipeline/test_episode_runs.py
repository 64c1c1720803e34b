"""Runs of GRPO in an environment that sample ahead or have two processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import read_lines, run, run_and_kill, run_ranks
from test_engine import LIMIT
from test_environments import save_talker
from test_processes import without_times
from test_resume import assert_equal

from r1pipe.rollout.store import read_rollouts

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_talker(folder / "talker")
    return folder


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    stage = {
        "kind": "grpo",
        "from": str(folder / "talker"),
        "data": {"recipe": "arithmetic", "options": {"size": 40}},
        "environment": {"name": "envs_of_tests.Talk", "options": {"turns": 2}},
        "max_steps": STEPS,
        "save_steps": 1,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 60,
        "learning_rate": 1e-4,
        "verify_sync": True,
        **changes,
    }
    values = {"name": name, "runs_dir": str(folder), "dtype": "float32", "stages": [stage]}
    values["engine"] = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_episodes_sampled_ahead_are_kept_by_a_killed_run(folder: Path) -> None:
    result = run("grpo", write_recipe(folder, "ahead", max_staleness=1))
    assert result.returncode == 0, result.stderr[-3000:]
    recipe = write_recipe(folder, "ahead-killed", max_staleness=1)
    run_and_kill("turning", 1, 0.0, folder / "ahead-killed" / ".grpo.partial", "grpo", recipe)
    result = run("grpo", recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step" in result.stderr
    assert_equal(folder / "ahead" / "grpo", folder / "ahead-killed" / "grpo")
    rows = read_lines(folder / "ahead" / "grpo" / "metrics.jsonl")
    assert [row["staleness/max"] for row in rows] == [0, 1, 1]
    assert all(row["sync/logprob_diff_mean"] < LIMIT for row in rows)
    assert all(row["sampler/logprob_diff_ahead"] < LIMIT for row in rows[1:])


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The stage's folder of a run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as many as each of the two has
        result = run("grpo", write_recipe(folder, "one"))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "one" / "grpo"


PLACES = {"two": [], "fleet": ["--set", "sampler.kind=fleet", "--set", "sampler.engines=2"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_two_processes_play_what_one_plays(name: str, folder: Path, one: Path) -> None:
    """Also with an engine each in processes of their own."""
    result = run_ranks(2, "grpo", write_recipe(folder, name), *PLACES[name])
    assert result.returncode == 0, result.stderr[-3000:]
    two = folder / name / "grpo"
    for expected, row in zip(*(read_lines(f / "metrics.jsonl") for f in (one, two)), strict=True):
        assert without_times(row) == pytest.approx(without_times(expected), rel=1e-4, abs=1e-5)
        assert row["episodes/turns"] > 1.5
        assert row["sync/logprob_diff_mean"] < LIMIT
    rows, others = (list(read_rollouts(f)) for f in (one, two))
    assert len(rows) == STEPS * 16
    assert [row["episode"] for row in rows] == [row["episode"] for row in others]
    record = json.loads((two / "stage.json").read_text())
    assert record["last_sync/logprob_diff_mean"] < LIMIT
