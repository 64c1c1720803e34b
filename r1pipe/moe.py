"""Mixtures of experts in the trainer: routing replay, expert load, balancing.

- Routers in float32, whatever the rest computes in (Switch Transformer, arXiv:2101.03961, section
  2.4): in bf16 experts whose scores differ by less than its eight bits would be drawn by lot.
- Routing replay (R3: Ma et al. 2025, arXiv:2510.11370): the trainer's forward sends each token to
  the experts that the sampler chose for it. The gate weights are the trainer's own scores at these
  experts, so the router learns as before.
- Balancing without an auxiliary loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3,
  arXiv:2412.19437, section 2.1.2): after each optimizer step, a router's bias rises for experts
  with less than their share of the tokens and falls for the others.
- The sequence-wise auxiliary loss of DeepSeek-V3 (eq. 17-20), which adds to that.

Shape suffixes here: N tokens of the model's input, flattened; L mixture-of-experts layers, from the
first to the last; K experts per token; E experts; S sequences.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r1pipe.errors import UserError
from r1pipe.models import is_moe

DEAD = 0.01
"""Share of the mean load below which an expert counts as dead."""
OWN = -1
"""In place of an expert's number: the trainer's own choice."""


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


@dataclass(frozen=True)
class Routing:
    """How an architecture turns a router's logits into gate weights."""

    score: Callable[[Tensor], Tensor]
    """Logits to scores, over the last dimension."""
    normalise: bool | None = None
    """Whether chosen scores are divided by their sum; None: as config.norm_topk_prob says."""
    name: str = "gate"
    """The router's name, beside `experts`."""


ROUTINGS: dict[str, Routing] = {
    "deepseek_v2": Routing(softmax, normalise=False),
    "deepseek_v3": Routing(torch.sigmoid),
    "glm4_moe": Routing(torch.sigmoid),
    "gpt_oss": Routing(softmax, normalise=True, name="router"),
    "mixtral": Routing(softmax, normalise=True),
    "olmoe": Routing(softmax),
    "qwen2_moe": Routing(softmax),
    "qwen3_moe": Routing(softmax),
}
"""By model_type. Groups and bias decide which experts are chosen, never how much they weigh."""


@dataclass(frozen=True)
class Router:
    """One layer's router: a module that returns (logits `[N, E]`, weights and experts `[N, K]`)."""

    layer: int
    """Of the decoder, dense layers counted too."""
    module: nn.Module
    routing: Routing

    @property
    def bias(self) -> Tensor | None:
        """The buffer `[E]` that is added to the scores when experts are chosen, if there is one."""
        return getattr(self.module, "e_score_correction_bias", None)

    def score(self, logits_NE: Tensor) -> Tensor:
        return self.routing.score(logits_NE.float())

    def weigh(self, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """Gate weights `[N, K]` of any experts: their scores, normalised and scaled."""
        weights_NK = self.score(logits_NE).gather(-1, experts_NK)
        normalise = self.routing.normalise
        if self.module.norm_topk_prob if normalise is None else normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * getattr(self.module, "routed_scaling_factor", 1.0)


def find_routers(model: PreTrainedModel) -> list[Router]:
    """The model's routers, from the first layer to the last; none for a dense model.

    Raises UserError for a mixture of experts whose routing is not in ROUTINGS.
    """
    if not is_moe(model):
        return []
    model_type = model.config.model_type
    if model_type not in ROUTINGS:
        raise UserError(
            f'"{model_type}" is a mixture of experts whose routing r1pipe/moe.py does not know; '
            f"it knows {', '.join(ROUTINGS)}"
        )
    routing = ROUTINGS[model_type]
    routers = []
    for name, module in model.named_modules():
        if hasattr(module, "experts") and hasattr(module, routing.name):
            layer = int(re.search(r"\.layers\.(\d+)\.", name + ".").group(1))
            routers.append(Router(layer, getattr(module, routing.name), routing))
    return routers


def find_moe_layers(config: PretrainedConfig) -> list[int]:
    """Which decoder layers of a model with this config are mixtures of experts."""
    with torch.device("meta"):
        return [router.layer for router in find_routers(AutoModelForCausalLM.from_config(config))]


def route_in_float32(model: PreTrainedModel) -> None:
    """Make the model's routers compute logits, scores and gate weights in float32, from hidden
    states and weights of any dtype, under autocast too. Does nothing for a dense model, or one
    whose routing is unknown.
    """
    if is_moe(model) and model.config.model_type in ROUTINGS:
        for router in find_routers(model):
            # A bound method, so that a copy of the model has the copy's.
            router.module.forward = MethodType(run_in_float32, router.module)


def run_in_float32(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden_states.device.type, enabled=False), Float32Products():
        return type(self).forward(self, hidden_states)


class Float32Products(TorchFunctionMode):
    """Within it, `linear` computes in float32. Only DeepSeek's and GLM's routers ask for that
    themselves."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is nn.functional.linear:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        return function(*args, **(kwargs or {}))


def pack_routes(routes: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Rollouts' routes `[n - 1, L, K]` one after another, `[N, L, K]`, for an input that holds the
    rollouts' tokens so. The last token of each, which the sampler never read, gets OWN."""
    parts = []
    for rows in routes:
        parts += [rows.astype(np.int16), np.full((1, *rows.shape[1:]), OWN, np.int16)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def number_packed(lengths: Sequence[int], device: torch.device) -> Tensor:
    """To which sequence each token belongs, from 0, `[N]`, in an input without padding."""
    lengths_S = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths_S)


def number_padded(attention_mask: Tensor) -> Tensor:
    """The same for an input `[rows, columns]` with one sequence a row; -1 for padding."""
    rows = torch.arange(len(attention_mask), device=attention_mask.device).unsqueeze(1)
    return torch.where(attention_mask.bool(), rows, -1).flatten()


@contextlib.contextmanager
def replaying(model: PreTrainedModel, routes_NLK: Tensor | None) -> Iterator[None]:
    """Within it, the model's forward takes these experts; OWN leaves a token's choice to the model.

    Leave it after the backward pass: activation checkpointing runs the forward once more there.
    None, or a dense model, changes nothing. Raises ValueError for routes of another shape than the
    model's.
    """
    routers = find_routers(model) if routes_NLK is not None else []
    if routers:
        top_k = routers[0].module.top_k
        if routes_NLK.shape[1:] != (len(routers), top_k):
            raise ValueError(
                f"routes of shape {tuple(routes_NLK.shape)} for a model of {len(routers)} "
                f"mixture-of-experts layers with {top_k} experts per token"
            )
    with contextlib.ExitStack() as hooks:
        for index, router in enumerate(routers):
            # Before other hooks: whoever counts experts counts the replayed ones.
            handle = router.module.register_forward_hook(
                replace_experts(router, routes_NLK[:, index].long()), prepend=True
            )
            hooks.callback(handle.remove)
        yield


def replace_experts(router: Router, routes_NK: Tensor) -> Callable:
    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
        logits_NE, own_weights_NK, own_NK = output
        if len(routes_NK) != len(own_NK):
            raise ValueError(f"routes of {len(routes_NK)} tokens for an input of {len(own_NK)}")
        experts_NK = torch.where(routes_NK < 0, own_NK, routes_NK)
        weights_NK = router.weigh(logits_NE, experts_NK)
        return logits_NE, weights_NK.to(own_weights_NK.dtype), experts_NK

    return hook


class ExpertLoad:
    """Counts the tokens that each expert gets while the policy trains, and evens them out.

    Wrap each training forward and its backward in `counting`, call `balance` after each optimizer
    step, and `metrics` when a line of the log is due. Does nothing for a dense model; the bias
    update does nothing for routers without a bias.
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
        # An unknown mixture of experts can be trained too, but not balanced.
        asked = seq_aux_loss_coef or (bias_update_rate and biased)
        self.routers = find_routers(model) if known or asked else []
        self._sequences_N: Tensor | None = None
        self._loss_scale = 0.0
        # By layer and overwritten, not added up: checkpointing runs a forward twice.
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
        # Of the auxiliary loss: its sum, and over how many sequences and layers.
        self._loss_and_count = torch.zeros(2, device=device)
        self._total_loss_and_count = torch.zeros_like(self._loss_and_count)

    @contextlib.contextmanager
    def counting(self, sequences_N: Tensor, num_sequences: int) -> Iterator[None]:
        """One forward and backward over input tokens that belong to these sequences (-1: padding,
        not counted). `num_sequences`: of all micro-batches up to the optimizer step, over which the
        auxiliary loss is a mean.
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
        """Add what was seen since `start` to the counts."""
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
        """After an optimizer step: sum the counts over all ranks, and move the routers' biases
        (not where the step was skipped)."""
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
        """What the next `metrics` will tell of, after an optimizer step. The biases are the
        model's."""
        return {"total": self._total_LE, "loss_and_count": self._total_loss_and_count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._reset()
        self._total_LE += state["total"].to(self._total_LE.device)
        self._total_loss_and_count += state["loss_and_count"].to(self._total_LE.device)

    def metrics(self) -> dict[str, float]:
        """The load since the last call: means over the layers, then each layer's own."""
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
    """Per layer, and as a mean over layers, from the tokens that each expert got:

    - load: of each expert, over the mean load;
    - max_violation: (largest load - mean load) / mean load, 0 if even (arXiv:2408.15664, eq. 4);
    - entropy: of the loads as shares, divided by that of even loads: 1 if even;
    - dead: the share of experts, over all layers, that get less than DEAD of the mean load.

    Empty if nothing was counted.
    """
    if not len(counts_LE) or not counts_LE.sum():
        return {}
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
    """DeepSeek-V3's auxiliary loss of one layer without its factor alpha (eq. 17-20), summed over
    sequences; 1 per sequence if both choices and scores are even.

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
    """Adds a scalar to whatever loss the tensor leads to, without a path through the model's
    outputs: the tensor passes unchanged, and the scalar gets a gradient of 1.

    So it works under any trainer and with activation checkpointing, which only keeps what a
    layer returns.
    """

    @staticmethod
    def forward(ctx: object, tensor: Tensor, loss: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())
