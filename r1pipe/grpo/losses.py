"""Policy losses: pure functions of log-probabilities, advantages and masks.

Shapes: B completions, T tokens. A loss is the mean over optimizer minibatches of B completions
that may be computed in several parts, so each part is divided by the whole minibatch's size
(`Totals`): how it is cut into micro-batches changes nothing.

A new loss is one function from `LossInputs` to per-token losses and one line in `NORMALIZERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. `mask_BT` is 1 on the completion's tokens that count."""

    logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    advantages_B: Tensor
    mask_BT: Tensor
    ref_logprobs_BT: Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole optimizer minibatch."""

    num_completions: int
    num_tokens: int
    max_completion_length: int


@dataclass(frozen=True)
class Loss:
    """`loss` is ready for backward. `sums` are sums over tokens, to be divided by the number of
    tokens that count."""

    loss: Tensor
    sums: dict[str, float]


def normalize_grpo(loss_BT: Tensor, mask_BT: Tensor, totals: Totals) -> Tensor:
    """Mean over a completion's tokens, then over completions: GRPO, arXiv:2402.03300, eq. 3."""
    lengths_B = mask_BT.sum(1).clamp(min=1)
    return ((loss_BT * mask_BT).sum(1) / lengths_B).sum() / totals.num_completions


def normalize_dr_grpo(loss_BT: Tensor, mask_BT: Tensor, totals: Totals) -> Tensor:
    """Sum divided by a constant, so that length is not rewarded: Dr. GRPO, arXiv:2503.20783,
    section 3.2."""
    return (loss_BT * mask_BT).sum() / (totals.num_completions * totals.max_completion_length)


def normalize_dapo(loss_BT: Tensor, mask_BT: Tensor, totals: Totals) -> Tensor:
    """Mean over all tokens of the batch: DAPO, arXiv:2503.14476, eq. 12."""
    return (loss_BT * mask_BT).sum() / max(1, totals.num_tokens)


NORMALIZERS: dict[str, Callable[[Tensor, Tensor, Totals], Tensor]] = {
    "grpo": normalize_grpo,
    "dr_grpo": normalize_dr_grpo,
    "dapo": normalize_dapo,
}


def compute_loss(
    inputs: LossInputs,
    totals: Totals,
    *,
    loss_type: str,
    epsilon: float,
    epsilon_high: float | None = None,
    beta: float = 0.0,
) -> Loss:
    """The clipped surrogate plus `beta` times the KL term, normalised as `loss_type` says.

    `epsilon_high` above `epsilon` is DAPO's clip-higher (arXiv:2503.14476, eq. 10).
    """
    ratio_BT = (inputs.logprobs_BT - inputs.old_logprobs_BT).exp()
    advantages_B1 = inputs.advantages_B.unsqueeze(1)
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    # PPO's pessimistic bound (arXiv:1707.06347, eq. 7), token by token.
    loss_BT = -torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(low, high) * advantages_B1)
    mask_BT = inputs.mask_BT
    with torch.no_grad():
        clipped_low = (ratio_BT < low) & (advantages_B1 < 0)
        clipped_high = (ratio_BT > high) & (advantages_B1 > 0)
        sums = {
            "clip_ratio/low": float((clipped_low * mask_BT).sum()),
            "clip_ratio/high": float((clipped_high * mask_BT).sum()),
        }
    if beta:
        kl_BT = estimate_kl(inputs.logprobs_BT, inputs.ref_logprobs_BT)
        loss_BT = loss_BT + beta * kl_BT
        sums["kl"] = float((kl_BT.detach() * mask_BT).sum())
    return Loss(NORMALIZERS[loss_type](loss_BT, mask_BT, totals), sums)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) per token, the k3 estimator: GRPO, arXiv:2402.03300, eq. 4."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1
