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
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r1pipe.models.model import is_moe
from r1pipe.utils.errors import UserError

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
            f'"{model_type}" is a mixture of experts whose routing '
            "r1pipe/models/routing.py does not know; "
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
