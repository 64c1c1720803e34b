"""FSDP2: every rank holds a part of each parameter, and a whole layer only while it computes it.

torch's `fully_shard` and not accelerate's: accelerate falls back to DDP on CPU without a word, so
nothing that runs here would show what runs on GPUs. Zhao et al. 2023, arXiv:2304.11277, for the
scheme; parameters, gradients and the optimizer's state are all sharded (ZeRO stage 3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from r1pipe import distributed
from r1pipe.models import load_model

Root = TypeVar("Root", bound=nn.Module)


def load_sharded(
    checkpoint: str,
    device: torch.device,
    attn_implementation: str,
    wrap: Callable[[PreTrainedModel], Root] = lambda model: model,
    *,
    sums_gradients: bool = True,
) -> Root:
    """`wrap(model)` of a checkpoint, float32, every rank reading its own part of it.

    The model is built without memory, sharded, and only then loaded: transformers reads each
    rank's slices of the safetensors files, so no rank ever holds more than its share and the
    layer-sized pieces on their way. Alone: the whole model.
    """
    if distributed.alone():
        return wrap(load_model(checkpoint, device, attn_implementation))
    roots: list[Root] = []

    def distribute(model: PreTrainedModel) -> None:
        # transformers ties after it has loaded. Two parameters that become one only then keep a
        # padded copy each where ranks' parts differ in size, and one of them is never updated.
        model.tie_weights()
        roots.append(shard(wrap(model), model, device, sums_gradients=sums_gradients))

    with distributing(distribute):
        load_model(checkpoint, device, attn_implementation)
    return roots[0].to(device)


def shard(
    root: Root, model: PreTrainedModel, device: torch.device, *, sums_gradients: bool
) -> Root:
    """Shard each decoder layer of `model`, then `root`, whose forward leads to all of them, with
    what is left: embedding, last norm, head. Alone: as it is.

    Gradients become sums over ranks, for a loss that divides by the size of the whole batch, or
    means, as with DDP.
    """
    if distributed.alone():
        return root
    mesh = distributed.make_mesh(device)
    for module in (*model.base_model.layers, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # gloo can add up, and neither average nor scale.
        module.set_gradient_divide_factor(1.0 if sums_gradients else mesh.size())
        module.set_force_sum_reduction_for_comms(True)
    return root


@contextmanager
def distributing(distribute: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Within it, `from_pretrained` hands each model to `distribute` before it is loaded.

    That is where transformers applies its own sharding plans, whose root is the model itself; ours
    is the module that computes the loss.
    """

    def hook(cls: type, model: PreTrainedModel, *args: object) -> PreTrainedModel:
        distribute(model)
        return model

    with patch.object(PreTrainedModel, "maybe_distribute_model", classmethod(hook)):
        yield
