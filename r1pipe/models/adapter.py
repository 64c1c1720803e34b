"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685): W + alpha / r * B A, of which A and B are
trained.

A target's matrices are parameters of its own module, named after it: `weight_lora_A` beside
`weight`. All other names stay, so that loading, sharding, weight sync and routing replay need not
know. peft wraps modules instead, which renames all that is in them. The files are peft's
(`save_adapter`).

Shape suffixes: R rank; I, O a matrix's inputs and outputs; E experts.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r1pipe.config.adapter import Adapter
from r1pipe.models.mtp import find_mtp_layer
from r1pipe.utils.distributed import full_tensor, is_first
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_text
from r1pipe.utils.seeds import derive_seed

LORA_A, LORA_B = "_lora_A", "_lora_B"
"""What the names of an adapter's parameters end in."""


class NewAdapter(NamedTuple):
    settings: Adapter
    seed: int


@dataclass
class LowRank:
    """A model's adapter: shared by all adapted modules."""

    settings: Adapter
    targets: list["Target"]
    is_on: bool = True

    @property
    def scaling(self) -> float:
        return self.settings.alpha / self.settings.r


@dataclass(frozen=True)
class Target:
    """A matrix `[O, I]`, or the matrices of all experts, `[E, O, I]` or `[E, I, O]`."""

    path: str
    """Its module's."""
    name: str
    """Its name in the module."""
    is_transposed: bool = False

    @property
    def key(self) -> str:
        """What `target_modules` calls it."""
        return self.path.rpartition(".")[2] if self.name == "weight" else self.name


def is_adapters(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((LORA_A, LORA_B))


def find_adapter(model: nn.Module) -> LowRank | None:
    return getattr(model, "low_rank", None)


def find_targets(model: PreTrainedModel, settings: Adapter) -> list[Target]:
    """Raises UserError for a name that nothing in the model has."""
    there = list(list_matrices(model))
    keys = list(dict.fromkeys(target.key for target in there))
    wanted = keys if settings.target_modules is None else settings.target_modules
    for key in wanted:
        if key not in keys:
            raise UserError(
                f'adapter.target_modules: {model.config.model_type} has no "{key}"; '
                f"it has {', '.join(keys)}"
            )
    return [target for target in there if target.key in wanted]


def check_targets(config: PretrainedConfig, settings: Adapter) -> None:
    """Raises UserError as `find_targets`. Allocates no weights."""
    with torch.device("meta"):
        find_targets(AutoModelForCausalLM.from_config(config), settings)


def list_matrices(model: PreTrainedModel) -> Iterator[Target]:
    """All that can be adapted: not the head, whose logits are computed elsewhere, nor routers, nor
    a prediction layer, which rests beside an adapter."""
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    predicting = find_mtp_layer(model)
    resting = set(predicting.modules()) if predicting else set()
    for path, module in modules.items():
        if module in resting:
            continue
        parent = modules[path.rpartition(".")[0]] if path else None
        if path.endswith(".experts"):
            is_transposed = getattr(module, "is_transposed", False)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield Target(path, name, is_transposed)
        elif isinstance(module, nn.Linear) and not (module is head or hasattr(parent, "experts")):
            yield Target(path, "weight")


def add_adapter(model: PreTrainedModel, settings: Adapter) -> LowRank:
    """Empty matrices in float32; `initialize` fills them. Raises UserError as `find_targets`."""
    low_rank = LowRank(settings, find_targets(model, settings))
    modules = dict(model.named_modules())
    for target in low_rank.targets:
        module = modules[target.path]
        weight = getattr(module, target.name)
        *experts, outputs, inputs = weight.shape
        if target.is_transposed:
            outputs, inputs = inputs, outputs
        for suffix, shape in ((LORA_A, (settings.r, inputs)), (LORA_B, (outputs, settings.r))):
            empty = torch.empty(*experts, *shape, device=weight.device, dtype=torch.float32)
            module.register_parameter(target.name + suffix, nn.Parameter(empty))
        module.low_rank = low_rank
        # A bound method: in a copy of the model it is bound to the copy.
        module.forward = MethodType(
            run_linear if isinstance(module, nn.Linear) else run_experts, module
        )
    model.low_rank = low_rank
    return low_rank


@torch.no_grad()
def initialize(model: nn.Module, seed: int, std_b: float = 0.0) -> None:
    """A uniform in ±1 / sqrt(I), as peft's and nn.Linear's; B zero, so that the policy is the
    checkpoint's, or normal. The same numbers for any number of ranks."""
    for name, parameter in model.named_parameters():
        if not is_adapters(name):
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        if name.endswith(LORA_A):
            limit = 1 / math.sqrt(parameter.shape[-1])
            whole = torch.empty(parameter.shape).uniform_(-limit, limit, generator=generator)
        elif std_b:
            whole = torch.empty(parameter.shape).normal_(std=std_b, generator=generator)
        else:
            whole = torch.zeros(parameter.shape)
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        own.copy_(cut_like(whole, parameter))


def cut_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part."""
    if not isinstance(parameter, DTensor):
        return whole
    (placement,), mesh = parameter.placements, parameter.device_mesh
    parts = whole.chunk(mesh.size(), placement.dim)
    number = mesh.get_local_rank()
    return parts[number] if number < len(parts) else whole.narrow(placement.dim, 0, 0)


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model computes as its base."""
    low_rank = find_adapter(model)
    assert low_rank is not None
    low_rank.is_on = False
    try:
        yield
    finally:
        low_rank.is_on = True


# --- Forward ------------------------------------------------------------------------------------


def run_linear(self: nn.Linear, x: Tensor) -> Tensor:
    result = type(self).forward(self, x)
    if not self.low_rank.is_on:
        return result
    added = linear(linear(x, self.weight_lora_A), self.weight_lora_B)
    return torch.add(result, added, alpha=self.low_rank.scaling)


def run_experts(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The experts' own forward, grouped products and all, with merged matrices: while it computes,
    these are there beside the layer's own."""
    if not self.low_rank.is_on:
        return type(self).forward(self, *args, **kwargs)
    scaling, is_transposed = self.low_rank.scaling, getattr(self, "is_transposed", False)
    own = dict(self.named_parameters(recurse=False))
    merged = {
        f"module.{name}": add_product(
            weight, own[name + LORA_A], own[name + LORA_B], scaling, is_transposed
        )
        for name, weight in own.items()
        if name + LORA_A in own
    }
    return functional_call(Unbound(self), merged, args, kwargs)


def add_product(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, is_transposed: bool = False
) -> Tensor:
    product = (b @ a).mT if is_transposed else b @ a
    return torch.add(weight, product, alpha=scaling)


class Unbound(nn.Module):
    """A module with its class's own forward."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


# --- Weights ------------------------------------------------------------------------------------


def merge(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of full tensors by name: the adapter's added to those that they belong to, in float32 and
    then in the base's dtype. Others unchanged."""
    low_rank = find_adapter(model)
    if low_rank is None:
        return tensors
    merged = {name: tensor for name, tensor in tensors.items() if not is_adapters(name)}
    for target in low_rank.targets:
        name = f"{target.path}.{target.name}"
        if name in merged:
            weight = merged[name]
            a, b = tensors[name + LORA_A], tensors[name + LORA_B]
            there = weight.to(a.device).float()  # the base may be in the CPU's memory meanwhile
            whole = add_product(there, a, b, low_rank.scaling, target.is_transposed)
            merged[name] = whole.to(weight.dtype)
    return merged


def only_trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict: an adapter's part, or all if there is none."""
    own = {name: tensor for name, tensor in tensors.items() if is_adapters(name)}
    return own or dict(tensors)


def describe(model: nn.Module) -> dict[str, int]:
    """A fact for stage.json; none without an adapter."""
    count = sum(p.numel() for name, p in model.named_parameters() if is_adapters(name))
    return {"adapter_parameters": count} if count else {}


# --- Files --------------------------------------------------------------------------------------


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write what peft's PeftModel.from_pretrained reads. Every rank must call it for a sharded
    model; rank 0 writes."""
    low_rank = find_adapter(model)
    assert low_rank is not None
    modules = dict(model.named_modules())
    tensors = {}
    for target in low_rank.targets:
        pair = (getattr(modules[target.path], target.name + x) for x in (LORA_A, LORA_B))
        a, b = (full_tensor(parameter.detach()).cpu() for parameter in pair)
        if a.ndim == 3:  # [E, R, I] as [E R, I], [E, O, R] as [O, R E]
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        place = f"base_model.model.{peft_path(modules[target.path], target)}"
        tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b.contiguous()}
    if not is_first():
        return
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = describe_for_peft(model, low_rank)
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def peft_path(module: nn.Module, target: Target) -> str:
    """peft wraps a module once for each of its own parameters that is a target, in their order."""
    if target.name == "weight":
        return target.path
    names = [name for name, _ in module.named_parameters(recurse=False)]
    adapted = [name for name in names if name + LORA_A in names]
    return target.path + ".base_layer" * (len(adapted) - 1 - adapted.index(target.name))


def describe_for_peft(model: PreTrainedModel, low_rank: LowRank) -> dict[str, Any]:
    """adapter_config.json. In a mixture peft takes names such as gate_proj among `target_modules`
    for the experts' fused matrices, whose rank it doubles: there all that is outside of attention
    is named as parameters."""
    is_mixture = any(target.path.endswith(".experts") for target in list_matrices(model))
    modules, parameters = [], []
    for target in low_rank.targets:
        if is_mixture and "attn" not in target.path:
            parameters.append(re.sub(r"^.*?\.\d+\.", "", f"{target.path}.{target.name}"))
        else:
            modules.append(target.key)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": low_rank.settings.r,
        "lora_alpha": low_rank.settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(set(modules)),
        "target_parameters": sorted(set(parameters)) or None,
    }
