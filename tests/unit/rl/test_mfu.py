"""MFU of a step: what was trained, in the seconds that the update took.

The GPU is one by name only: the tensors are on the CPU.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faked_gpu import fake_gpu
from grpo_settings import make_grpo
from transformers import PreTrainedModel

from r1pipe.models.flops import train_flops
from r1pipe.rl.batch import Batch, Group
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.loop import BestMetric, show, train
from r1pipe.rl.replay import NoSampler
from r1pipe.runs.logs import JsonlLog
from r1pipe.trainer.breaker import Breaker
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.utilization import Utilization
from r1pipe.types import Problem, Score

H100 = 989e12


class OneBatch:
    """The same samples at every step."""

    ahead = None

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def take(self, step: int) -> Batch:
        group = Group(
            Problem("p", "math", []),
            [sample.rollout for sample in self.samples],
            [Score({"r": 1.0}, float(number % 2)) for number, _ in enumerate(self.samples)],
            [sample.advantage for sample in self.samples],
        )
        return Batch(step, step, [group], [group], 1, {"sample": 1.0})

    def wait(self) -> None: ...


def take_step(
    model: PreTrainedModel,
    samples: list[Sample],
    folder: Path,
    device: torch.device | None = None,
    **changes: object,
) -> dict:
    breaker = {"logprob_diff": {"limit": 9.0, "action": "warn"}}
    stage = make_grpo(name="rl", max_steps=1, breaker=breaker, num_iterations=2, **changes)
    updater = GrpoUpdater(copy.deepcopy(model), None, stage, dtype="float32", seed=0)
    if device:
        updater.utilization = Utilization(model.config, device, "bfloat16")
    breaker = Breaker(stage, JsonlLog(folder / "events.jsonl"), folder)
    ((metrics, _),) = train(stage, updater, NoSampler(), OneBatch(samples), breaker, 1)
    return metrics


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_mfu_counts_what_has_a_gradient_once_a_pass(
    model: PreTrainedModel,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gradient_checkpointing: bool,
) -> None:
    """Neither samples without advantage, nor the comparison with the sampler, nor recomputation."""
    device = fake_gpu(monkeypatch)
    metrics = take_step(
        model, samples, tmp_path, device, gradient_checkpointing=gradient_checkpointing
    )
    trained = [sample for sample in samples if sample.advantage]
    assert 0 < len(trained) < len(samples)
    once = train_flops(
        model.config,
        [sample.num_tokens for sample in trained],
        sum(len(sample.rollout.completion_ids) for sample in trained),
    )
    assert metrics["mfu"] == pytest.approx(2 * once / metrics["seconds/update"] / H100)


def test_a_skipped_update_has_an_mfu_of_zero(
    model: PreTrainedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = fake_gpu(monkeypatch)
    samples = copy.deepcopy(samples)
    for sample in samples:
        sample.rollout.finish_reason = "length"
    metrics = take_step(model, samples, tmp_path, device, mask_truncated_completions=True)
    assert metrics["mfu"] == 0


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", None])
def test_without_a_known_peak_there_is_no_column(
    model: PreTrainedModel,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
) -> None:
    """None: a CPU."""
    device = fake_gpu(monkeypatch, name) if name else None
    assert "mfu" not in take_step(model, samples, tmp_path, device)


def test_the_peak_is_that_of_all_cards(
    model: PreTrainedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Utilization(model.config, fake_gpu(monkeypatch), "bfloat16")
    own.add(samples)
    flops = own._flops
    peak = 312e12

    def gather(value: tuple) -> list[tuple]:
        return [value, (flops, peak)]

    monkeypatch.setattr("r1pipe.utils.distributed.gather", gather)
    assert own.take(2.0)["mfu"] == pytest.approx(2 * flops / 2.0 / (H100 + peak))
    own.add(samples)
    peak = None
    assert own.take(2.0) == {}, "one of the cards is unknown"


def test_progress_shows_it_where_there_is_one() -> None:
    seen: list[dict] = []
    progress = SimpleNamespace(advance=lambda **figures: seen.append(figures))
    metrics = {"reward": 1.0, "completions/mean_length": 9.0}
    for row in (metrics, {**metrics, "mfu": 0.4}):
        show(progress, row, BestMetric("reward"))
    assert [figures.get("mfu") for figures in seen] == [None, 0.4]
