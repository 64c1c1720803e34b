"""configs/r1_tiny.yaml, every stage of R1 in one command, with few steps; real vLLM."""

import json
from pathlib import Path

import pytest
import torch
from commands import read_lines, run, run_shipped
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SMALL = (
    "stages.random.tokenizer.data.options.size=300",
    "stages.base.train.max_steps=60",
    "stages.cold_start.train.max_steps=20",
    "stages.cold_start.data.options.size=600",
    "stages.rl.max_steps=2",
    "stages.rl.prompts_per_step=8",
    "stages.rl.data.options.size=100",
    "stages.reject.data.options.size=150",
    "stages.sft.train.max_steps=2",
    "stages.rl_final.max_steps=2",
    "stages.rl_final.prompts_per_step=8",
    "stages.rl_final.data.options.size=100",
    # Of the samples of such a policy one in a hundred is right.
    "stages.student_small.data.options.size=400",
    "stages.student_small.traces.num_generations=2",
    "stages.student_small.train.max_steps=2",
    "stages.student_large.data.options.size=400",
    "stages.student_large.traces.num_generations=2",
    "stages.student_large.train.max_steps=2",
    "stages.eval.num_samples=2",
    "stages.eval.data=[{recipe: arithmetic, split: test, options: {size: 10}}, {name: general, "
    "recipe: arithmetic, split: test, options: {size: 5, seed: 1, fact_share: 1.0}}]",
)
PARENTS = {
    "random": set(),
    "base": {"random"},
    "cold_start": {"base"},
    "rl": {"cold_start"},
    "reject": {"rl"},
    "sft": {"base", "reject"},
    "rl_final": {"sft"},
    "student_small": {"rl_final"},
    "student_large": {"rl_final"},
}
CHECKPOINTS = [name for name in PARENTS if name not in ("random", "reject")]
LANGUAGE = "rewards/rewards.language_consistency/mean"


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run_shipped("r1_tiny", SMALL, tmp_path_factory.mktemp("runs"))


def read_record(folder: Path, file: str) -> dict:
    return json.loads((folder / file).read_text())


def test_every_stage_is_there_and_comes_from_the_right_one(r1: tuple) -> None:
    folder, _ = r1
    stages = {path.parent.name for path in folder.glob("*/stage.json")}
    assert stages == {*PARENTS, "eval"}
    for stage, parents in PARENTS.items():
        assert set(read_record(folder / stage, "lineage.json")["parents"]) == parents, stage
    assert set(read_record(folder / "eval", "lineage.json")["parents"]) == set(CHECKPOINTS)
    assert run("verify", folder).returncode == 0


def test_sft_goes_on_from_the_weights_of_the_base(r1: tuple) -> None:
    """Two steps away from them, and not from those of reinforcement learning."""
    folder, _ = r1

    def distance(a: str, b: str) -> float:
        first, second = (load_file(folder / name / "model.safetensors") for name in (a, b))
        return sum(float(torch.sum((first[k] - second[k]).square())) for k in first) ** 0.5

    assert 0 < distance("sft", "base") < 0.5 * distance("sft", "rl")
    assert 0 < distance("rl_final", "sft") < 0.5 * distance("rl_final", "rl")


def test_cold_start_is_readable(r1: tuple) -> None:
    """No trace without a thought, none that mixes languages."""
    folder, _ = r1
    facts = read_record(folder / "cold_start", "stage.json")
    assert facts["dropped/no_format"] > 50
    assert facts["dropped/mixed_language"] > 50
    given = len(read_lines(folder / "cold_start" / "problems.jsonl"))
    dropped = facts["dropped/no_format"] + facts["dropped/mixed_language"]
    assert facts["train_rows"] == given - dropped


@pytest.mark.parametrize("stage", ["rl", "rl_final"])
def test_language_is_rewarded(stage: str, r1: tuple) -> None:
    folder, _ = r1
    rows = read_lines(folder / stage / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert 0 < row[LANGUAGE] <= 1
        functions = [row[f"rewards/rewards.{name}/mean"] for name in ("math_correct", "format")]
        assert row["reward"] == pytest.approx(sum(functions) + row[LANGUAGE], abs=1e-6)


def test_a_quarter_of_the_second_sft_is_general(r1: tuple) -> None:
    folder, _ = r1
    facts = read_record(folder / "reject", "stage.json")
    trained_on = read_lines(folder / "sft" / "problems.jsonl")
    general = [row for row in trained_on if "<think>" not in row["solution"]]
    assert 0 < facts["traces"] == len(trained_on) - len(general)
    assert facts["mixed_in"] == len(general) == round(facts["traces"] / 3)
    assert all(row["solution"] == f"The answer is {row['answer']}." for row in general)


def test_two_students_of_one_run(r1: tuple) -> None:
    folder, _ = r1
    small, large = (
        read_record(folder / name, "stage.json") for name in ("student_small", "student_large")
    )
    assert 0 < small["num_parameters"] < large["num_parameters"]
    for student in (small, large):
        assert student["optimizer_steps"] == 2
        assert student["traces"] > 0


def test_summary_has_every_checkpoint_and_the_response_length(r1: tuple) -> None:
    folder, said = r1
    summary = json.loads((folder / "summary.json").read_text())
    found = [(entry["dataset"], entry["stage"]) for entry in summary]
    assert found == [(s, c) for s in ("arithmetic/test", "general") for c in CHECKPOINTS]
    assert all(entry["overlap"] == 0 for entry in summary)
    report = (folder / "summary.md").read_text().partition("# Response length")[2]
    lines = [line.removeprefix("- ") for line in report.splitlines() if line.startswith("- ")]
    assert [line.partition(":")[0] for line in lines] == ["rl", "rl_final"]
    for line in lines:
        assert line in said
