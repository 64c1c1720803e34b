"""configs/deepseek_tiny.yaml, the demo trained as DeepSeek-V3 was, with few steps; real vLLM."""

from pathlib import Path

import pytest
import torch
from commands import read_lines, run_shipped
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SMALL = (
    "stages.random.tokenizer.data.options.size=300",
    "stages.sft.train.max_steps=60",
    "stages.grpo.max_steps=2",
    "stages.grpo.prompts_per_step=8",
    "stages.grpo.data.options.size=100",
    "stages.distill.data.options.size=400",
    "stages.distill.traces.num_generations=2",
    "stages.distill.train.max_steps=2",
    "stages.eval.data.options.size=10",
    "stages.eval.num_samples=2",
    "stages.eval.k=2",
)
LAYER = "model.layers.3."
"""The prediction layer, behind the model's three."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run_shipped("deepseek_tiny", SMALL, tmp_path_factory.mktemp("runs"))


def test_every_part_is_at_work(run: tuple[Path, str]) -> None:
    folder, said = run
    assert "fp8 (update), emulated" in said
    assert "fp8 (both), emulated" in said
    sft, grpo = (read_lines(folder / stage / "metrics.jsonl") for stage in ("sft", "grpo"))
    assert sft[-1]["mtp/loss"] < sft[0]["mtp/loss"]
    assert 0 < grpo[0]["sampler/acceptance"] <= 1  # step 2 is sampled without drafts, to compare
    for row in grpo:
        assert 0 < row["sampler/logprob_diff_mean"] < 0.1  # FP8's rounding
        assert 0.9 < row["sampler/ess"] < 1
        assert 0 < row["mtp/accuracy"] <= 1


def test_the_prediction_layer_and_the_bias_move_in_both_stages(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = load_file(folder / "random" / "model.safetensors")
    for stage in ("sft", "grpo"):
        after = load_file(folder / stage / "model.safetensors")
        assert after.keys() == before.keys()
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        for part in (f"{LAYER}eh_proj.weight", f"{LAYER}mlp.gate.e_score_correction_bias"):
            assert part in moved
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in moved
        before = after
