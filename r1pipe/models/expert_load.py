"""Expert load: counted in training, balanced by router biases or an auxiliary loss.

- Without an auxiliary loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3,
  arXiv:2412.19437, section 2.1.2): after each optimizer step, a router's bias rises for experts
  with less than their share of the tokens and falls for the others.
- DeepSeek-V3's sequence-wise auxiliary loss (eq. 17-20), on top.

Shape suffixes as in routing.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from r1pipe.models.model import is_moe
from r1pipe.models.routing import ROUTINGS, Router, find_routers

DEAD = 0.01
"""Share of the mean load below which an expert counts as dead."""


def number_packed(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Sequence number of each token, from 0, `[N]`, for an input without padding."""
    lengths_S = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths_S)


class ExpertLoad:
    """Counts the tokens that each expert gets in training, and balances them.

    Wrap each training forward and backward in `counting`, call `balance` after each optimizer step
    and `metrics` for a line of the log. No-op for a dense model; routers without a bias are counted
    but not moved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        bias_update_rate: float = 0.0,
        seq_aux_loss_coef: float = 0.0,
    ):
        self.bias_update_rate, self.seq_aux_loss_coef = bias_update_rate, seq_aux_loss_coef
        known = is_moe(model) and model.config.model_type in ROUTINGS
        biased = any("e_score_correction_bias" in name for name, _ in model.named_buffers())
        # A mixture of experts with unknown routing is trained, but not balanced.
        asked = seq_aux_loss_coef or (bias_update_rate and biased)
        self.routers = find_routers(model) if known or asked else []
        self._sequences_N: Tensor | None = None
        self._loss_scale = 0.0
        # Overwritten by layer, not summed: checkpointing runs a forward twice.
        self._experts: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        for index, router in enumerate(self.routers):
            router.module.register_forward_hook(self._observe(index, router))
        self._reset()

    def _reset(self) -> None:
        shape = (len(self.routers), self.routers[0].module.num_experts if self.routers else 0)
        device = self.routers[0].module.weight.device if self.routers else None
        self._counts_LE = torch.zeros(shape, dtype=torch.long, device=device)
        self._total_LE = torch.zeros_like(self._counts_LE)
        # The auxiliary loss: its sum, and the number of sequences and layers.
        self._loss_and_count = torch.zeros(2, device=device)
        self._total_loss_and_count = torch.zeros_like(self._loss_and_count)

    @contextlib.contextmanager
    def counting(self, sequences_N: Tensor, num_sequences: int) -> Iterator[None]:
        """Counts one forward and backward. `sequences_N`: sequence number of each input token (-1:
        padding, not counted). `num_sequences`: of the whole optimizer step, the auxiliary loss's
        denominator.
        """
        self.start(sequences_N, num_sequences)
        try:
            yield
        finally:
            self.finish()

    def start(self, sequences_N: Tensor, num_sequences: int) -> None:
        self._sequences_N = sequences_N.flatten()
        self._loss_scale = self.seq_aux_loss_coef / num_sequences

    def finish(self) -> None:
        """Add the tokens seen since `start` to the counts."""
        if self._experts and self._sequences_N is not None:
            valid_N = self._sequences_N >= 0
            for index, experts_NK in self._experts.items():
                self._counts_LE[index] += torch.bincount(
                    experts_NK[valid_N].flatten(), minlength=self._counts_LE.shape[1]
                )
            if self._losses:
                self._loss_and_count[0] += sum(self._losses.values())
                self._loss_and_count[1] += (self._sequences_N.max() + 1) * len(self._losses)
        self._experts, self._losses, self._sequences_N = {}, {}, None

    def _observe(self, index: int, router: Router) -> Callable:
        def hook(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
            if self._sequences_N is None:
                return None
            logits_NE, weights_NK, experts_NK = output
            self._experts[index] = experts_NK.detach()
            if not self.seq_aux_loss_coef:
                return None
            loss = sequence_balance_loss(
                logits_NE, router.score(logits_NE), self._sequences_N, module.top_k
            )
            self._losses[index] = loss.detach()
            return logits_NE, AddLoss.apply(weights_NK, loss * self._loss_scale), experts_NK

        return hook

    def balance(self, move_bias: bool = True) -> None:
        """After an optimizer step: sum the counts over all ranks and, unless the step was skipped,
        move the routers' biases."""
        if self.routers and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._counts_LE)
            dist.all_reduce(self._loss_and_count)
        if self.bias_update_rate and move_bias:
            for router, counts_E in zip(self.routers, self._counts_LE):
                update_bias(router, counts_E, self.bias_update_rate)
        self._total_LE += self._counts_LE
        self._total_loss_and_count += self._loss_and_count
        self._counts_LE.zero_()
        self._loss_and_count.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The sums for the next `metrics`. The biases are in the model."""
        return {"total": self._total_LE, "loss_and_count": self._total_loss_and_count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._reset()
        self._total_LE += state["total"].to(self._total_LE.device)
        self._total_loss_and_count += state["loss_and_count"].to(self._total_LE.device)

    def metrics(self) -> dict[str, float]:
        """Load since the last call: means over layers, then each layer's own."""
        metrics = describe_load(self._total_LE, [router.layer for router in self.routers])
        loss, count = self._total_loss_and_count.tolist()
        if count:
            metrics["experts/seq_aux_loss"] = loss / count
        self._reset()
        return metrics


@torch.no_grad()
def update_bias(router: Router, counts_E: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load): DeepSeek-V3 section 2.1.2, arXiv:2408.15664 alg. 1."""
    if router.bias is not None:
        counts_E = counts_E.to(router.bias)
        router.bias.add_((counts_E.mean() - counts_E).sign(), alpha=rate)


def describe_load(counts_LE: Tensor, layers: list[int]) -> dict[str, float | list[float]]:
    """Per layer, and as a mean over layers, from the tokens of each expert:

    - load: of each expert, over the mean load;
    - max_violation: (largest load - mean load) / mean load, 0 if even (arXiv:2408.15664, eq. 4);
    - entropy: of the loads as shares, over that of even loads: 1 if even;
    - dead: the share of experts, over all layers, that get less than DEAD of the mean load.

    Empty if nothing was counted.
    """
    # A prediction layer that is not trained counts nothing.
    layers = [layer for layer, counts_E in zip(layers, counts_LE) if counts_E.any()]
    if not layers:
        return {}
    counts_LE = counts_LE[counts_LE.any(-1)]
    load_LE = counts_LE.double().cpu()
    shares_LE = load_LE / load_LE.sum(-1, keepdim=True)
    violations = (load_LE.amax(-1) / load_LE.mean(-1) - 1).tolist()
    entropies = (torch.special.entr(shares_LE).sum(-1) / math.log(load_LE.shape[1])).tolist()
    metrics = {
        "experts/max_violation": sum(violations) / len(layers),
        "experts/entropy": sum(entropies) / len(layers),
        "experts/dead": float((load_LE < DEAD * load_LE.mean(-1, keepdim=True)).double().mean()),
    }
    for layer, violation, entropy in zip(layers, violations, entropies, strict=True):
        metrics[f"experts/layer_{layer}/max_violation"] = violation
        metrics[f"experts/layer_{layer}/entropy"] = entropy
    for layer, load_E in zip(layers, load_LE / load_LE.mean(-1, keepdim=True)):
        metrics[f"experts/layer_{layer}/load"] = [round(load, 3) for load in load_E.tolist()]
    return metrics


def sequence_balance_loss(
    logits_NE: Tensor, scores_NE: Tensor, sequences_N: Tensor, top_k: int
) -> Tensor:
    """DeepSeek-V3's auxiliary loss of one layer without the factor alpha (eq. 17-20), summed over
    sequences; 1 per sequence if choices and scores are even.

    As in eq. 18, an expert counts as chosen if its score, without bias, is among the top K.
    """
    num_sequences, num_experts = int(sequences_N.max()) + 1, scores_NE.shape[1]
    valid_N = sequences_N >= 0
    scores_NE, sequences_N = scores_NE[valid_N], sequences_N[valid_N]
    chosen_NE = torch.zeros_like(scores_NE).scatter(
        1, logits_NE[valid_N].topk(top_k, -1).indices, 1.0
    )
    shares_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
    zeros_SE = scores_NE.new_zeros(num_sequences, num_experts)
    lengths_S1 = sequences_N.bincount(minlength=num_sequences).clamp(min=1).unsqueeze(1)
    frequency_SE = zeros_SE.index_add(0, sequences_N, chosen_NE) / (top_k * lengths_S1)
    mean_share_SE = zeros_SE.index_add(0, sequences_N, shares_NE) / lengths_S1
    return num_experts * (frequency_SE * mean_share_SE).sum()


class AddLoss(torch.autograd.Function):
    """Adds a scalar to the final loss without passing it through the model's outputs: the tensor
    is unchanged, the scalar gets a gradient of 1.

    Works under any trainer, and with activation checkpointing, which keeps only what a layer
    returns.
    """

    @staticmethod
    def forward(ctx: object, tensor: Tensor, loss: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())
