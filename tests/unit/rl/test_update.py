"""The policy's update: minibatches, micro-batches, checks, routing replay."""

import copy
import math
from functools import partial
from statistics import fmean

import pytest
import torch
from grpo_settings import make_grpo
from moe_models import make_moe_model
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from r1pipe.config.rl import LOSSES
from r1pipe.models.fp8 import list_rounded, round_matrix
from r1pipe.models.routing import (
    find_routers,
)
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.trainer.packing import Sample
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError

make_settings = partial(make_grpo, learning_rate=1e-3, max_grad_norm=1e9)


def make_updater(model: PreTrainedModel, **changes: object) -> GrpoUpdater:
    settings = make_settings(**changes)
    reference = copy.deepcopy(model) if settings.beta else None
    return GrpoUpdater(copy.deepcopy(model), reference, settings, dtype="float32", seed=0)


def accept(metrics: dict[str, float]) -> None: ...


def update(model: PreTrainedModel, samples: list[Sample], **changes: object) -> tuple[dict, dict]:
    """Metrics and weights after one step from the same start."""
    updater = make_updater(model, **changes)
    metrics = updater.step(copy.deepcopy(samples), 1, accept)
    return metrics, dict(updater.model.named_parameters())


def test_the_updater_warms_up(model: PreTrainedModel, samples: list[Sample]) -> None:
    metrics, _ = update(model, samples, warmup_steps=4, steps_per_generation=2)
    assert metrics["learning_rate"] == pytest.approx(1e-3 * 2 / 8), "after two of eight updates"


def assert_same_weights(some: dict, others: dict) -> None:
    for name, weight in some.items():
        # Adam's first step has size lr whatever the gradient: compare where it is not noise.
        close = (weight - others[name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name


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


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_distance_of_sampler_and_trainer(
    model: PreTrainedModel, samples: list[Sample], error: float
) -> None:
    """Of a sampler that gives each token e^-error, and every second one e^error, of its due."""
    updater = make_updater(model)
    samples = copy.deepcopy(samples)
    updater.evaluate(samples)
    log_ratios = []
    for sample in samples:
        signs = [1 - 2 * (n % 2) for n in range(sample.rollout.num_tokens)]
        log_ratios += [error * sign for sign in signs]
        own = zip(sample.old_logprobs.tolist(), signs, strict=True)
        sample.rollout.logprobs = [logprob - error * sign for logprob, sign in own]
    metrics = updater.evaluate(samples).metrics()
    ratios = [math.exp(x) for x in log_ratios]
    assert metrics["sampler/logprob_diff_mean"] == pytest.approx(error, abs=1e-6)
    k3 = fmean(r - 1 - x for r, x in zip(ratios, log_ratios))
    assert metrics["sampler/kl"] == pytest.approx(k3, abs=1e-6)
    share = sum(ratios) ** 2 / sum(r * r for r in ratios) / len(ratios)
    assert metrics["sampler/ess"] == pytest.approx(share, abs=1e-6)
    assert (share < 0.9) == (error > 0)


@pytest.mark.parametrize("fp8", ["rollouts", "update", "both"])
def test_updates_in_fp8(samples: list[Sample], fp8: str) -> None:
    """The reference rounds as the policy does, master weights are not rounded, and for a comparison
    with the sampler the policy rounds what that does."""
    model = make_moe_model("deepseek_v3", vocab_size=400)
    plain, weights = update(model, samples, beta=0.1)
    updater = make_updater(model, beta=0.1, fp8=fp8)
    rounds = fp8 != "update"
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(model.state_dict())
    for target in list_rounded(by_hand) if rounds else ():
        weight = getattr(by_hand.get_submodule(target.path), target.name)
        weight.data = round_matrix(weight.data, target)
    expected = make_updater(by_hand).evaluate(copy.deepcopy(samples)).metrics()
    with updater.computing_as_sampler():
        found = updater.evaluate(copy.deepcopy(samples)).metrics()
    assert found == pytest.approx(expected, rel=1e-5)
    metrics = updater.step(copy.deepcopy(samples), 1, accept)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-7)
    assert (metrics["loss"] == plain["loss"]) == (fp8 == "rollouts")
    assert metrics["loss"] == pytest.approx(plain["loss"], abs=0.05)
    moved = dict(updater.model.named_parameters())
    for name, weight in model.named_parameters():
        # Adam's first step has size lr.
        assert (moved[name] - weight).abs().max() < 2e-3, name
        assert (fp8 != "rollouts") or torch.equal(moved[name], weights[name]), name


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


@pytest.fixture(params=["deepseek_v3", "qwen3_moe", "olmoe"])
def moe_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_moe_model(request.param)


def make_moe_samples(routes_NLK: Tensor | None = None) -> list[Sample]:
    """Three rollouts of 7 tokens, prompts of 3, with advantages of both signs."""
    samples = []
    for row in range(3):
        ids = [(7 * row + 5 * column) % 59 + 1 for column in range(7)]
        routes = None if routes_NLK is None else routes_NLK[6 * row : 6 * row + 6].numpy()
        rollout = Rollout("p", row, ids[:3], ids[3:], [-1.0] * 4, "", "stop", routes)
        samples.append(Sample(rollout, row - 1.5))
    return samples


def make_moe_updater(moe_model: PreTrainedModel, **changes: object) -> GrpoUpdater:
    changes = {"learning_rate": 1e-3, "prompts_per_step": 1, "num_generations": 3, **changes}
    return GrpoUpdater(moe_model, None, make_grpo(**changes), dtype="float32", seed=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_update_replays(moe_model: PreTrainedModel, steps: int) -> None:
    """Old log-probs and update alike take the sampler's routes, and the routers learn."""
    routers = find_routers(moe_model)
    before = [router.module.weight.detach().clone() for router in routers]
    routes_NLK = torch.tensor([5, 6]).expand(18, len(routers), 2)
    updater = make_moe_updater(moe_model, routing_replay=True, steps_per_generation=steps)
    metrics = updater.step(make_moe_samples(routes_NLK), 1, lambda metrics: None)
    for router, weight in zip(routers, before):
        changed_E = (router.module.weight - weight).abs().amax(1) > 0
        assert changed_E[[5, 6]].all()
    # 18 of 21 tokens went to experts 5 and 6: each had at least 18 of the mean's 21 / 4.
    assert metrics["experts/max_violation"] >= 18 / (21 / 4) - 1


def test_the_update_replays_nothing_unasked(moe_model: PreTrainedModel) -> None:
    routes_NLK = torch.tensor([5, 6]).expand(18, len(find_routers(moe_model)), 2)
    one, other = copy.deepcopy(moe_model), copy.deepcopy(moe_model)
    with_routes = make_moe_updater(one).step(make_moe_samples(routes_NLK), 1, lambda metrics: None)
    without = make_moe_updater(other).step(make_moe_samples(), 1, lambda metrics: None)
    assert with_routes == without


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_the_update_moves_the_bias(rate: float) -> None:
    model = make_moe_model("deepseek_v3")
    routers = find_routers(model)
    before = [router.bias.clone() for router in routers]
    updater = make_moe_updater(model, bias_update_rate=rate, steps_per_generation=3)
    updater.step(make_moe_samples(), 1, lambda metrics: None)
    moved = [float((router.bias - start).abs().max()) for router, start in zip(routers, before)]
    assert all(0 < m < 3.01 * rate for m in moved) if rate else moved == [0.0, 0.0]
