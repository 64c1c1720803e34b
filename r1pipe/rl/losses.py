"""Policy losses: pure functions of log-probabilities and advantages.

Completions lie one after another without padding. Shapes: B completions, C tokens of all of them
together, `sequence_C` says which completion a token belongs to. A loss gives a value per token and
a weight per token. Weights divide by the size of the whole optimizer minibatch (`Totals`), so
cutting it into micro-batches or spreading it over ranks changes nothing.

A new loss is one function from `LossInputs` to per-token losses and one line in `config.rl.LOSSES`,
or a function of your own named by its dotted path: `loss_type: my_package.my_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from r1pipe.config.rl import LOSSES, Grpo
from r1pipe.utils.imports import import_named


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch: log-probabilities of the completions' tokens under each policy."""

    logprobs_C: Tensor
    """The trained policy's; the only ones with a gradient."""
    old_logprobs_C: Tensor
    """The policy's before the first optimizer step on these rollouts, by the trainer."""
    sampler_logprobs_C: Tensor
    """The sampler's, of the policy that made the rollouts."""
    advantages_B: Tensor
    sequence_C: Tensor
    ref_logprobs_C: Tensor | None = None

    @property
    def advantages_C(self) -> Tensor:
        return self.advantages_B[self.sequence_C]

    @property
    def lengths_B(self) -> Tensor:
        return self.sum_sequences(torch.ones_like(self.old_logprobs_C))

    def sum_sequences(self, values_C: Tensor) -> Tensor:
        """Sum over each completion's tokens: `[C] -> [B]`."""
        zeros_B = torch.zeros(len(self.advantages_B), dtype=values_C.dtype, device=values_C.device)
        return zeros_B.index_add(0, self.sequence_C, values_C)

    def mean_sequences(self, values_C: Tensor) -> Tensor:
        return self.sum_sequences(values_C) / self.lengths_B.clamp(min=1)


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole optimizer minibatch."""

    num_completions: int
    num_tokens: int
    max_completion_length: int


class TokenLosses(NamedTuple):
    """Per-token losses `[C]`, and per-token figures for the log, masks or values `[C]`."""

    loss_C: Tensor
    figures: dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """`loss` is ready for backward. `sums` are sums over tokens, to be divided by the number of
    tokens that count."""

    loss: Tensor
    sums: dict[str, float]


# --- A token's loss -----------------------------------------------------------------------------


def clip_tokens(inputs: LossInputs, settings: Grpo) -> TokenLosses:
    """PPO's pessimistic bound, token by token: -min(r A, clip(r) A) with r = pi / pi_old
    (arXiv:1707.06347, eq. 7; GRPO, arXiv:2402.03300, eq. 3). An `epsilon_high` above `epsilon` is
    DAPO's clip-higher (arXiv:2503.14476, eq. 10); `delta` caps the ratio where A < 0 (two-sided
    clipping, arXiv:2505.07291, eq. 2)."""
    ratio_C = (inputs.logprobs_C - inputs.old_logprobs_C).exp()
    return clip_ratio(ratio_C, inputs.advantages_C, settings)


def clip_sequences(inputs: LossInputs, settings: Grpo) -> TokenLosses:
    """GSPO: the same bound with one ratio per completion, the geometric mean of its tokens'
    (arXiv:2507.18071, eq. 7). Its clip ranges are of another size: the paper's are 3e-4, 4e-4."""
    log_ratio_B = inputs.mean_sequences(inputs.logprobs_C - inputs.old_logprobs_C)
    return clip_ratio(log_ratio_B.exp()[inputs.sequence_C], inputs.advantages_C, settings)


def clip_ratio(ratio_C: Tensor, advantages_C: Tensor, settings: Grpo) -> TokenLosses:
    low, high = clip_range(settings)
    capped_C = ratio_C if settings.delta is None else ratio_C.clamp(max=settings.delta)
    loss_C = -torch.minimum(capped_C * advantages_C, ratio_C.clamp(low, high) * advantages_C)
    figures = {
        "clip_ratio/low": (ratio_C < low) & (advantages_C < 0),
        "clip_ratio/high": (ratio_C > high) & (advantages_C > 0),
    }
    return TokenLosses(loss_C, figures)


def clip_weights(inputs: LossInputs, settings: Grpo) -> TokenLosses:
    """CISPO: the ratio is a clipped constant weight of log pi, so no token loses its gradient
    (MiniMax-M1, arXiv:2506.13585, eq. 4). As there, only the upper side is clipped, at
    `epsilon_high` itself (not 1 + epsilon_high), as in TRL."""
    ratio_C = (inputs.logprobs_C - inputs.old_logprobs_C).exp().detach()
    high = cast("float", settings.epsilon_high)  # a recipe for cispo has it
    loss_C = -ratio_C.clamp(max=high) * inputs.advantages_C * inputs.logprobs_C
    return TokenLosses(loss_C, {"clip_ratio/high": (ratio_C > high) & (inputs.advantages_C > 0)})


def clip_range(settings: Grpo) -> tuple[float, float]:
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    return 1 - settings.epsilon, 1 + high


# --- A token's weight ---------------------------------------------------------------------------


def weigh_by_completion(inputs: LossInputs, totals: Totals) -> Tensor:
    """Mean over a completion's tokens, then over completions: GRPO, arXiv:2402.03300, eq. 3."""
    return (1 / inputs.lengths_B.clamp(min=1) / totals.num_completions)[inputs.sequence_C]


def weigh_by_constant(inputs: LossInputs, totals: Totals) -> Tensor:
    """Sum divided by a constant, so that length is not rewarded: Dr. GRPO, arXiv:2503.20783,
    section 3.2."""
    size = totals.num_completions * totals.max_completion_length
    return torch.full_like(inputs.old_logprobs_C, 1 / size)


def weigh_by_token(inputs: LossInputs, totals: Totals) -> Tensor:
    """Mean over all tokens of the minibatch: DAPO, arXiv:2503.14476, eq. 12."""
    return torch.full_like(inputs.old_logprobs_C, 1 / max(1, totals.num_tokens))


@dataclass(frozen=True)
class LossType:
    token_losses: Callable[[LossInputs, Grpo], TokenLosses]
    weigh: Callable[[LossInputs, Totals], Tensor] = weigh_by_token


def find_loss(loss_type: str) -> LossType:
    """The loss type of a name in `LOSSES`, or behind a dotted path: a `LossType`, or a function
    such as `clip_tokens`, which is then averaged over tokens.

    Raises UserError for a name that is neither.
    """
    if loss_type in LOSSES:
        token_losses, weigh = LOSSES[loss_type]
        return LossType(globals()[token_losses], globals()[weigh])
    found = import_named("loss_type", loss_type, lambda x: isinstance(x, LossType) or callable(x))
    return found if isinstance(found, LossType) else LossType(found)


# --- KL to the reference ------------------------------------------------------------------------


def estimate_kl(logprobs_C: Tensor, ref_logprobs_C: Tensor, estimator: str = "k3") -> Tensor:
    """KL(policy || reference) per token from samples of the policy.

    k1: log(pi / ref). k3: ref / pi - log(ref / pi) - 1, of lower variance and never negative
    (Schulman 2020, "Approximating KL divergence"; GRPO, arXiv:2402.03300, eq. 4).
    """
    log_ratio_C = ref_logprobs_C - logprobs_C
    if estimator == "k1":
        return -log_ratio_C
    return log_ratio_C.exp() - log_ratio_C - 1


def kl_term(inputs: LossInputs, settings: Grpo) -> Tensor:
    """The estimate, with `use_bias_correction_kl` times pi / pi_old: its gradient is then that of
    the KL itself (DeepSeek-V3.2, arXiv:2512.02556, section 3.1), which k3 alone is not, and which
    k1 alone is not at all (its gradient is zero in expectation)."""
    ref_C = cast("Tensor", inputs.ref_logprobs_C)  # with beta there is a reference
    kl_C = estimate_kl(inputs.logprobs_C, ref_C, settings.kl_estimator)
    if settings.use_bias_correction_kl:
        kl_C = kl_C * (inputs.logprobs_C - inputs.old_logprobs_C).exp()
    return kl_C


# --- Sampler-trainer correction -----------------------------------------------------------------


def correct_for_sampler(inputs: LossInputs, settings: Grpo) -> TokenLosses:
    """Weights `[C]` for rollouts whose sampler differs from the trainer: pi_old (by the trainer)
    over pi_sampler, truncated or masked, per token or per completion.

    Truncated importance sampling: Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"; masked: IcePop (Ling team 2025). Names and meaning are TRL's. A
    completion's ratio is a product over tokens: long completions exceed any bounds.
    """
    log_ratio_C = inputs.old_logprobs_C - inputs.sampler_logprobs_C
    level, action = settings.vllm_importance_sampling_mode.split("_")
    if level == "sequence":
        log_ratio_C = inputs.sum_sequences(log_ratio_C)[inputs.sequence_C]
    ratio_C = log_ratio_C.exp()
    low = settings.vllm_importance_sampling_clip_min
    high = settings.vllm_importance_sampling_clip_max
    outside_C = (ratio_C < low) | (ratio_C > high)
    corrections = {"truncate": ratio_C.clamp(low, high), "mask": ratio_C.where(~outside_C, 0.0)}
    figures = {"sampler/ratio": ratio_C, "sampler/ratio_outside": outside_C}
    return TokenLosses(corrections[action], figures)


def keep_on_policy(inputs: LossInputs, threshold: float) -> Tensor:
    """DeepSeek-V3.2's off-policy sequence mask `[C]` (arXiv:2512.02556, section 3.1): a completion
    of negative advantage is dropped when its mean log(pi_sampler / pi) is above the threshold."""
    divergence_B = inputs.mean_sequences(inputs.sampler_logprobs_C - inputs.logprobs_C.detach())
    keep_B = (inputs.advantages_B >= 0) | (divergence_B <= threshold)
    return keep_B[inputs.sequence_C]


# --- The loss -----------------------------------------------------------------------------------


def compute_loss(inputs: LossInputs, totals: Totals, settings: Grpo) -> Loss:
    """The policy loss with the corrections of the settings, plus `beta` times the KL term. The
    figure `update_kl` is KL(old || policy): how far the optimizer steps on these rollouts went."""
    loss_type = find_loss(settings.loss_type)
    loss_C, figures = loss_type.token_losses(inputs, settings)
    with torch.no_grad():
        figures["update_kl"] = estimate_kl(inputs.old_logprobs_C, inputs.logprobs_C)
        if settings.off_policy_mask_threshold is not None:
            keep_C = keep_on_policy(inputs, settings.off_policy_mask_threshold)
            figures["off_policy_masked"] = ~keep_C
        if settings.vllm_importance_sampling_correction:
            weight_C, more = correct_for_sampler(inputs, settings)
            figures |= more
    if settings.off_policy_mask_threshold is not None:
        loss_C = loss_C * keep_C
    if settings.vllm_importance_sampling_correction:
        loss_C = loss_C * weight_C
    if settings.beta:
        kl_C = kl_term(inputs, settings)
        loss_C = loss_C + settings.beta * kl_C
        figures["kl"] = kl_C.detach()
    loss = (loss_C * loss_type.weigh(inputs, totals)).sum()
    return Loss(loss, {name: float(values.sum()) for name, values in figures.items()})
