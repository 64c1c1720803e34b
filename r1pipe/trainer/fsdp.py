"""FSDP2: every rank holds a part of each parameter, and a full layer only while computing it.

torch's `fully_shard` and not accelerate's `fsdp2_prepare_model` (1.15), which calls the same
function but

- needs `DistributedType.FSDP`, which accelerate silently turns into `MULTI_CPU`, that is DDP, on
  CPU: tests on CPU would show nothing about GPUs;
- takes a model that every rank has loaded in full. `cpu_ram_efficient_loading` instead loads on
  rank 0, broadcasts tensor by tensor (`fsdp2_load_full_state_dict`), and asks every entry of
  `state_dict()` for its `device_mesh`: it fails at a router's `e_score_correction_bias`, a buffer
  and no DTensor;
- shards the model, but GRPO's root is the module around it that computes log-probabilities.

Zhao et al. 2023, arXiv:2304.11277, for the scheme; parameters, gradients and the optimizer's state
are all sharded (ZeRO stage 3).
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.optim import Optimizer
from transformers import PreTrainedModel

from r1pipe.models.adapter import (
    NewAdapter,
    Unbound,
    add_adapter,
    describe,
    initialize,
    is_adapters,
    only_trained,
)
from r1pipe.models.model import find_layers, load_model
from r1pipe.models.routing import route_in_float32
from r1pipe.trainer.attention import find_implementation
from r1pipe.trainer.expert_parallel import require_groups, share_experts
from r1pipe.trainer.sequence_parallel import require_teams
from r1pipe.utils import distributed
from r1pipe.utils.progress import log_line

Root = TypeVar("Root", bound=nn.Module)


def load_sharded(
    checkpoint: str,
    device: torch.device,
    attn_implementation: str,
    wrap: Callable[[PreTrainedModel], Root],
    *,
    dtype: str,
    trained: bool = True,
    adapter: NewAdapter | None = None,
    sharding: str = "full",
    **groups: int,
) -> Root:
    """`wrap(model)` of a checkpoint in float32, each rank with its part; alone or unsharded, the
    full model.

    The model is built without memory, sharded, and only then loaded: transformers reads each
    rank's slices of the safetensors files, so no rank ever holds more than its share and the
    layer-sized pieces in transit.

    Layers compute in `dtype`, the recipe's. A model that is not `trained`, or only an adapter of
    it, is also held in it: there are no updates for float32 to keep.
    """
    roots: list[Root] = []

    def prepare(model: PreTrainedModel) -> None:
        # transformers ties after loading. Parameters tied that late keep a padded copy each where
        # ranks' parts differ in size, and one of the two is never updated.
        model.tie_weights()
        if adapter:
            add_adapter(model, adapter.settings)
        root = wrap(model)
        roots.append(shard(root, model, device, dtype=dtype, sharding=sharding, **groups))

    held = torch.float32 if trained and not adapter else getattr(torch, dtype)
    source = (checkpoint, device, find_implementation(attn_implementation, device, dtype), held)
    if distributed.alone() or sharding == "none":
        prepare(load_model(*source))
    else:
        with distributing(prepare):
            load_model(*source)
    root = roots[0].to(device).requires_grad_(trained)
    if adapter:
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(is_adapters(name))
        initialize(root, adapter.seed)
        count = describe(root)["adapter_parameters"]
        log_line(f"{checkpoint}: frozen; an adapter of {count:,} parameters is trained")
    return root


def shard(
    root: Root,
    model: PreTrainedModel,
    device: torch.device,
    *,
    dtype: str,
    sharding: str = "full",
    expert_parallel: int = 1,
    sequence_parallel: int = 1,
) -> Root:
    """Shard each decoder layer of `model`, then `root`, whose forward calls them all, with the
    rest: embedding, last norm, head; experts in groups of `expert_parallel` ranks. Teams of
    `sequence_parallel` ranks share out a row's tokens. Alone, or with `sharding` none, nothing is
    sharded. Raises UserError if experts, heads or ranks cannot be grouped so.

    In bfloat16, layers are gathered and computed in bf16, like the sampler's. autocast would gather
    them in float32 and keep the residual stream in it: twice the memory, further from the sampler
    (benchmarks/README.md), and float32 experts, because it has no rule for grouped_mm. Shards and
    sums of gradients stay float32.

    Gradients become sums over ranks, for a loss that divides by the size of the whole batch.
    """
    require_groups(model.config, expert_parallel, distributed.world_size())
    how = model.config._attn_implementation
    require_teams(model.config, how, sequence_parallel, distributed.world_size())
    if sequence_parallel > 1:
        root.team = distributed.make_mesh(device, sequence_parallel)["within"].get_group()
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        route_in_float32(model)
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if distributed.alone() or sharding == "none":
        if dtype == "bfloat16" and any(p.dtype != torch.bfloat16 for p in model.parameters()):
            for module in (*find_layers(model), root):
                # A bound method: in a copy of the model it is bound to the copy.
                module.forward = MethodType(run_in_bfloat16, module)
        return root
    if device.type == "cpu":
        give_memory_back()
    parts = []
    if expert_parallel > 1:
        mesh = distributed.make_mesh(device, expert_parallel)
        own = replace(precision, cast_forward_inputs=False)  # gate weights stay float32
        parts = [(module, mesh["across"], own) for module in share_experts(model, mesh["within"])]
    mesh = distributed.make_mesh(device)
    parts += [(module, mesh, precision) for module in (*find_layers(model), root)]
    for module, mesh, policy in parts:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        # gloo can sum, but neither average nor scale.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return root


def give_memory_back() -> None:
    """Have glibc map blocks of 1 MiB and more, and unmap them when freed.

    By default its threshold grows to 32 MiB. Gathered layers that come and go between activations
    then leave more holes in the heap than memory in use: the peak was 1.4 times as high
    (benchmarks/README.md).
    """
    m_mmap_threshold = -3
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


def run_in_bfloat16(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's forward with bf16 copies of its parameters, through which gradients flow: FSDP's
    MixedPrecisionPolicy for one process."""
    copies: dict[Tensor, Tensor] = {}  # a tied parameter has one
    own = {
        f"module.{name}": copies.setdefault(parameter, parameter.to(torch.bfloat16))
        for name, parameter in list_own_parameters(self)
    }
    return functional_call(Unbound(self), own, args, kwargs)


def list_own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Without those of inner modules that make their own copies."""
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        if getattr(child.forward, "__func__", None) is not run_in_bfloat16:
            yield from list_own_parameters(child, f"{prefix}{name}.")


@contextmanager
def distributing(distribute: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Within it, `from_pretrained` passes each model to `distribute` before loading it.

    There transformers applies its own sharding plans, whose root is the model; ours is the module
    that computes the loss.
    """

    def hook(cls: type, model: PreTrainedModel, *args: object) -> PreTrainedModel:
        distribute(model)
        return model

    with patch.object(PreTrainedModel, "maybe_distribute_model", classmethod(hook)):
        yield


def own_shard(tensor: Any) -> Any:
    """This rank's part of a sharded tensor; anything else unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def take_weights(module: nn.Module) -> dict[str, Tensor]:
    """This rank's part of all parameters and buffers, or of an adapter's, not copied."""
    return {name: own_shard(t) for name, t in only_trained(module.state_dict()).items()}


@torch.no_grad()
def put_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the result of `take_weights` into a module that is sharded the same way."""
    for name, tensor in only_trained(module.state_dict()).items():
        own_shard(tensor).copy_(weights[name])


def take_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """This rank's part of the optimizer's state."""
    state = optimizer.state_dict()
    own = {
        index: {name: own_shard(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": own}


def put_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the result of `take_optimizer`, for parameters that are sharded the same way."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def like(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or value.shape != parameter.to_local().shape:
            return value
        sharded = DTensor.from_local(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return sharded.to(value.device)  # the optimizer moves it if it needs to

    sharded_state = {
        index: {name: like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded_state})
