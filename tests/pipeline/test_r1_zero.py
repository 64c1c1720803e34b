"""configs/r1_zero_tiny.yaml, GRPO straight from a base model, with few steps; real vLLM."""

import json
from pathlib import Path

import pytest
from commands import read_lines, run_shipped

pytestmark = pytest.mark.slow

SMALL = (
    "stages.random.tokenizer.data.options.size=300",
    "stages.base.train.max_steps=40",
    "stages.grpo.max_steps=3",
    "stages.grpo.prompts_per_step=8",
    "stages.grpo.data.options.size=100",
    "stages.eval.data.options.size=10",
    "stages.eval.num_samples=2",
)


@pytest.fixture(scope="module")
def r1_zero(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run_shipped("r1_zero_tiny", SMALL, tmp_path_factory.mktemp("runs"))


def test_grpo_starts_from_the_base(r1_zero: tuple) -> None:
    folder, _ = r1_zero
    stages = {path.parent.name for path in folder.glob("*/stage.json")}
    assert stages == {"random", "base", "grpo", "eval"}
    for stage, parents in {"base": ["random"], "grpo": ["base"], "eval": ["base", "grpo"]}.items():
        lineage = json.loads((folder / stage / "lineage.json").read_text())
        assert sorted(lineage["parents"]) == parents
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["stage"] for entry in summary] == ["base", "grpo"]


def test_response_length_is_logged_at_every_step_and_told_at_the_end(r1_zero: tuple) -> None:
    folder, said = r1_zero
    rows = read_lines(folder / "grpo" / "metrics.jsonl")
    lengths = [row["completions/mean_length"] for row in rows]
    assert len(lengths) == 3
    assert all(1 < length <= 56 for length in lengths)
    line = f"grpo: response length {lengths[0]:.1f} -> {lengths[-1]:.1f} tokens in 3 steps"
    assert line in said
    assert line in (folder / "summary.md").read_text()


def test_language_is_logged_and_not_rewarded(r1_zero: tuple) -> None:
    folder, _ = r1_zero
    for row in read_lines(folder / "grpo" / "metrics.jsonl"):
        names = ("math_correct", "format", "language_consistency")
        right, form, language = (row[f"rewards/rewards.{name}/mean"] for name in names)
        assert 0 < language < 1
        assert row["reward"] == pytest.approx(right + 0.2 * form, abs=1e-6)
