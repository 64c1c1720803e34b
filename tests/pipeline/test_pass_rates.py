"""Difficulty through the command line, with real vLLM: measured, kept, used, not measured again."""

import json
from pathlib import Path

import pytest
import yaml
from commands import read_lines, run

from r1pipe.rollout.store import read_rollouts

LIMITS = {"num_samples": 4, "min_pass_rate": 0.1, "max_pass_rate": 0.9}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two grpo stages from the same random policy, which passes all even problems, and the odd ones
    now and then."""
    values = yaml.safe_load(tiny_recipe.read_text())
    by_name = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    rewards = [{"function": "reward_of_tests.undecided_for_odd_answers"}]
    grpo = {**by_name["grpo"], "from": "random", "rewards": rewards, "max_steps": 3}
    grpo["routing_replay"] = False
    first = {**grpo, "name": "first", "difficulty": {**LIMITS, "refresh_steps": 2}}
    second = {**grpo, "name": "second", "difficulty": {**LIMITS, "order": "easy_first"}}
    values["stages"] = [by_name["random"], first, second | {"max_steps": 1}]
    values["doctor"] = {"min_gold_share": 0.0}  # golds mean nothing to this reward
    path = tmp_path_factory.mktemp("difficulty") / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "runs_dir": str(path.parent), "name": "run"}))
    return path


@pytest.mark.slow
def test_difficulty(recipe: Path) -> None:
    result = run("run", recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = recipe.parent / "run"
    rows = read_lines(folder / "first" / "difficulty.jsonl")
    rates = {row["problem_id"]: row["pass_rate"] for row in rows if row["step"] == 0}
    assert len(rates) == 100
    problems = {row["id"]: row for row in read_lines(folder / "first" / "problems.jsonl")}
    for name, rate in rates.items():
        assert rate in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert rate == 1.0 or int(problems[name]["answer"]) % 2
    chosen = {name for name, rate in rates.items() if 0.1 <= rate <= 0.9}
    assert 0 < len(chosen) < 60
    record = json.loads((folder / "first" / "stage.json").read_text())
    assert record["sizes"][0]["difficulty"] == len(chosen)
    assert record["pass_rate_before"] == pytest.approx(sum(rates.values()) / 100, abs=1e-3)
    assert f"{len(chosen)} of 100 problems have a pass rate from 0.1 to 0.9" in result.stderr

    rollouts = list(read_rollouts(folder / "first"))
    assert {row["problem_id"] for row in rollouts if row["step"] < 3} <= chosen
    newer = {row["problem_id"]: row["pass_rate"] for row in rows if row["step"] == 2}
    assert set(newer) == set(rates)
    assert newer != rates
    for name in {row["problem_id"] for row in rollouts if row["step"] == 2}:
        group = [r["reward"] for r in rollouts if r["step"] == 2 and r["problem_id"] == name][-4:]
        assert newer[name] == sum(group) / 4
    left = {name for name, rate in newer.items() if 0.1 <= rate <= 0.9}
    assert {row["problem_id"] for row in rollouts if row["step"] == 3} <= left
    metrics = read_lines(folder / "first" / "metrics.jsonl")
    assert metrics[1]["difficulty/prompts"] == len(left)

    # The second stage takes the rates of the first, and begins with the easiest.
    again = read_lines(folder / "second" / "difficulty.jsonl")
    assert again == [row for row in rows if row["step"] == 0]
    assert "second: difficulty" not in result.stderr
    order = [row["problem_id"] for row in read_rollouts(folder / "second")][::4]
    drawn = [rates[name] for name in order]
    assert drawn == sorted((rates[name] for name in chosen), reverse=True)[: len(drawn)]
