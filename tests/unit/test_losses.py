"""Losses and advantages against numbers worked out by hand."""

import math

import pytest
import torch

from r1pipe.grpo.advantage import EPSILON, compute_advantages, share_of_silent_groups
from r1pipe.grpo.losses import NORMALIZERS, LossInputs, Totals, compute_loss, estimate_kl

NAN = float("nan")


def make_inputs(ratio: list[list[float]], advantages: list[float], mask: list) -> LossInputs:
    old_BT = torch.full((len(ratio), len(ratio[0])), -1.0)
    return LossInputs(
        logprobs_BT=(old_BT + torch.tensor(ratio).log()).requires_grad_(),
        old_logprobs_BT=old_BT,
        advantages_B=torch.tensor(advantages),
        mask_BT=torch.tensor(mask, dtype=torch.float32),
    )


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
    inputs = make_inputs([[ratio]], [advantage], [[1]])
    loss = compute_loss(inputs, Totals(1, 1, 1), loss_type="dapo", epsilon=0.2)
    assert loss.loss.item() == pytest.approx(expected)
    loss.loss.backward()
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (inputs.logprobs_BT.grad.item() == 0) == clipped
    assert loss.sums["clip_ratio/high"] + loss.sums["clip_ratio/low"] == float(clipped)


def test_clip_higher() -> None:
    inputs = make_inputs([[1.25]], [1.0], [[1]])
    arguments = {"loss_type": "dapo", "epsilon": 0.2}
    assert compute_loss(inputs, Totals(1, 1, 1), **arguments).loss.item() == pytest.approx(-1.2)
    higher = compute_loss(inputs, Totals(1, 1, 1), **arguments, epsilon_high=0.28)
    assert higher.loss.item() == pytest.approx(-1.25)


# Two completions of 2 and 1 tokens with advantages 1 and -2, ratios 1: per-token losses -1 and 2.
# (loss_type, loss)
NORMALIZED = [
    ("grpo", (-1 + 2) / 2),
    ("dr_grpo", (-2 + 2) / (2 * 4)),
    ("dapo", (-2 + 2) / 3),
]


@pytest.mark.parametrize(("loss_type", "expected"), NORMALIZED)
def test_normalizers(loss_type: str, expected: float) -> None:
    inputs = make_inputs([[1.0, 1.0], [1.0, 1.0]], [1.0, -2.0], [[1, 1], [1, 0]])
    totals = Totals(num_completions=2, num_tokens=3, max_completion_length=4)
    loss = compute_loss(inputs, totals, loss_type=loss_type, epsilon=0.2)
    assert loss.loss.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("loss_type", NORMALIZERS)
def test_micro_batches_add_up(loss_type: str) -> None:
    torch.manual_seed(0)
    ratio, mask = (torch.rand(4, 5) + 0.5).tolist(), (torch.rand(4, 5) > 0.3).long().tolist()
    advantages = [1.0, -0.5, 0.3, -2.0]
    totals = Totals(4, sum(map(sum, mask)), 5)

    def part(rows: slice) -> float:
        inputs = make_inputs(ratio[rows], advantages[rows], mask[rows])
        return compute_loss(inputs, totals, loss_type=loss_type, epsilon=0.2).loss.item()

    whole = part(slice(0, 4))
    assert part(slice(0, 1)) + part(slice(1, 4)) == pytest.approx(whole, abs=1e-6)


def test_kl() -> None:
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.5])
    assert estimate_kl(policy, reference).tolist() == pytest.approx([0, math.exp(0.5) - 1.5])
    inputs = make_inputs([[1.0]], [0.0], [[1]])
    inputs = LossInputs(**{**vars(inputs), "ref_logprobs_BT": torch.tensor([[-0.5]])})
    loss = compute_loss(inputs, Totals(1, 1, 1), loss_type="dapo", epsilon=0.2, beta=0.1)
    assert loss.loss.item() == pytest.approx(0.1 * (math.exp(0.5) - 1.5))


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
    assert share_of_silent_groups(rewards) == 0.5


def test_unjudged_samples_teach_nothing() -> None:
    rewards = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN]])
    advantages = compute_advantages(rewards, "group")
    assert advantages[0, 1].item() == 0.0
    assert advantages[0, 0].item() == -advantages[0, 2].item() > 0.7
    assert advantages[1].tolist() == [0.0] * 3
