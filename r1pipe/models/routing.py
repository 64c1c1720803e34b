"""Mixtures of experts in the trainer: routers and routing replay; expert_load.py balances.

- Routers compute in float32 whatever the rest computes in (Switch Transformer, arXiv:2101.03961,
  section 2.4): in bf16, rounding would choose between experts whose scores are close.
- Routing replay (R3: Ma et al. 2025, arXiv:2510.11370): the trainer's forward sends each token to
  the experts that the sampler chose for it. The gate weights are the trainer's own scores at these
  experts, so the router learns as before.

Shape suffixes: N tokens of the model's input, flattened; L mixture-of-experts layers, first to
last; K experts per token; E experts; S sequences.
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
from r1pipe.models.mtp import find_mtp_layer
from r1pipe.utils.errors import UserError

OWN = -1
"""Stands for the trainer's own choice in place of an expert's number."""


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


@dataclass(frozen=True)
class Routing:
    """How an architecture turns a router's logits into gate weights."""

    score: Callable[[Tensor], Tensor]
    """Logits to scores, over the last dimension."""
    normalize: bool | None = None
    """Whether chosen scores are divided by their sum; None: see config.norm_topk_prob."""
    name: str = "gate"
    """Name of the router module, a sibling of `experts`."""


ROUTINGS: dict[str, Routing] = {
    "deepseek_v2": Routing(softmax, normalize=False),
    "deepseek_v3": Routing(torch.sigmoid),
    "deepseek_v32": Routing(torch.sigmoid),
    "glm4_moe": Routing(torch.sigmoid),
    "gpt_oss": Routing(softmax, normalize=True, name="router"),
    "mixtral": Routing(softmax, normalize=True),
    "olmoe": Routing(softmax),
    "qwen2_moe": Routing(softmax),
    "qwen3_moe": Routing(softmax),
}
"""By model_type. Groups and bias decide which experts are chosen, not their weights."""


@dataclass(frozen=True)
class Router:
    """One layer's router: a module that returns (logits `[N, E]`, weights and experts `[N, K]`)."""

    layer: int
    """Index among all decoder layers, dense ones included."""
    module: nn.Module
    routing: Routing

    @property
    def bias(self) -> Tensor | None:
        """Buffer `[E]` added to the scores when experts are chosen; None if there is none."""
        return getattr(self.module, "e_score_correction_bias", None)

    def score(self, logits_NE: Tensor) -> Tensor:
        return self.routing.score(logits_NE.float())

    def weigh(self, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """Gate weights `[N, K]` of given experts: their scores, normalized and scaled."""
        weights_NK = self.score(logits_NE).gather(-1, experts_NK)
        normalize = self.routing.normalize
        if self.module.norm_topk_prob if normalize is None else normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * getattr(self.module, "routed_scaling_factor", 1.0)


def find_routers(model: PreTrainedModel) -> list[Router]:
    """The model's routers, first layer to last, that of a prediction layer too; none for a dense
    model.

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
    """Indices of the decoder layers that are mixtures of experts."""
    with torch.device("meta"):
        return [router.layer for router in find_routers(AutoModelForCausalLM.from_config(config))]


def route_in_float32(model: PreTrainedModel) -> None:
    """Make the model's routers compute logits, scores and gate weights in float32, whatever the
    dtype of hidden states and weights, under autocast too. No-op for a dense model or an unknown
    routing.
    """
    if is_moe(model) and model.config.model_type in ROUTINGS:
        for router in find_routers(model):
            # A bound method: deepcopy binds it to the copy.
            router.module.forward = MethodType(run_in_float32, router.module)


def run_in_float32(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden_states.device.type, enabled=False), Float32Products():
        return type(self).forward(self, hidden_states)


class Float32Products(TorchFunctionMode):
    """Inside the context, `linear` computes in float32. Only DeepSeek's and GLM's routers do so on
    their own."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is nn.functional.linear:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        return function(*args, **(kwargs or {}))


def pack_routes(routes: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Rollouts' routes `[n - 1, L, K]` concatenated to `[N, L, K]`, for a packed input. The last
    token of each, which the sampler never read, gets OWN."""
    parts = []
    for rows in routes:
        parts += [rows.astype(np.int16), np.full((1, *rows.shape[1:]), OWN, np.int16)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


@contextlib.contextmanager
def replaying(model: PreTrainedModel, routes_NLK: Tensor | None) -> Iterator[None]:
    """Inside the context, the forward uses these experts; OWN leaves a token's choice to the model.

    Exit after the backward pass: activation checkpointing reruns the forward there. No-op for None
    or a dense model. Raises ValueError for routes of the wrong shape.
    """
    routers = find_routers(model) if routes_NLK is not None else []
    if find_mtp_layer(model):
        routers = routers[:-1]  # the sampler has no such layer
    if routers:
        top_k = routers[0].module.top_k
        if routes_NLK.shape[1:] != (len(routers), top_k):
            raise ValueError(
                f"routes of shape {tuple(routes_NLK.shape)} for a model of {len(routers)} "
                f"mixture-of-experts layers with {top_k} experts per token"
            )
    with contextlib.ExitStack() as hooks:
        for index, router in enumerate(routers):
            # Before other hooks: expert counts are of the replayed ones.
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
