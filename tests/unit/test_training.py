"""The trainer's half on tiny models: encoding, padding, micro-batches, tokenizers."""

import copy
import random

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1pipe.config import Grpo, ProblemSet
from r1pipe.errors import UserError
from r1pipe.grpo.update import Sample, Updater, compute_logprobs, make_micro_batches
from r1pipe.models import build_model, build_tokenizer, encode_completion, encode_prompt
from r1pipe.problems import load_problems
from r1pipe.records import Rollout
from r1pipe.supervised import encode_traces

CPU = torch.device("cpu")
TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 50}))


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
        completion = encode_completion(tokenizer, problem.solution)[: rng.randint(3, 40)]
        rollout = Rollout(
            problem_id=problem.id,
            sample=0,
            prompt_ids=encode_prompt(tokenizer, problem.prompt),
            completion_ids=completion,
            logprobs=[-1.0] * len(completion),
            completion="",
            finish_reason="stop",
        )
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
    row = encode_traces(PROBLEMS[:1], tokenizer, None).rows[0]
    prompt = encode_prompt(tokenizer, PROBLEMS[0].prompt)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["completion_mask"].index(1) == len(prompt)
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_long_traces_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [len(row["input_ids"]) for row in encode_traces(PROBLEMS, tokenizer, None).rows]
    limit = sorted(lengths)[10]
    traces = encode_traces(PROBLEMS, tokenizer, limit)
    assert len(traces.rows) == sum(length <= limit for length in lengths)
    assert traces.num_too_long == len(lengths) - len(traces.rows)
    with pytest.raises(UserError, match="max_length = 3"):
        encode_traces(PROBLEMS, tokenizer, 3)


@torch.no_grad()
def test_padding_changes_no_logprob(model: PreTrainedModel, samples: list[Sample]) -> None:
    batches = make_micro_batches(samples, 600, 0, CPU)
    assert len(batches) > 1
    assert sum(len(batch.samples) for batch in batches) == len(samples)
    for batch in batches:
        assert batch.ids_BL.numel() <= 600
        logprobs_BT, _ = compute_logprobs(model, batch, temperature=0.7)
        for sample, own in zip(batch.samples, batch.gather(logprobs_BT)):
            prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7
            alone = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = alone.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


def test_spread_is_the_inverse_of_gather(samples: list[Sample]) -> None:
    batch = make_micro_batches(samples, 10**6, 0, CPU)[0]
    rows = [torch.arange(len(s.rollout.completion_ids)).float() + 1 for s in batch.samples]
    spread_BT = batch.spread(rows)
    assert torch.equal(spread_BT != 0, batch.mask_BT != 0)
    assert all(torch.equal(a, b) for a, b in zip(batch.gather(spread_BT), rows))


def make_settings(**changes: object) -> Grpo:
    values = {
        "kind": "grpo",
        "from": "x",
        "data": {"recipe": "arithmetic"},
        "rewards": [{"function": "rewards.math_correct"}],
        "max_steps": 2,
        "prompts_per_step": 5,
        "num_generations": 4,
        "max_completion_length": 40,
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
    }
    return Grpo.model_validate({**values, **changes})


def update(model: PreTrainedModel, samples: list[Sample], **changes: object) -> tuple[dict, dict]:
    """Metrics and weights after one step from the same start."""
    policy = copy.deepcopy(model)
    settings = make_settings(**changes)
    reference = copy.deepcopy(model) if settings.beta else None
    updater = Updater(policy, reference, settings, dtype="float32", seed=0, pad_token_id=0)
    samples = copy.deepcopy(samples)
    updater.evaluate(samples)
    return updater.update(samples, 1), dict(policy.named_parameters())


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_micro_batches_change_nothing(
    model: PreTrainedModel, samples: list[Sample], loss_type: str, beta: float
) -> None:
    whole, weights = update(
        model, samples, loss_type=loss_type, beta=beta, micro_batch_tokens=10**6
    )
    parts, others = update(model, samples, loss_type=loss_type, beta=beta, micro_batch_tokens=200)
    for name in ("loss", "grad_norm", "clip_ratio/low", "clip_ratio/high"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        # Adam's first step has size lr whatever the gradient: compare where it is not noise.
        close = (weight - others[name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name


def test_update_raises_what_is_good_and_lowers_what_is_bad(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    policy = copy.deepcopy(model)
    updater = Updater(policy, None, make_settings(), dtype="float32", seed=0, pad_token_id=0)
    samples = copy.deepcopy(samples)
    updater.evaluate(samples)
    before = [sample.old_logprobs.sum() for sample in samples]
    updater.update(samples, 1)
    updater.evaluate(samples)
    gains = [float(s.old_logprobs.sum() - old) * s.advantage for s, old in zip(samples, before)]
    assert sum(gains) > 0
    assert sum(g > 0 for g in gains) > sum(g < 0 for g in gains)


def test_minibatches_cover_every_sample_once(model: PreTrainedModel, samples: list[Sample]) -> None:
    metrics, _ = update(model, samples, steps_per_generation=4)
    assert metrics["grad_norm"] > 0
    updater = Updater(
        copy.deepcopy(model),
        None,
        make_settings(steps_per_generation=4),
        dtype="float32",
        seed=0,
        pad_token_id=0,
    )
    seen: list[int] = []
    updater.batches = lambda minibatch: seen.extend(map(id, minibatch)) or []
    fresh = copy.deepcopy(samples)
    updater.update(fresh, 1)
    assert sorted(seen) == sorted(id(s) for s in fresh if s.advantage != 0)


def test_unknown_model_settings_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match='no "hiden_size"'):
        build_model({"model_type": "qwen3", "hiden_size": 3}, tokenizer, 0)
    with pytest.raises(UserError, match="qwen9"):
        build_model({"model_type": "qwen9"}, tokenizer, 0)
    with pytest.raises(UserError, match="model_type is missing"):
        build_model({}, tokenizer, 0)
