"""Weights into a running vLLM engine: layer by layer, what its CPU kernels need besides, and the
buffer in which they reach an engine in another process."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor

from r1pipe.models.weights import list_weights
from r1pipe.utils.errors import UserError


def send_weights(llm: Any, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Load weights, named as in a checkpoint, into a running `vllm.LLM`, and into its module for
    multi-token prediction. Sequences that are being sampled go on: the new weights read them again,
    so that each further log-prob is the new weights' alone. Raises UserError if some are
    missing."""
    (absent,) = llm.collective_rpc(reload_weights, args=(iter(weights),))
    settle(llm, absent, device)


def receive_weights(
    llm: Any, group: dict[str, Any] | None, update: dict[str, Any], device: torch.device
) -> None:
    """As `send_weights`, of weights that a trainer broadcasts (weight_transfer.py). `group`: what
    vLLM needs to join its communicator, if there is a new one; `update`: names, dtypes, shapes."""
    if group:
        llm.collective_rpc(leave_group)
        llm.init_weight_transfer_engine({"init_info": group})
        llm.collective_rpc(require_group)
    if device.type == "cpu":
        llm.apply_model(drop_expert_kernels)
    llm.start_weight_update()
    llm.update_weights({"update_info": update})
    (absent,) = llm.collective_rpc(lambda worker: find_absent(worker.get_model()))
    llm.finish_weight_update()
    settle(llm, absent, device)


def leave_group(worker: Any) -> None:
    """Runs inside the engine. vLLM would keep the old communicator's memory."""
    if group := worker.weight_transfer_engine.model_update_group:
        group.destroy()


def require_group(worker: Any) -> None:
    """Runs inside the engine. Without NCCL vLLM would receive nothing, and load whatever is in its
    buffer."""
    if not worker.weight_transfer_engine.model_update_group.available:
        raise UserError("sampler: the engine finds no NCCL to receive weights by")


def settle(llm: Any, absent: list[str], device: torch.device) -> None:
    """After a reload; `absent`: layers that got no weights."""
    if absent:
        more = f" and {len(absent) - 1} more layers" if len(absent) > 1 else ""
        raise UserError(f"vLLM was given no weights of {absent[0]}{more}")
    if device.type == "cpu":
        llm.apply_model(repack_tied_head)
    is_sampling = llm.llm_engine.has_unfinished_requests()
    if not llm.reset_prefix_cache(reset_running_requests=is_sampling):
        raise RuntimeError("vLLM kept the keys and values of the old weights")


def send_adapter(llm: Any, folder: str) -> Any:
    """Load peft's files into a running `vllm.LLM` in place of the adapter before; returns what its
    requests say to use it. Raises what vLLM raises for an adapter that it does not take."""
    from vllm.lora.request import LoRARequest

    # A request that asks for it to be loaded would read the files at each step.
    llm.llm_engine.add_lora(LoRARequest("adapter", 1, folder, load_inplace=True))
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM kept the keys and values of the old adapter")
    return LoRARequest("adapter", 1, folder)


def reload_weights(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Runs inside the engine: vLLM's layer-wise reload, which does not reach the module for
    multi-token prediction. Returns the layers that got no weights and kept their old ones."""
    from vllm.model_executor.models.utils import get_spec_layer_idx_from_weight_name

    if not worker.speculative_config or worker.speculative_config.method != "mtp":
        return reload_model(worker, weights)
    model, module = worker.get_model(), worker.get_draft_model()
    own = []

    def pass_on() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            # The module computes with the policy's embedding and head, whatever copies there are.
            is_copy = name.endswith(("embed_tokens.weight", "shared_head.head.weight"))
            if get_spec_layer_idx_from_weight_name(model.config, name) is None:
                yield name, tensor
            elif not is_copy:
                own.append((name, tensor))

    absent = reload_model(worker, pass_on())
    if not own:  # vLLM would raise in the middle
        return [*absent, "the module for multi-token prediction"]
    with mock.patch.object(worker.model_runner, "get_model", return_value=module):
        return absent + reload_model(worker, iter(own), shared=set(model.modules()))


def reload_model(
    worker: Any,
    weights: Iterator[tuple[str, Tensor]],
    shared: Collection[torch.nn.Module] = (),
) -> list[str]:
    """Of `worker.get_model()`; the `shared` layers are another model's as well, and loaded there.
    Returns the layers that got no weights, which vLLM only logs."""
    model = worker.get_model()
    if worker.device.type == "cpu":
        # The layer-wise reload repacks the experts' weights but keeps their old kernel, which
        # then silently computes with the wrong layout (log-prob error 1.4). Without a kernel
        # it builds a new one.
        drop_expert_kernels(model)
    load, absent = model.load_weights, []

    def load_and_look(weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        loaded = load(weights)
        absent.extend(find_absent(model, shared))
        return loaded

    model.load_weights = load_and_look
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights  # the instance's; the class has its own
    return absent


def find_absent(model: torch.nn.Module, shared: Collection[torch.nn.Module] = ()) -> list[str]:
    """The layers that still wait for weights, at the end of a layer-wise reload."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    absent = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # A complete layer has been put in place by now and no longer waits.
        waits = info.can_load() and not info.load_numel
        if waits and layer not in shared and any(True for _ in layer.parameters(recurse=False)):
            absent.append(name)
    if getattr(model.config, "tie_word_embeddings", False) and "lm_head" in absent:
        absent.remove("lm_head")
    return absent


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """See reload_model."""
    for module in model.modules():
        experts = getattr(module, "routed_experts", None)
        if experts is not None:
            experts.quant_method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """Runs inside the engine after a reload. A head tied to the embedding has no tensor of its own
    in the checkpoint: the reload leaves its packed copy of the old weights (log-prob error 0.2).
    """
    head = getattr(model, "lm_head", None)
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def read_weights(folder: Path) -> Iterable[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint folder's files."""
    for file in list_weights(folder):
        if file.suffix == ".bin":
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                yield name, tensors.get_tensor(name)


# --- Between processes ----------------------------------------------------------------------------

ALIGNMENT = 64
"""Bytes: where each tensor begins in a sync's buffer."""


class Place(NamedTuple):
    """Where a weight is in a sync's buffer."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    """Bytes."""


def pack_weights(weights: Iterable[tuple[str, Tensor]]) -> tuple[list[Place], Tensor]:
    """All in one buffer of bytes, uint8 `[N]`, in the CPU's memory."""
    places, tensors, end = [], [], 0
    for name, tensor in weights:
        places.append(Place(name, tensor.dtype, tensor.shape, end))
        tensors.append(tensor.detach())
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer_N = make_buffer(places)
    for (_, tensor_N), tensor in zip(unpack_weights(places, buffer_N), tensors, strict=True):
        tensor_N.copy_(tensor)
    return places, buffer_N


def make_buffer(places: list[Place]) -> Tensor:
    _, dtype, shape, start = places[-1]
    return torch.empty(start + shape.numel() * dtype.itemsize, dtype=torch.uint8)


def unpack_weights(places: list[Place], buffer_N: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and views of the buffer."""
    for name, dtype, shape, start in places:
        num_bytes = shape.numel() * dtype.itemsize
        yield name, buffer_N[start : start + num_bytes].view(dtype).view(shape)


def copy_weights(
    weights: Iterable[tuple[str, Tensor]], places: list[Place], buffer_N: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The weights themselves; each is copied to its place when the next one is asked for."""
    copies = unpack_weights(places, buffer_N)
    for (name, tensor), (known, copy) in zip(weights, copies, strict=True):
        if (name, tensor.dtype, tensor.shape) != (known, copy.dtype, copy.shape):
            raise RuntimeError(f"{name} has come where {known} was in the last sync")
        copy.copy_(tensor.detach())
        yield name, tensor
