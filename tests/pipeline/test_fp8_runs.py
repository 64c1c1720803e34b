"""Rollouts and updates in FP8, emulated, with real vLLM; started once, and once more by a run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT, read_lines, run
from safetensors.torch import load_file
from test_engine import APART, CPU, LIMIT, SETTINGS
from test_faults import begin, save_mixture

from r1pipe.rl.loop import sync
from r1pipe.rollout.engine import Sampler


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def sampler(checkpoint: Path) -> Iterator[Sampler]:
    sampler = Sampler(str(checkpoint), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


@pytest.mark.parametrize("fp8", ["rollouts", "update", "both"])
def test_loop_in_fp8(
    fp8: str, sampler: Sampler, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampler and trainer are apart by their rounding, and agree in a probe with the same."""
    world, steps = begin({"fp8": fp8}, checkpoint, sampler, tmp_path, monkeypatch)
    sync(world.updater, sampler)
    for _ in range(2):
        metrics, _ = next(steps)
        assert metrics["sampler/logprob_diff_mean"] > APART
        assert 0 < metrics["sampler/kl"] < 0.1
        assert 0.8 < metrics["sampler/ess"] < 1
        assert metrics["sync/logprob_diff_mean"] < LIMIT


@pytest.mark.slow
def test_run_in_fp8(tmp_path: Path) -> None:
    """From the command line: told in the log; checkpoints are not rounded."""
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    random, sft, grpo, *_ = values["stages"]
    for stage in (sft, grpo):
        stage["data"]["options"]["size"] = 100
    sft["train"] |= {"max_steps": 2, "warmup_steps": 0, "fp8": "update"}
    grpo |= {"fp8": "both", "rewards": [{"function": "reward_of_tests.undecided_for_odd_answers"}]}
    grpo |= {"max_steps": 2, "prompts_per_step": 8, "num_generations": 4}
    recipe = tmp_path / "fp8.yaml"
    own = {"name": "fp8", "runs_dir": str(tmp_path), "stages": [random, sft, grpo]}
    recipe.write_text(yaml.safe_dump({**values, **own}))
    result = run("run", recipe, "--skip-doctor")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "fp8 (update), emulated: " in result.stderr
    assert "fp8 (both), emulated: " in result.stderr
    rows = read_lines(tmp_path / "fp8" / "grpo" / "metrics.jsonl")
    for row in rows:
        assert row["sampler/logprob_diff_mean"] > APART
        assert row["sync/logprob_diff_mean"] < LIMIT
    made = load_file(tmp_path / "fp8" / "grpo" / "model.safetensors")
    matrix = made["model.layers.0.mlp.gate_proj.weight"][:128, :128]
    codes = matrix / (matrix.abs().max() / 448)
    assert (codes.to(torch.float8_e4m3fn).float() != codes).any()
