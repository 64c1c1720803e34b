"""Supervised training: the loss, the order of the rows, the experts' balance."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faked_gpu import fake_gpu
from moe_models import make_moe_model
from tiny_models import MODELS, PROBLEMS
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r1pipe.config.base import ProblemSet
from r1pipe.config.sft import Supervised
from r1pipe.data.problems import load_problems
from r1pipe.models.expert_load import (
    ExpertLoad,
)
from r1pipe.models.flops import train_flops
from r1pipe.models.model import build_model
from r1pipe.models.routing import (
    find_routers,
)
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.runs.logs import MetricsLog
from r1pipe.sft.encode import encode_traces
from r1pipe.sft.trainer import SupervisedTrainer, draw_batches
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.utilization import Utilization
from r1pipe.utils.jsonl import read_jsonl
from r1pipe.utils.progress import StageProgress


def make_supervised(
    model: PreTrainedModel, num_steps: int = 8, **changes: object
) -> SupervisedTrainer:
    settings = Supervised.model_validate({"max_steps": num_steps, "learning_rate": 0.01, **changes})
    return SupervisedTrainer(model, settings, num_steps=num_steps, dtype="float32")


@pytest.mark.parametrize("tokens", [8, 4096])
@pytest.mark.parametrize("name", MODELS)
def test_the_supervised_loss_is_the_models_own_over_padded_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, tokens: int
) -> None:
    """Loss and gradient, in one micro-batch and in one for each row; without what tools said."""
    model = build_model(MODELS[name], tokenizer, seed=0)
    calling = load_problems(ProblemSet(recipe="products", options={"size": 2}))
    traces = encode_traces([*PROBLEMS[:4], *calling], tokenizer, None).rows
    width = max(trace.num_tokens for trace in traces)
    ids, labels = torch.zeros(2, len(traces), width, dtype=torch.long)
    labels -= 100
    mask = torch.zeros_like(ids)
    for row, trace in enumerate(traces):
        both = np.concatenate([trace.prompt_ids, trace.completion_ids])
        ids[row, : len(both)] = torch.from_numpy(both)
        mask[row, : len(both)] = 1
        learnt = labels[row, len(trace.prompt_ids) : len(both)]
        learnt[:] = torch.from_numpy(trace.completion_ids)
        for start, stop in trace.given:
            learnt[start:stop] = -100
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = {}

    trainer = make_supervised(model, max_grad_norm=1e9, micro_batch_tokens=tokens)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad for n, p in model.named_parameters() if n in gradients})
    )
    metrics = trainer.take_step(traces, 1, "sft", EventLog(tmp_path))
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["tokens_trained"] == int(mask.sum())
    for key, gradient in gradients.items():
        torch.testing.assert_close(seen[key], gradient, atol=1e-6, rtol=1e-4)


def test_a_step_says_its_mfu(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, here one by name only."""
    model = build_model(MODELS["deepseek_v3"], tokenizer, seed=0)
    traces = encode_traces(PROBLEMS[:6], tokenizer, None).rows
    trainer = make_supervised(model)
    events = EventLog(tmp_path)
    assert "mfu" not in trainer.take_step(traces, 1, "sft", events)
    trainer.utilization = Utilization(model.config, fake_gpu(monkeypatch), "bfloat16")
    metrics = trainer.take_step(traces, 2, "sft", events)
    num_logits = sum(len(trace.completion_ids) for trace in traces)
    flops = train_flops(model.config, [trace.num_tokens for trace in traces], num_logits)
    assert metrics["mfu"] == pytest.approx(flops / metrics["seconds/step"] / 989e12)


def test_every_row_is_drawn_once_an_epoch_from_any_step_on() -> None:
    batches = list(itertools.islice(draw_batches(7, 3, 0, 0), 14))
    drawn = list(itertools.chain.from_iterable(batches))
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert list(itertools.islice(draw_batches(7, 3, 0, 5), 9)) == batches[5:]


class StageStub:
    """What supervised training reads of a stage's context."""

    def __init__(self, folder: Path):
        self.folder = self.shared_folder = folder
        self.recipe = SimpleNamespace(dtype="float32", seed=0)

    def open_log(self) -> MetricsLog:
        return MetricsLog(self.folder)

    def open_progress(self, label: str, num_steps: int) -> StageProgress:
        return StageProgress(label, num_steps)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe"])
def test_supervised_training_balances(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is counted once, the bias moves by one rate a step, the log has both."""
    from r1pipe.sft.trainer import train_on_traces

    problems = load_problems(ProblemSet(recipe="arithmetic", options={"size": 30}))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = make_moe_model(model_type, **changes)
    routers = find_routers(model)
    before = [router.bias.clone() for router in routers if router.bias is not None]
    counts: list[int] = []
    balance = ExpertLoad.balance

    def count_and_balance(load: ExpertLoad, *, move_bias: bool) -> None:
        counts.append(int(load._counts_LE.sum()))
        balance(load, move_bias)

    monkeypatch.setattr(ExpertLoad, "balance", count_and_balance)
    settings = Supervised(
        max_steps=5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        bias_update_rate=0.01,
        seq_aux_loss_coef=0.1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=10,
    )
    train_on_traces(model, tokenizer, problems, settings, StageStub(tmp_path), "sft")

    rows = [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(counts) == 5
    assert sum(counts) == rows[-1]["num_tokens"] * 2 * len(routers)
    assert 0 < rows[-1]["experts/entropy"] < 1
    assert rows[-1]["learning_rate"] == pytest.approx(4e-4), "the fifth step of a warmup of ten"
    assert rows[-1]["experts/seq_aux_loss"] > 0.9
    for router, start in zip(routers, before):
        moves = (router.bias - start) / 0.01
        torch.testing.assert_close(moves, moves.round(), atol=1e-3, rtol=0)
        assert 0 < moves.abs().max() < 5.01
