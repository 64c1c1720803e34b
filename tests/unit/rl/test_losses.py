"""Losses and advantages against numbers worked out by hand, and against TRL's trainer."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from datasets import Dataset
from grpo_settings import make_grpo
from tiny_models import TINY
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from r1pipe.config.rl import Grpo
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.rl.advantages import EPSILON, compute_advantages, find_silent_groups
from r1pipe.rl.losses import (
    Loss,
    LossInputs,
    LossType,
    TokenLosses,
    Totals,
    compute_loss,
    correct_for_sampler,
    estimate_kl,
    find_loss,
    keep_on_policy,
    weigh_by_completion,
)
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError

NAN = float("nan")
ONE = Totals(num_completions=1, num_tokens=1, max_completion_length=1)


make_settings = partial(make_grpo, max_completion_length=4, loss_type="dapo")


def make_inputs(
    ratios: list[list[float]],
    advantages: list[float],
    sampler_ratios: list[list[float]] | None = None,
    ref: float | None = None,
) -> LossInputs:
    """`ratios`: pi / pi_old of each completion's tokens; `sampler_ratios`: pi_old / pi_sampler."""
    ratio_C = torch.tensor([r for row in ratios for r in row])
    sampler_C = torch.tensor([r for row in sampler_ratios or ratios for r in row])
    old_C = torch.full_like(ratio_C, -1.0)
    return LossInputs(
        logprobs_C=(old_C + ratio_C.log()).requires_grad_(),
        old_logprobs_C=old_C,
        sampler_logprobs_C=old_C - sampler_C.log() if sampler_ratios else old_C,
        advantages_B=torch.tensor(advantages),
        sequence_C=torch.tensor([i for i, row in enumerate(ratios) for _ in row]),
        ref_logprobs_C=None if ref is None else torch.full_like(old_C, ref),
    )


def loss_of(inputs: LossInputs, totals: Totals = ONE, **changes: object) -> Loss:
    return compute_loss(inputs, totals, make_settings(**changes))


# ratio 1.5 is clipped at 1.2 for A > 0 and counts in full for A < 0; ratio 0.5 the other way round.
# (ratio, advantage, per-token loss)
CLIPPING = [
    (1.0, 2.0, -2.0),
    (1.5, 2.0, -2.4),
    (1.5, -2.0, 3.0),
    (0.5, 2.0, -1.0),
    (0.5, -2.0, 1.6),
    (1.1, 1.0, -1.1),
]


@pytest.mark.parametrize(("ratio", "advantage", "expected"), CLIPPING)
def test_clipping(ratio: float, advantage: float, expected: float) -> None:
    inputs = make_inputs([[ratio]], [advantage])
    loss = loss_of(inputs)
    assert loss.loss.item() == pytest.approx(expected)
    loss.loss.backward()
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (inputs.logprobs_C.grad.item() == 0) == clipped
    assert loss.sums["clip_ratio/high"] + loss.sums["clip_ratio/low"] == float(clipped)


def test_clip_higher_and_two_sided() -> None:
    assert loss_of(make_inputs([[1.25]], [1.0])).loss.item() == pytest.approx(-1.2)
    higher = loss_of(make_inputs([[1.25]], [1.0]), epsilon_high=0.28)
    assert higher.loss.item() == pytest.approx(-1.25)
    assert loss_of(make_inputs([[9.0]], [-1.0])).loss.item() == pytest.approx(9.0)
    assert loss_of(make_inputs([[9.0]], [-1.0]), delta=4.0).loss.item() == pytest.approx(4.0)


def test_gspo_has_one_ratio_per_completion() -> None:
    """Geometric means: of (4, 1/4) 1, within the range; of (1.44, 1) 1.2, clipped to 1.1."""
    inputs = make_inputs([[4.0, 0.25], [1.44, 1.0]], [1.0, 2.0])
    loss = loss_of(inputs, Totals(2, 4, 4), loss_type="gspo", epsilon=0.1)
    assert loss.loss.item() == pytest.approx((-1.0 - 2.2) / 2)
    assert loss.sums["clip_ratio/high"] == 2.0
    loss.loss.backward()
    # d loss / d logprob = -A r / (2 tokens x 2 completions), the same for both of a completion.
    assert inputs.logprobs_C.grad.tolist() == pytest.approx([-0.25, -0.25, 0.0, 0.0])


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """The weight is min(r, 5), a constant: d loss / d logprob = -weight x A."""
    inputs = make_inputs([[9.0, 2.0]], [1.0])
    loss = loss_of(inputs, Totals(1, 1, 4), loss_type="cispo", epsilon_high=5.0)
    loss.loss.backward()
    assert inputs.logprobs_C.grad.tolist() == pytest.approx([-5.0, -2.0])
    assert loss.sums["clip_ratio/high"] == 1.0


# Two completions of 2 and 1 tokens with advantages 1 and -2, ratios 1: per-token losses -1 and 2.
# (loss_type, loss)
WEIGHED = [
    ("grpo", (-1 + 2) / 2),
    ("dr_grpo", (-2 + 2) / (2 * 4)),
    ("dapo", (-2 + 2) / 3),
    ("gspo", (-1 + 2) / 2),
]


@pytest.mark.parametrize(("loss_type", "expected"), WEIGHED)
def test_weights(loss_type: str, expected: float) -> None:
    inputs = make_inputs([[1.0, 1.0], [1.0]], [1.0, -2.0])
    loss = loss_of(inputs, Totals(2, 3, 4), loss_type=loss_type)
    assert loss.loss.item() == pytest.approx(expected, abs=1e-7)


def test_kl_estimators() -> None:
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.5])
    # exp's float32 is 1.65 give or take 1.2e-7 (a unit in the last place, or two by machine), of
    # which 1.5 is taken away.
    k3 = pytest.approx(math.exp(0.5) - 1.5, abs=1e-6)
    assert estimate_kl(policy, reference).tolist() == [0, k3]
    assert estimate_kl(policy, reference, "k1").tolist() == pytest.approx([0, -0.5])
    loss = loss_of(make_inputs([[1.0]], [0.0], ref=-0.5), beta=0.1)
    assert loss.loss.item() == pytest.approx(0.1 * (math.exp(0.5) - 1.5), abs=1e-7)
    assert loss.sums["kl"] == k3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_corrected_kl_has_the_gradient_of_the_kl(estimator: str) -> None:
    """Over all tokens of a distribution, weighted by their probability, so without noise: the
    expected gradient of the term is that of KL(pi || ref), for either estimator."""
    logits = torch.tensor([0.5, -0.2, 1.0, 0.1], requires_grad=True)
    ref = torch.tensor([0.1, 0.4, 0.2, -0.3]).log_softmax(0)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - ref)).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    logprobs = logits.log_softmax(0)
    inputs = LossInputs(
        logprobs_C=logprobs,
        old_logprobs_C=logprobs.detach(),
        sampler_logprobs_C=logprobs.detach(),
        advantages_B=torch.zeros(4),
        sequence_C=torch.arange(4),
        ref_logprobs_C=ref,
    )
    settings = make_settings(beta=1.0, kl_estimator=estimator, use_bias_correction_kl=True)

    def expected_gradient(settings: Grpo) -> torch.Tensor:
        weights = logprobs.detach().exp()
        exact_loss = LossType(lambda i, s: TokenLosses(i.logprobs_C * 0, {}), lambda i, t: weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("r1pipe.rl.losses.find_loss", lambda name: exact_loss)
            loss = compute_loss(inputs, ONE, settings)
        return torch.autograd.grad(loss.loss, logits, retain_graph=True)[0]

    assert expected_gradient(settings).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    plain = settings.model_copy(update={"use_bias_correction_kl": False})
    assert (expected_gradient(plain) - expected).abs().max() > 1e-3


# pi_old / pi_sampler of two completions is (3, 0.5), product 1.5, and (0.4, 0.5), product 0.2; the
# bounds are 0.5 and 2.
# (mode, weights, tokens outside)
CORRECTIONS = [
    ("token_truncate", [2.0, 0.5, 0.5, 0.5], 2),
    ("token_mask", [0.0, 0.5, 0.0, 0.5], 2),
    ("sequence_truncate", [1.5, 1.5, 0.5, 0.5], 2),
    ("sequence_mask", [1.5, 1.5, 0.0, 0.0], 2),
]


@pytest.mark.parametrize(("mode", "expected", "outside"), CORRECTIONS)
def test_correction_for_the_sampler(mode: str, expected: list[float], outside: int) -> None:
    settings = make_settings(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.5
    )
    inputs = make_inputs([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], [[3.0, 0.5], [0.4, 0.5]])
    weights, figures = correct_for_sampler(inputs, settings)
    assert weights.tolist() == pytest.approx(expected)
    assert figures["sampler/ratio_outside"].sum() == outside
    loss = compute_loss(inputs, Totals(2, 4, 4), settings)
    assert loss.loss.item() == pytest.approx(-sum(expected) / 4)
    off = settings.model_copy(update={"vllm_importance_sampling_correction": False})
    assert compute_loss(inputs, Totals(2, 4, 4), off).loss.item() == pytest.approx(-1.0)


def test_off_policy_completions_of_negative_advantage_are_dropped() -> None:
    """pi_sampler / pi is e^0.5 in all: dropped for A < 0 only, and only above the threshold."""
    ratio = [[math.exp(-0.5)] * 2] * 2
    inputs = make_inputs(ratio, [1.0, -1.0])
    assert keep_on_policy(inputs, 0.4).tolist() == [True, True, False, False]
    assert keep_on_policy(inputs, 0.6).all()
    loss = loss_of(inputs, Totals(2, 4, 4), off_policy_mask_threshold=0.4)
    assert loss.loss.item() == pytest.approx(-2 * math.exp(-0.5) / 4)
    assert loss.sums["off_policy_masked"] == 2.0


def my_loss(inputs: LossInputs, settings: Grpo) -> TokenLosses:
    """REINFORCE, for the test below."""
    return TokenLosses(-inputs.advantages_C * inputs.logprobs_C, {})


MY_LOSS = LossType(my_loss, weigh_by_completion)


def test_a_loss_of_one_s_own_by_dotted_path() -> None:
    loss = loss_of(make_inputs([[1.0]], [3.0]), loss_type=f"{__name__}.my_loss")
    assert loss.loss.item() == pytest.approx(3.0)
    for name in ("nothing.at_all", f"{__name__}.no_such", f"{__name__}.NAN", "gprpo"):
        with pytest.raises(UserError, match=f'loss_type "{name}"'):
            find_loss(name)
    assert find_loss(f"{__name__}.MY_LOSS") is MY_LOSS


# --- The same as TRL ----------------------------------------------------------------------------

MODEL = {**TINY, "initializer_range": 0.3}
MAX_COMPLETION_LENGTH = 12


@pytest.fixture(scope="module")
def fixed_batch() -> list[Sample]:
    """Rollouts of 2 to 12 tokens whose old, sampler's and reference's log-probs are made up, so
    that ratios, clipping and corrections all occur."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    samples = []
    for number, advantage in enumerate([1.0, -1.0, 0.5, -2.0, 1.5, -0.3]):
        sizes = torch.randint(2, MAX_COMPLETION_LENGTH + 1, (2,), generator=generator).tolist()
        prompt, completion = (torch.randint(10, 60, (n,), generator=generator) for n in sizes)
        old = -3.0 + noise(completion.float())
        rollout = Rollout(
            problem_id=str(number),
            sample=0,
            prompt_ids=prompt.tolist(),
            completion_ids=completion.tolist(),
            logprobs=(old + 0.3 * noise(old)).tolist(),
            completion="",
            finish_reason="stop",
        )
        samples.append(Sample(rollout, advantage, old, old - 6.0 + noise(old)))
    return samples


@pytest.fixture(scope="module")
def trl_loss(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[list[Sample], dict], tuple[float, dict[str, torch.Tensor], PreTrainedModel]]:
    """TRL's own `_compute_loss` on a batch: loss, gradients, and the model that it used."""
    tokenizer = build_tokenizer(["a b c 1 2 3"], 300)

    def compute(samples: list[Sample], settings: dict) -> tuple:
        model = build_model(MODEL, tokenizer, seed=0)
        config = GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=len(samples),
            num_generations=2,
            max_completion_length=MAX_COMPLETION_LENGTH,
            bf16=False,
            gradient_checkpointing=False,
            **{**settings, "beta": 0.0},  # it would load a reference, which is given here
        )
        rows = Dataset.from_list([{"prompt": "a"}] * 4)
        trainer = GRPOTrainer(
            model, always_zero, config, train_dataset=rows, processing_class=tokenizer
        )
        trainer.beta = settings["beta"]
        trainer.current_gradient_accumulation_steps = 1
        trainer.use_vllm = config.vllm_importance_sampling_correction
        trainer.model.train()  # as in training; the model has no dropout
        loss = trainer._compute_loss(trainer.model, pad_for_trl(samples, config))
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}, model

    return compute


def always_zero(completions: list, **kwargs: object) -> list[float]:
    return [0.0] * len(completions)


def pad_for_trl(samples: list[Sample], config: GRPOConfig) -> dict:
    """TRL's batch: prompts flush right, completions flush left."""

    def pad(rows: list, side: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)

    prompts = [s.rollout.prompt_ids for s in samples]
    completions = [s.rollout.completion_ids for s in samples]
    mask = pad([[1] * len(c) for c in completions], "right", torch.long)
    old = pad([s.old_logprobs for s in samples], "right")
    sampler = pad([s.rollout.logprobs for s in samples], "right")
    ratio = (old - sampler) * mask
    level, action = config.vllm_importance_sampling_mode.split("_")
    ratio = (ratio.sum(-1, keepdim=True) if level == "sequence" else ratio).exp()
    high = config.vllm_importance_sampling_clip_max
    ratio = ratio.clamp(max=high) if action == "truncate" else ratio * (ratio <= high)
    return {
        "prompt_ids": pad(prompts, "left", torch.long),
        "prompt_mask": pad([[1] * len(p) for p in prompts], "left", torch.long),
        "completion_ids": pad(completions, "right", torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor([s.advantage for s in samples]),
        "old_per_token_logps": old,
        "sampling_per_token_logps": sampler,
        "ref_per_token_logps": pad([s.ref_logprobs for s in samples], "right"),
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": mask.sum(),
    }


# Ours, and what TRL calls it where it differs.
SAME_AS_TRL = [
    ({"loss_type": "grpo"}, {}),
    ({"loss_type": "dr_grpo", "epsilon_high": 0.28}, {}),
    ({"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5}, {}),
    ({"loss_type": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, {}),
    ({"loss_type": "grpo", "beta": 0.1}, {}),
    ({"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True}, {}),
    ({"loss_type": "dapo", "vllm_importance_sampling_correction": True}, {}),
    *(
        (
            {
                "loss_type": "grpo",
                "vllm_importance_sampling_correction": True,
                "vllm_importance_sampling_mode": mode,
                "vllm_importance_sampling_clip_max": 1.2,
            },
            {},
        )
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    ({"loss_type": "grpo", "off_policy_mask_threshold": 0.5}, {}),
]


@pytest.mark.parametrize(
    ("settings", "changes"), SAME_AS_TRL, ids=lambda v: "-".join(map(str, v.values()))
)
def test_same_loss_and_gradient_as_trl(
    fixed_batch: list[Sample], trl_loss: Callable, settings: dict, changes: dict
) -> None:
    defaults = {
        "vllm_importance_sampling_correction": False,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 2.0,
        "beta": 0.0,
        "use_bias_correction_kl": False,
        "temperature": 0.9,
    }
    settings = {**defaults, **settings}
    expected, gradients, model = trl_loss(fixed_batch, {**settings, **changes})

    own = make_settings(**settings, max_completion_length=MAX_COMPLETION_LENGTH)
    batch = pack(fixed_batch, torch.device("cpu"))
    totals = Totals(len(fixed_batch), len(batch.target_C), MAX_COMPLETION_LENGTH)
    model.zero_grad(set_to_none=True)
    inputs = LossInputs(
        logprobs_C=Policy(model)(batch, own.temperature).logprobs_C,
        old_logprobs_C=batch.join("old_logprobs"),
        sampler_logprobs_C=batch.sampler_logprobs_C,
        advantages_B=batch.advantages_B,
        sequence_C=batch.sequence_C,
        ref_logprobs_C=batch.join("ref_logprobs"),
    )
    loss = compute_loss(inputs, totals, own).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3


# --- Advantages ---------------------------------------------------------------------------------


def test_advantages_by_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    std = math.sqrt(1 / 3)
    expected = 0.5 / (std + EPSILON)
    first, second = compute_advantages(rewards, "group").tolist()
    assert first == pytest.approx([expected, -expected, -expected, expected])
    assert second == [0.0] * 4
    assert compute_advantages(rewards, "none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    batch_std = math.sqrt(4 * 0.25 / 7)
    assert compute_advantages(rewards, "batch")[0, 0].item() == pytest.approx(
        0.5 / (batch_std + EPSILON)
    )
    assert find_silent_groups(rewards).tolist() == [False, True]


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("weights", [(1.0, 0.2), (0.1, 0.2, 0.3), (1 / 3, 1 / 7), (1e3, 0.1)])
def test_equal_rewards_are_silent(weights: tuple[float, ...], scale: str, size: int) -> None:
    """Exactly, whatever their size: the mean of equal numbers is not always that number. Added up
    in another order they are still equal, and what could not be judged does not count."""
    total, reverse = sum(weights), sum(weights[::-1])
    spread = [total] * (size - 1) + [total - min(weights)]
    rewards = torch.tensor([[total] * size, [NAN, total] + [reverse] * (size - 2), spread])
    assert find_silent_groups(rewards).tolist() == [True, True, False]
    advantages = compute_advantages(rewards, scale)
    assert advantages[:2].tolist() == [[0.0] * size] * 2
    assert advantages[2, -1] < 0 < advantages[2, 0]


def test_the_last_bit_of_a_reward_is_no_spread() -> None:
    reward = torch.tensor(0.3)
    rewards = torch.stack([reward, reward.nextafter(torch.tensor(1.0))] * 4).unsqueeze(0)
    assert find_silent_groups(rewards).item()
    assert not find_silent_groups(rewards * torch.tensor([[1.0, 1.00001] * 4])).item()


def test_unjudged_samples_teach_nothing() -> None:
    rewards = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN]])
    advantages = compute_advantages(rewards, "group")
    assert advantages[0, 1].item() == 0.0
    assert advantages[0, 0].item() == -advantages[0, 2].item() > 0.7
    assert advantages[1].tolist() == [0.0] * 3
