"""configs/merge_tiny.yaml, two specialists into one student, with few steps; real vLLM."""

import json
from pathlib import Path

import pytest
from commands import read_lines, run_shipped
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

SMALL = (
    "stages.cold_start.train.max_steps=40",
    "stages.rl_english.max_steps=2",
    "stages.rl_english.prompts_per_step=8",
    "stages.rl_chinese.max_steps=2",
    "stages.rl_chinese.prompts_per_step=8",
    "stages.merged.max_steps=2",
    "stages.merged.prompts_per_step=32",
    "stages.rl_mixed.max_steps=2",
    "stages.rl_mixed.prompts_per_step=8",
    "stages.eval.data.0.options.size=10",
    "stages.eval.data.1.options.size=10",
    "stages.eval.num_samples=2",
)
SPECIALISTS = ["rl_english", "rl_chinese"]


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = run_shipped("merge_tiny", SMALL, tmp_path_factory.mktemp("runs"))
    return folder


def test_the_tokenizer_knows_words_of_both_sets(merging: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merging / "random")
    for word in (" Monday", "周一加"):
        assert len(tokenizer.encode(word)) == 1


def test_both_specialists_teach_the_student_that_they_began_as(merging: Path) -> None:
    for name in (*SPECIALISTS, "rl_mixed"):
        lineage = json.loads((merging / name / "lineage.json").read_text())
        assert list(lineage["parents"]) == ["cold_start"]
    lineage = json.loads((merging / "merged" / "lineage.json").read_text())
    assert sorted(lineage["parents"]) == ["cold_start", *sorted(SPECIALISTS)]
    for row in read_lines(merging / "merged" / "metrics.jsonl"):
        parts = [row[f"divergence/{source}"] for source in ("arithmetic", "arithmetic-zh")]
        assert min(parts) < row["divergence"] < max(parts)


def test_merged_is_compared_with_the_mixed_run_on_both_sets(merging: Path) -> None:
    summary = json.loads((merging / "summary.json").read_text())
    compared = {
        entry["dataset"]: entry["compared_with"]["stage"]
        for entry in summary
        if entry["stage"] == "merged"
    }
    assert compared == {"english": "rl_mixed", "chinese": "rl_mixed"}
    assert all(entry["overlap"] == 0 for entry in summary)
