"""Multi-token prediction in training, against transformers' MtpLayer on one sequence at a time."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grpo_settings import make_grpo, make_on_policy_distill
from tiny_models import MODELS, PROBLEMS, watch_gradients
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from r1pipe.config.sft import Supervised
from r1pipe.models.model import build_model
from r1pipe.models.mtp import find_mtp_layer
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.update import Updater
from r1pipe.sft.encode import encode_traces
from r1pipe.sft.trainer import SupervisedTrainer
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.head import MAX_LOGITS
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout

CPU = torch.device("cpu")
LAYER = "model.layers.2."


@pytest.fixture
def predicting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_model({**MODELS["deepseek_v3"], "num_mtp_layers": 1}, tokenizer, seed=0)


@pytest.fixture
def with_short_prompt(samples: list[Sample]) -> list[Sample]:
    """Also a sample whose first token has only one before it."""
    return [*samples[:6], Sample(Rollout("p", 0, [5], [7, 9, 11], [-1.0] * 3, "", "stop"), 1.0)]


def make_reference(model: PreTrainedModel) -> MtpLayer:
    """transformers' layer with the model's own parameters."""
    config, own = model.config, find_mtp_layer(model)
    layer = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, config.num_hidden_layers)
    layer.enorm, layer.hnorm, layer.eh_proj = own.enorm, own.hnorm, own.eh_proj
    layer.post_norm = own.shared_head["norm"]
    for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        setattr(layer.mtp_block, name, getattr(own, name))
    return layer


def predict_alone(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Log-probabilities of the completion's tokens, each from those up to the second before; 0
    where there are none. As vLLM drafts: without the embedding that goes with position 0."""
    prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
    ids_1L = torch.tensor([prompt + completion])
    hidden_1LD = model.model(input_ids=ids_1L).last_hidden_state[:, :-1]
    embeds_1LD = model.model.embed_tokens(ids_1L[:, 1:])
    embeds_1LD = torch.cat([torch.zeros_like(embeds_1LD[:, :1]), embeds_1LD[:, 1:]], 1)
    position_1L = torch.arange(embeds_1LD.shape[1]).unsqueeze(0)
    hidden_1LD = make_reference(model)(
        embeds_1LD,
        hidden_1LD,
        position_embeddings=model.model.rotary_emb(embeds_1LD, position_ids=position_1L),
        attention_mask=None,
        position_ids=position_1L,
        past_key_values=None,
    )
    logprobs_LV = model.lm_head(hidden_1LD)[0, :-1].log_softmax(-1)
    second_L = logprobs_LV.gather(1, ids_1L[0, 2:].unsqueeze(1)).squeeze(1)
    all_L = torch.cat([torch.zeros(2), second_L])
    return all_L[len(prompt) :]


@pytest.mark.parametrize("max_logits", [2**25, 400 * 7])
def test_packed_and_alone(
    predicting: PreTrainedModel,
    with_short_prompt: list[Sample],
    max_logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing crosses the border of a sequence; gradients are the same, chunks or not."""
    monkeypatch.setitem(MAX_LOGITS, "cpu", max_logits)
    alone, packed = predicting, copy.deepcopy(predicting)
    expected = {id(s): predict_alone(alone, s) for s in with_short_prompt}
    torch.cat(list(expected.values())).square().sum().backward()

    batch, policy = pack(with_short_prompt, CPU), Policy(packed)
    assert policy(batch, 1.0).second is None
    policy.mtp = "joint"
    second = policy(batch, 0.7).second
    second.logprobs_C.square().sum().backward()
    for sample, row in zip(batch.samples, batch.split(second.logprobs_C), strict=True):
        torch.testing.assert_close(row, expected[id(sample)], atol=1e-5, rtol=0)
    assert (second.logprobs_C == 0).sum() == 1
    for (name, parameter), other in zip(alone.named_parameters(), packed.named_parameters()):
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1e-3
            assert float((parameter.grad - other[1].grad).abs().max()) < 1e-4 * scale, name
    with torch.no_grad():
        assert policy(batch, 1.0).second is None, "nobody would learn from it"


def train(
    model: PreTrainedModel, rows: list, folder: Path, num_steps: int, **changes: object
) -> tuple[SupervisedTrainer, list[dict]]:
    settings = {"max_steps": 4, "learning_rate": 0.01, "lr_scheduler_type": "constant", **changes}
    trainer = SupervisedTrainer(
        model, Supervised.model_validate(settings), num_steps=4, dtype="float32"
    )
    metrics = [trainer.take_step(rows, n, "sft", EventLog(folder)) for n in range(num_steps)]
    return trainer, metrics


def test_supervised_training(
    predicting: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The loss is the sum, what is logged as loss the main model's alone; a resumed run goes on
    alike; untrained, the layer stays as it is."""
    rows = encode_traces(PROBLEMS[:6], tokenizer, None).rows
    start = copy.deepcopy(predicting)
    trainer, metrics = train(copy.deepcopy(predicting), rows, tmp_path, 4, mtp={"loss_weight": 0.5})
    alone, without = train(copy.deepcopy(predicting), rows, tmp_path, 4)

    targets = [(trace.make_sample(), trace) for trace in rows]
    expected = torch.cat([predict_alone(start, sample) for sample, _ in targets])
    assert metrics[0]["mtp/loss"] == pytest.approx(float(-expected.mean().detach()), rel=1e-5)
    assert metrics[0]["loss"] == without[0]["loss"]
    assert metrics[-1]["mtp/loss"] < metrics[0]["mtp/loss"]
    assert 0 < metrics[-1]["mtp/accuracy"] < 1
    assert metrics[1]["loss"] != without[1]["loss"], "the model learns with it"
    assert {"experts/layer_1/load", "experts/layer_2/load"} <= metrics[0].keys()
    assert not [name for name in without[0] if "mtp" in name or "layer_2" in name]
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name]) is name.startswith(LAYER), name

    half, _ = train(copy.deepcopy(predicting), rows, tmp_path, 2, mtp={"loss_weight": 0.5})
    resumed, _ = train(copy.deepcopy(predicting), rows, tmp_path, 0, mtp={"loss_weight": 0.5})
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for step in (3, 4):
        resumed.take_step(rows, step, "sft", EventLog(tmp_path))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def make_policy_gradient(model: PreTrainedModel, **changes: object) -> Updater:
    return GrpoUpdater(model, None, make_grpo(**changes), dtype="float32", seed=0)


def make_distillation(model: PreTrainedModel, **changes: object) -> Updater:
    teacher = TeacherModel(build_other(model).requires_grad_(False))
    settings = make_on_policy_distill(**changes)
    return DistillUpdater(model, {"": teacher}, settings, dtype="float32", seed=0)


def build_other(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    return other


@pytest.mark.parametrize("make_updater", [make_policy_gradient, make_distillation])
def test_on_its_own_samples_the_policy_learns_as_without(
    make_updater: Callable[..., Updater], predicting: PreTrainedModel, samples: list[Sample]
) -> None:
    """Its gradient is bit-equal, clipped, too; the layer has one of its own."""
    seen, metrics = [], []
    for changes in ({}, {"mtp": {}}):
        updater = make_updater(copy.deepcopy(predicting), max_grad_norm=1e-3, **changes)
        seen.append(watch_gradients(updater))
        metrics.append(updater.step(copy.deepcopy(samples), 1, lambda metrics: None))
    without, gradients = seen
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in without.items())
    own = {name: gradient for name, gradient in gradients.items() if name.startswith(LAYER)}
    assert own.keys() == gradients.keys() - without.keys()
    norm = torch.stack([gradient.norm() for gradient in own.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert metrics[0]["grad_norm"] == metrics[1]["grad_norm"]
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert metrics[1]["mtp/loss"] > 0
    assert 0 <= metrics[1]["mtp/accuracy"] < 1
