"""The trainer's half on tiny models: encoding, packing, micro-batches, tokenizers."""

import copy
import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_settings import make_grpo
from tiny_models import MODELS, PROBLEMS, TINY, make_rollout
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from r1pipe.config.rl import LOSSES, Grpo
from r1pipe.config.sft import Supervised
from r1pipe.doctor.model_shape import Shape
from r1pipe.models.model import build_model
from r1pipe.models.routing import route_in_float32
from r1pipe.models.tokenizer import build_tokenizer, encode_completion, encode_prompt
from r1pipe.rl.update import Updater
from r1pipe.sft.encode import encode_traces
from r1pipe.sft.trainer import SupervisedTrainer, draw_batches
from r1pipe.trainer import attention
from r1pipe.trainer.attention import attend_packed
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.fsdp import shard
from r1pipe.trainer.optimizer import OffloadedAdamW, find_schedule
from r1pipe.trainer.packing import Sample, Support, cut_batches, pack
from r1pipe.trainer.policy import MAX_LOGITS, Policy, Truncation, chunk_sizes, require_trainable
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_model(TINY, tokenizer, seed=0)


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Rollouts of many lengths, with advantages of both signs and some of zero."""
    rng = random.Random(0)
    rows = []
    for problem in PROBLEMS[:20]:
        rollout = make_rollout(tokenizer, problem, rng.randint(3, 40))
        rows.append(Sample(rollout, rng.choice([-1.0, 0.0, 0.5, 2.0])))
    return rows


TEXTS = [
    "Mia has 7 apples.",
    "<think>\n7+3=10\n</think>\n\\boxed{10}",
    "ünï © 数学 \t x",
    "  two  spaces",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = encode_completion(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_thinking_marks_are_single_tokens_that_decoding_keeps(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for mark in ("<think>", "</think>"):
        ids = tokenizer.encode(mark, add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == mark


def test_traces_are_the_sampler_s_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = encode_traces(PROBLEMS[:1], tokenizer, None).rows[0]
    assert trace.prompt_ids.tolist() == encode_prompt(tokenizer, PROBLEMS[0].prompt)
    assert trace.completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trace.completion_ids[:-1]) == PROBLEMS[0].solution


def test_long_traces_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [row.num_tokens for row in encode_traces(PROBLEMS, tokenizer, None).rows]
    limit = sorted(lengths)[10]
    traces = encode_traces(PROBLEMS, tokenizer, limit)
    assert len(traces.rows) == sum(length <= limit for length in lengths)
    assert traces.num_too_long == len(lengths) - len(traces.rows)
    with pytest.raises(UserError, match="max_length = 3"):
        encode_traces(PROBLEMS, tokenizer, 3)


def logprobs_alone(model: PreTrainedModel, sample: Sample, temperature: float) -> torch.Tensor:
    """By the model's own forward, one sequence at a time."""
    prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
    alone = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return alone.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)


def test_parts_hold_every_sample_within_the_budget(samples: list[Sample]) -> None:
    parts = cut_batches(samples, 200)
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, samples))
    assert all(sum(s.num_tokens for s in part) <= 200 or len(part) == 1 for part in parts)
    assert len(parts) > 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_logits", [2**25, 400 * 7])
def test_packing_changes_no_logprob_and_no_gradient(
    tokenizer: PreTrainedTokenizerBase,
    samples: list[Sample],
    name: str,
    max_logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither does computing the logits in chunks of 7 tokens."""
    monkeypatch.setitem(MAX_LOGITS, "cpu", max_logits)
    alone = build_model(MODELS[name], tokenizer, seed=0)
    packed = copy.deepcopy(alone)
    expected = [logprobs_alone(alone, sample, 0.7) for sample in samples]
    torch.cat(expected).square().sum().backward()

    batch = pack(samples, CPU)
    result = Policy(packed)(batch, 0.7)
    result.logprobs_C.square().sum().backward()
    own = {id(s): row for s, row in zip(batch.samples, batch.split(result.logprobs_C))}
    for sample, row in zip(samples, expected):
        torch.testing.assert_close(own[id(sample)], row, atol=1e-5, rtol=0)
    for (parameter_name, parameter), other in zip(alone.named_parameters(), packed.parameters()):
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1e-3
            difference = float((parameter.grad - other.grad).abs().max())
            assert difference < 1e-4 * scale, parameter_name


OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
}
"""Architectures that call their layers, and much in their config, by other names."""


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_names(
    tokenizer: PreTrainedTokenizerBase, samples: list[Sample], name: str
) -> None:
    model = build_model({"model_type": name, **OTHERS[name]}, tokenizer, seed=0).eval()
    batch = pack(samples, CPU)
    expected = [logprobs_alone(model, sample, 1.0) for sample in batch.samples]
    found = Policy(model)(batch, 1.0).logprobs_C
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
    shape = Shape.of(model.config)
    assert shape.largest_layer * 2 + shape.outside_layers == shape.parameters
    assert shape.activations(100, 4, checkpointing=False) > 0


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
# Models of which a packed row would be wrong, and a word of the line that says why.
UNPACKABLE = {
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "Lfm2ShortConv|layers of conv"),
    "granitemoehybrid": ({"layer_types": LINEAR, **MAMBA}, "Mamba|linear_attention"),
    "qwen3_next": ({"layer_types": LINEAR, "num_experts": 4}, "DeltaNet|linear_attention"),
    "qwen3_5_text": ({"layer_types": LINEAR}, "DeltaNet|linear_attention"),
    "bamba": ({}, "Mixer|linear_attention"),
    "falcon_h1": ({}, "Mixer|hybrid"),
    "jamba": ({}, "Mixer|linear_attention"),
    "nemotron_h": ({}, "Block|Mixer|linear_attention"),
    "minimax": ({"layer_types": LINEAR, "num_local_experts": 4}, "Lightning|linear_attention"),
    "mamba2": ({"num_hidden_layers": 2}, "Mixer|linear_attention"),
    "recurrent_gemma": ({}, "layer 0"),
    "gemma3": ({}, "multimodal"),
    "llama4": ({}, "multimodal"),
    "bloom": ({}, "BloomBlock"),
    "bert": ({}, "is_causal=False"),
    "stablelm": ({}, "StableLmAttention"),
    "phimoe": ({"sliding_window": 8, "num_local_experts": 4}, "sliding_window of 8"),
    "doge": ({}, "attention_mask"),
    "gemma2": ({"final_logit_softcapping": None}, "softcap"),
    "gpt_oss": ({"num_local_experts": 4}, "s_aux"),
}


@pytest.mark.parametrize("by_name", [True, False], ids=["layer_types", "modules"])
@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_a_model_that_cannot_be_packed_is_refused(
    model_type: str, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its config alone, before there are weights; by what its layers do, too, whatever they are
    called there."""
    if not by_name:
        every = {"conv", "linear_attention", "hybrid", "moe", "mlp", *attention.ATTENTION_TYPES}
        monkeypatch.setattr(attention, "ATTENTION_TYPES", every)
    changes, words = UNPACKABLE[model_type]
    known = AutoConfig.for_model(model_type)
    # Multimodal and mamba-only configs as they are: without memory their size is no matter.
    sizes = {key: value for key, value in SMALL.items() if hasattr(known, key)}
    sizes = {} if model_type in ("gemma3", "llama4", "mamba2", "bamba", "jamba") else sizes
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    with pytest.raises(UserError, match=rf"^{model_type}\w*: .*({words})") as error:
        require_trainable(config, "sdpa")
    assert "\n" not in str(error.value)


PACKABLE = {
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mistral": {"sliding_window": 4},
    "granitemoehybrid": {"layer_types": ["full_attention"] * 4, "num_local_experts": 4, **MAMBA},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},  # experts of a kind of its own
    "phi3": {"pad_token_id": 0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 8, "moe_intermediate_size": 16},
    "hunyuan_v1_dense": {"head_dim": 16},  # whose feed-forward layers know their layer_idx as well
}


@pytest.mark.parametrize("model_type", PACKABLE)
def test_other_families_are_packed_right(model_type: str, samples: list[Sample]) -> None:
    known = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in SMALL.items() if hasattr(known, key)}
    settings = {"initializer_range": 0.2, **sizes, **PACKABLE[model_type], "vocab_size": 400}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = {id(s): logprobs_alone(model, s, 1.0) for s in samples[:5]}
        batch = pack(samples[:5], CPU)
        rows = batch.split(Policy(model)(batch, 1.0).logprobs_C)
    for sample, row in zip(batch.samples, rows, strict=True):
        torch.testing.assert_close(row, expected[id(sample)], atol=1e-4, rtol=0)


def test_sliding_window_and_grouped_heads() -> None:
    torch.manual_seed(0)
    lengths, window = [6, 6, 3], 4
    query, key, value = (torch.randn(1, heads, 15, 8) for heads in (4, 2, 2))
    out, _ = attend_packed(
        None, query, key, value, None, sequence_lengths=lengths, scaling=0.3, sliding_window=window
    )
    row, column = torch.arange(15).unsqueeze(1), torch.arange(15).unsqueeze(0)
    owner = torch.tensor([0] * 6 + [1] * 6 + [2] * 3)
    seen = (owner.unsqueeze(1) == owner) & (column <= row) & (row - column < window)
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


# Probabilities 0.4, 0.3, 0.2, 0.1: (top_p, top_k, tokens that are left).
TRUNCATIONS = [
    (1.0, 0, [0, 1, 2, 3]),
    (1.0, 2, [0, 1]),
    (0.5, 0, [0, 1]),
    (0.35, 0, [0]),
    (0.95, 0, [0, 1, 2, 3]),
    (0.6, 3, [0, 1]),  # of 4/9, 3/9, 2/9, what top_k leaves
]


@pytest.mark.parametrize(("top_p", "top_k", "left"), TRUNCATIONS)
def test_truncation(top_p: float, top_k: int, left: list[int]) -> None:
    logits = torch.tensor([[0.3, 0.1, 0.4, 0.2]]).log()
    keep = Truncation(top_p, top_k).keep(logits)[0]
    assert sorted((-logits[0]).argsort().tolist().index(i) for i in keep.nonzero()) == left


def test_support_remembers_what_was_left() -> None:
    keep = torch.rand(9, 30) > 0.7
    parts = Support.of(keep).split([2, 3, 4])
    assert torch.equal(Support.join(parts, CPU).mask(30), keep)
    assert torch.equal(parts[1].mask(30), keep[2:5])


make_settings = partial(make_grpo, learning_rate=1e-3, max_grad_norm=1e9)


def make_updater(model: PreTrainedModel, **changes: object) -> Updater:
    settings = make_settings(**changes)
    reference = copy.deepcopy(model) if settings.beta else None
    return Updater(copy.deepcopy(model), reference, settings, dtype="float32", seed=0)


def accept(metrics: dict[str, float]) -> None: ...


def update(model: PreTrainedModel, samples: list[Sample], **changes: object) -> tuple[dict, dict]:
    """Metrics and weights after one step from the same start."""
    updater = make_updater(model, **changes)
    metrics = updater.step(copy.deepcopy(samples), 1, accept)
    return metrics, dict(updater.model.named_parameters())


SCHEDULES = [
    (make_grpo, {}, [0, 0.5, 1, 1, 1, 1]),
    (make_grpo, {"lr_scheduler_type": "linear"}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    (make_grpo, {"lr_scheduler_type": "cosine"}, [0, 0.5, 1, 0.854, 0.5, 0.146]),
    (Supervised, {"lr_scheduler_type": "constant"}, [0, 0.5, 1, 1, 1, 1]),
    (Supervised, {"lr_scheduler_type": "linear"}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    (Supervised, {"min_lr": 0.2}, [0, 0.5, 1, 0.883, 0.6, 0.317]),
]


@pytest.mark.parametrize(("make", "settings", "expected"), SCHEDULES)
def test_every_schedule_warms_up(
    make: Callable[..., Grpo | Supervised], settings: dict, expected: list[float]
) -> None:
    """Two steps of six; without them each begins at its top."""
    for warmup_steps in (2, 0):
        stage = make(max_steps=6, learning_rate=1.0, warmup_steps=warmup_steps, **settings)
        name, arguments = find_schedule(stage)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(
            name, optimizer, warmup_steps, stage.max_steps, scheduler_specific_kwargs=arguments
        )
        rates = []
        for _ in expected:
            rates += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        if warmup_steps:
            assert rates == pytest.approx(expected, abs=1e-3)
        else:
            assert rates[0] == 1.0


def test_the_updater_warms_up(model: PreTrainedModel, samples: list[Sample]) -> None:
    metrics, _ = update(model, samples, warmup_steps=4, steps_per_generation=2)
    assert metrics["learning_rate"] == pytest.approx(1e-3 * 2 / 8), "after two of eight updates"


def assert_same_weights(some: dict, others: dict) -> None:
    for name, weight in some.items():
        # Adam's first step has size lr whatever the gradient: compare where it is not noise.
        close = (weight - others[name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name


def test_an_offloaded_optimizer_does_what_adamw_does(model: PreTrainedModel) -> None:
    """To the bit, over a change of the learning rate, and going on from a saved state."""
    makers = {"all": torch.optim.AdamW, "offloaded": OffloadedAdamW}
    models = {name: copy.deepcopy(model) for name in makers}
    for name, make in makers.items():
        parameters = list(models[name].parameters())
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
        optimizer = make(parameters, **settings)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
            if step == 1:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(parameters, **settings)
                optimizer.load_state_dict(state)
        assert len(optimizer.state_dict()["state"]) == len(parameters)
    for one, other in zip(models["all"].parameters(), models["offloaded"].parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_micro_batches_change_nothing(
    model: PreTrainedModel, samples: list[Sample], loss_type: str, beta: float
) -> None:
    changes = {"loss_type": loss_type, "beta": beta, "epsilon_high": 0.3}
    whole, weights = update(model, samples, **changes, micro_batch_tokens=10**6)
    parts, others = update(model, samples, **changes, micro_batch_tokens=200)
    assert parts.keys() == whole.keys()
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    assert_same_weights(weights, others)


def test_one_update_needs_no_second_forward_pass(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    """What a single optimizer step computes for itself is what `evaluate` would have."""
    own, weights = update(model, samples, beta=0.1, top_p=0.9)
    updater = make_updater(model, beta=0.1, top_p=0.9)
    fresh = copy.deepcopy(samples)
    before = updater.evaluate(fresh).metrics()
    assert all(s.support is not None and s.ref_logprobs is not None for s in fresh)
    updater.step(fresh, 1, accept)
    for name, value in before.items():
        assert own[name] == pytest.approx(value, rel=1e-5)
    assert_same_weights(weights, dict(updater.model.named_parameters()))


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_a_failed_check_leaves_the_policy_alone(
    model: PreTrainedModel, samples: list[Sample], steps_per_generation: int
) -> None:
    def refuse(metrics: dict[str, float]) -> None:
        assert metrics["sampler/logprob_diff_mean"] > 0
        raise UserError("apart")

    updater = make_updater(model, steps_per_generation=steps_per_generation)
    with pytest.raises(UserError, match="apart"):
        updater.step(copy.deepcopy(samples), 1, refuse)
    for name, weight in updater.model.named_parameters():
        assert torch.equal(weight, model.get_parameter(name))


def test_update_raises_what_is_good_and_lowers_what_is_bad(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    updater = make_updater(model)
    samples = copy.deepcopy(samples)
    updater.evaluate(samples)
    before = [sample.old_logprobs.sum() for sample in samples]
    updater.step(samples, 1, accept)
    updater.evaluate(samples)
    gains = [float(s.old_logprobs.sum() - old) * s.advantage for s, old in zip(samples, before)]
    assert sum(gains) > 0
    assert sum(g > 0 for g in gains) > sum(g < 0 for g in gains)


def test_every_pass_covers_every_sample_once(model: PreTrainedModel, samples: list[Sample]) -> None:
    updater = make_updater(model, steps_per_generation=4, num_iterations=2)
    parts = updater.plan_minibatches(samples, 1)
    assert len(parts) == 8
    for passed in (parts[:4], parts[4:]):
        assert sorted(number for part in passed for number in part) == [*range(len(samples))]
    assert parts[0] != parts[4]
    assert updater.step(copy.deepcopy(samples), 1, accept)["grad_norm"] > 0
    assert updater.scheduler.last_epoch == 8


def test_samples_without_advantage_cost_nothing(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    silent = [Sample(sample.rollout, 0.0) for sample in samples]
    updater = make_updater(model)
    metrics = updater.step(silent, 1, accept)
    assert metrics["sampler/logprob_diff_mean"] > 0, "measured nevertheless"
    assert metrics["tokens_trained"] == 0
    assert "loss" not in metrics
    assert "sampler/logprob_diff_mean" not in updater.step([], 1, accept)


def test_unknown_model_settings_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match='no "hiden_size"'):
        build_model({"model_type": "qwen3", "hiden_size": 3}, tokenizer, 0)
    with pytest.raises(UserError, match="qwen9"):
        build_model({"model_type": "qwen9"}, tokenizer, 0)
    with pytest.raises(UserError, match="model_type is missing"):
        build_model({}, tokenizer, 0)


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
    """Loss and gradient, in one micro-batch and in one for each row."""
    model = build_model(MODELS[name], tokenizer, seed=0)
    traces = encode_traces(PROBLEMS[:6], tokenizer, None).rows
    width = max(trace.num_tokens for trace in traces)
    ids, labels = torch.zeros(2, len(traces), width, dtype=torch.long)
    labels -= 100
    mask = torch.zeros_like(ids)
    for row, trace in enumerate(traces):
        both = np.concatenate([trace.prompt_ids, trace.completion_ids])
        ids[row, : len(both)] = torch.from_numpy(both)
        mask[row, : len(both)] = 1
        labels[row, len(trace.prompt_ids) : len(both)] = torch.from_numpy(trace.completion_ids)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = {}

    trainer = make_supervised(model, max_grad_norm=1e9, micro_batch_tokens=tokens)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    metrics = trainer.take_step(traces, 1, "sft", EventLog(tmp_path))
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["tokens_trained"] == int(mask.sum())
    for key, gradient in gradients.items():
        torch.testing.assert_close(seen[key], gradient, atol=1e-6, rtol=1e-4)


def test_every_row_is_drawn_once_an_epoch_from_any_step_on() -> None:
    batches = list(itertools.islice(draw_batches(7, 3, 0, 0), 14))
    drawn = list(itertools.chain.from_iterable(batches))
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert list(itertools.islice(draw_batches(7, 3, 0, 5), 9)) == batches[5:]


@pytest.mark.parametrize("name", MODELS)
def test_looking_at_a_model_leaves_its_config(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """It says which attention and which code of the experts the model runs: batched_mm, by which
    it is looked at, takes ten times as long."""
    config = build_model(MODELS[name], tokenizer, seed=0).config
    before = (config._attn_implementation, config._experts_implementation)
    require_trainable(config, "sdpa")
    assert (config._attn_implementation, config._experts_implementation) == before


def test_chunks_of_the_head_lose_no_gradient_in_bf16(
    tokenizer: PreTrainedTokenizerBase, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float32. A sum over 70 chunks that is kept in bf16 has twice the error of one product
    and more: here the two may differ by a quarter."""
    model = build_model({**TINY, "tie_word_embeddings": False}, tokenizer, seed=0).bfloat16()
    batch = pack(samples, CPU)

    def differentiate(model: PreTrainedModel, num_chunks: int) -> torch.Tensor:
        size = -(-len(batch.target_C) // num_chunks)
        monkeypatch.setitem(MAX_LOGITS, "cpu", size * len(tokenizer))
        model.zero_grad()
        Policy(model)(batch, 1.0).logprobs_C.mean().backward()
        return model.lm_head.weight.grad.float().clone()

    exact = differentiate(copy.deepcopy(model).float(), 1)
    one, many = (float((differentiate(model, n) - exact).norm()) for n in (1, 70))
    assert 0 < many < 1.25 * one


def test_a_gpu_gets_the_head_in_larger_chunks() -> None:
    """Of a vocabulary of 152k; 220 tokens are too few to keep one busy."""
    assert chunk_sizes(2000, 152_064, torch.device("cpu"))[0] == 220
    assert chunk_sizes(2000, 152_064, torch.device("cuda"))[0] == 882


@pytest.mark.parametrize("name", MODELS)
def test_one_process_computes_its_layers_in_bf16(
    tokenizer: PreTrainedTokenizerBase, samples: list[Sample], name: str
) -> None:
    """As a copy whose parameters are bf16 does, to the bit, experts included; what is held, and its
    gradient, is float32."""
    model = build_model(MODELS[name], tokenizer, seed=0).eval()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.bfloat16()
    route_in_float32(other)
    batch = pack(samples[:8], CPU)
    expected = Policy(other)(batch, 1.0).logprobs_C
    policy = shard(Policy(model), model, CPU, dtype="bfloat16")
    now = policy(batch, 1.0).logprobs_C
    assert torch.equal(now, expected)
    now.mean().backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 5
