"""Attention within each sequence of a packed row, by the kernels that the device has."""

import inspect
from collections.abc import Callable, Collection
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from r1pipe.models.model import find_layers, is_moe
from r1pipe.models.sparse_attention import attend_sparsely, has_indexer
from r1pipe.trainer.sequence_parallel import trade_heads_for_tokens, trade_tokens_for_heads
from r1pipe.utils.errors import UserError

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Layer types of a config whose attention can be kept within sequences."""
COMPUTED = ("sequence_lengths", "scaling", "dropout", "sliding_window", "position_ids")
"""Keyword arguments of an attention function that `attend_packed` handles or may ignore."""

PREFIX, PROBE = "r1pipe_", "r1pipe_probe"
"""What `attend_packed` is called in transformers, before its `implementation`."""

FLASH_PACKAGES: dict[str, tuple[Callable[[], bool], str]] = {
    "flash_attention_2": (is_flash_attn_2_available, 'flash-attn: pip install -e ".[flash]"'),
    "flash_attention_3": (
        is_flash_attn_3_available,
        "flash-attn-3: build the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
}
"""transformers' own implementations: whether they can be imported, and how to make it so."""

MAX_HEAD_SIZE = 256
"""Of flash-attention's kernels in torch."""
# torch 2.11 takes grouped heads without being told.
GROUPED = {k: True for k in inspect.signature(varlen_attn).parameters if k == "enable_gqa"}

_packable: set[tuple[str, str]] = set()
"""What `require_packable` has accepted: the doctor and then the trainer ask."""


def find_implementation(attn_implementation: str, device: torch.device, dtype: str) -> str:
    """transformers' name of a recipe's `attn_implementation`. Raises UserError if it cannot run."""
    key = f"attn_implementation: {attn_implementation}"
    if attn_implementation in FLASH_PACKAGES:
        is_installed, package = FLASH_PACKAGES[attn_implementation]
        if not is_installed():
            raise UserError(f"{key} needs {package}; without it, leave attn_implementation out")
    elif attn_implementation != "varlen":
        # Packed rows have no mask, which eager attention would need.
        return PREFIX + ("sdpa" if attn_implementation == "eager" else attn_implementation)
    if obstacle := find_obstacle(device, getattr(torch, dtype)):
        raise UserError(f"{key} needs {obstacle}: leave attn_implementation out")
    return attn_implementation if is_flash(attn_implementation) else PREFIX + attn_implementation


def available_implementations(device: torch.device, dtype: str) -> list[str]:
    """Values of `attn_implementation` that can run, without auto, which is one of them."""
    names = ["sdpa"]
    for name in ("varlen", *FLASH_PACKAGES):
        with suppress(UserError):
            find_implementation(name, device, dtype)
            names.append(name)
    return names


def find_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """What flash-attention's kernels lack to run; "" if nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0 or higher"
    return "" if dtype == torch.bfloat16 else "dtype: bfloat16"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make the model attend within sequences: as `find_implementation` said when it was loaded,
    else by what suits."""
    name = model.config._attn_implementation
    if not name.startswith(PREFIX) and not is_flash(name):
        model.set_attn_implementation(PREFIX + "auto")
    if has_indexer(model.config):
        attend_sparsely(model)


def require_packable(config: PretrainedConfig, attn_implementation: str) -> None:
    """Raises UserError for a model that would mix the sequences of a row by more than its
    attention, which alone is cut at the borders.

    Not by a list: the model reads a row of two sequences, without memory for its weights. Every
    layer must call the attention that it was given, and every module that takes the cache, because
    it keeps state of earlier tokens, must be such an attention or contain one.
    """
    key = (config.to_json_string(), attn_implementation)
    name = config.model_type
    if has_indexer(config) and getattr(config, "attention_dropout", 0):
        raise UserError(f"{name}: its sparse attention has no attention_dropout here: set it to 0")
    if key in _packable or has_indexer(config):  # models/sparse_attention.py cuts at the borders
        return
    types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if config.get_text_config() is not config:
        raise UserError(
            f"{name}: a multimodal model, which cannot be trained here; there may be a text-only "
            "checkpoint of it"
        )
    if others := types - ATTENTION_TYPES:
        raise UserError(
            f"{name}: its layers of {', '.join(sorted(others))} mix tokens otherwise than by "
            "attention that can be kept within a sequence: such models cannot be trained here"
        )
    with torch.device("meta"):
        # From a copy: what follows changes the config's attention and experts.
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.bfloat16).eval()
    calls = record_attention(model)
    for number, layer in enumerate(find_layers(model)):
        mixers = [m for m in layer.modules() if mixes_tokens(m, calls)]
        if mixers or not any(module in calls for module in layer.modules()):
            kind = type(next((m for m in mixers if m is not layer), layer)).__name__
            raise UserError(
                f"{name}: layer {number} ({kind}) mixes tokens otherwise than by attention that "
                "can be kept within a sequence: such models cannot be trained here"
            )
    asked = {key for keys in calls.values() for key in keys}
    if asked and not is_flash(attn_implementation) and (extra := asked - set(COMPUTED)):
        raise UserError(
            f"{name}: its attention takes {', '.join(sorted(extra))}, which sdpa and varlen have "
            "not: set attn_implementation to flash_attention_2, if the model has that"
        )
    window = getattr(config.get_text_config(), "sliding_window", None)
    # A window that only the model's mask knows would be lost: there is no mask here.
    if asked and window and types != {"full_attention"} and "sliding_window" not in asked:
        raise UserError(
            f"{name}: its attention is not told the sliding_window of {window} tokens: such models "
            "cannot be trained here"
        )
    _packable.add(key)


def is_flash(attn_implementation: str) -> bool:
    return attn_implementation.startswith("flash_attention")


def record_attention(model: PreTrainedModel) -> dict[nn.Module, list[str]]:
    """The attending modules of a model on the meta device that reads a row of two sequences, each
    with the names of its further arguments to the attention function."""
    calls: dict[nn.Module, list[str]] = {}

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        is_causal: bool | None = None,
        **asked: object,
    ) -> tuple[Tensor, None]:
        asked["attention_mask"] = attention_mask
        looks_ahead = is_causal is False or getattr(module, "is_causal", True) is False
        asked["is_causal=False"] = looks_ahead
        if "sequence_lengths" in asked:  # a model that drops it cannot be told the borders
            calls[module] = [k for k, v in asked.items() if v is not None and v is not False]
        _, num_heads, num_tokens, _ = query.shape
        return query.new_empty(1, num_tokens, num_heads, value.shape[-1]), None

    AttentionInterface.register(PROBE, attend)
    model.set_attn_implementation(PROBE)
    if is_moe(model) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # no shape depends on the routing
    row_1N = torch.zeros(1, 5, dtype=torch.long, device="meta")
    arguments = {"input_ids": row_1N, "position_ids": row_1N, "sequence_lengths": [3, 2]}
    try:
        with torch.no_grad():
            model.base_model(**arguments, use_cache=False)
    except (NotImplementedError, RuntimeError):
        # Experts of the model's own kind: count every module that could attend.
        return {module: calls.get(module, []) for module in model.modules() if can_attend(module)}
    return calls


def can_attend(module: nn.Module) -> bool:
    """Whether its forward uses transformers' table of attention functions."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return any(isinstance(forward.__globals__.get(name), AttentionInterface) for name in names)


def mixes_tokens(module: nn.Module, attending: Collection[nn.Module]) -> bool:
    if isinstance(module, nn.Conv1d):
        return True
    parameters = inspect.signature(type(module).forward).parameters
    takes_cache = any(name.startswith("past_") or "cache_params" in name for name in parameters)
    return takes_cache and not any(m in attending for m in module.modules())


def attention_arguments(
    implementation: str,
    lengths: list[int],
    device: torch.device,
    team: ProcessGroup | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a model's forward that tell its attention where sequences end, and which
    ranks have parts of the row."""
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    if implementation.startswith(PREFIX):
        rest = {"team": team} if team else {}
        return {"sequence_lengths": lengths, "sequence_ends": ends, **rest}
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def compute_attention(
    attn_implementation: str,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KNE: Tensor,
    lengths: list[int],
    **options: Any,
) -> Tensor:
    """`[1, N, H, E]` by one of `available_implementations`, called as a model does. `options`:
    scaling, sliding_window."""
    dtype = str(query_1HND.dtype).removeprefix("torch.")
    name = find_implementation(attn_implementation, query_1HND.device, dtype)
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation=name))
    arguments = attention_arguments(name, lengths, query_1HND.device)
    states = (query_1HND, key_1KND, value_1KNE)
    return AttentionInterface()[name](module, *states, None, **arguments, **options)[0]


def attend_packed(
    module: nn.Module,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KNE: Tensor,
    attention_mask: None,
    *,
    implementation: str = "auto",
    sequence_lengths: list[int] | None = None,
    sequence_ends: Tensor | None = None,
    team: ProcessGroup | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention within each of the row's sequences: `[1, N, H, E]`. The parameters are those
    of transformers' attention functions.

    `implementation` auto takes varlen where it can: not for float32, a CPU, or heads that its
    kernels have not.
    """
    if sequence_lengths is None:
        raise UserError(
            "the model's forward does not pass our arguments to its attention, which this trainer "
            "needs to keep it within sequences"
        )
    states = (query_1HND, key_1KND, value_1KNE)
    if team is not None:
        traded = (trade_tokens_for_heads(part, team) for part in states)
        out_1NHE, _ = attend_packed(
            module,
            *traded,
            None,
            implementation=implementation,
            sequence_lengths=sequence_lengths,
            sequence_ends=sequence_ends,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
        )
        return trade_heads_for_tokens(out_1NHE, team), None
    if implementation != "sdpa":
        obstacle = find_obstacle(query_1HND.device, query_1HND.dtype)
        if max(query_1HND.shape[-1], value_1KNE.shape[-1]) > MAX_HEAD_SIZE:
            obstacle = f"heads of at most {MAX_HEAD_SIZE}"
        if dropout:
            obstacle = "a model without attention_dropout"
        if not obstacle:
            return attend_varlen(*states, sequence_lengths, sequence_ends, scaling, sliding_window)
        if implementation == "varlen":
            raise UserError(
                f"attn_implementation: varlen needs {obstacle}: leave attn_implementation out"
            )
    return attend_sdpa(*states, sequence_lengths, scaling, dropout, sliding_window)


for own in ("auto", "sdpa", "varlen"):
    AttentionInterface.register(PREFIX + own, partial(attend_packed, implementation=own))


def attend_varlen(
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KNE: Tensor,
    lengths: list[int],
    ends: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, None]:
    """The whole row in one call, by flash-attention's kernels in torch.

    They want one head size, a multiple of 8, for queries, keys and values. Zeros behind smaller
    heads change neither scores nor what is cut from the output; MLA (192 and 128) pays with a fifth
    more work in attention, and SDPA would leave its flash kernels for it altogether.
    """
    size, value_size = query_1HND.shape[-1], value_1KNE.shape[-1]
    padded_size = -(-max(size, value_size) // 8) * 8
    query_NHD, key_NKD, value_NKD = (
        lay_out(states, padded_size) for states in (query_1HND, key_1KND, value_1KNE)
    )
    out_NHD = varlen_attn(
        query_NHD,
        key_NKD,
        value_NKD,
        ends,
        ends,
        max(lengths),
        max(lengths),
        scale=size**-0.5 if scaling is None else scaling,
        # Tokens before and after its own that a token sees.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **GROUPED,
    )
    return out_NHD[..., :value_size].unsqueeze(0), None


def lay_out(states_1HND: Tensor, size: int) -> Tensor:
    """`[N, H, size]` as flash-attention reads it: 16 bytes at a time."""
    states_NHD = states_1HND[0].transpose(0, 1)
    if states_NHD.shape[-1] < size:
        return pad(states_NHD, (0, size - states_NHD.shape[-1]))
    steps = (states_NHD.storage_offset(), *states_NHD.stride()[:-1])
    aligned = states_NHD.stride(-1) == 1 and all(step % 8 == 0 for step in steps)
    return states_NHD if aligned else states_NHD.contiguous()


def attend_sdpa(
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KNE: Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> tuple[Tensor, None]:
    """Neighbouring sequences of equal length as one batch without a mask. A block-diagonal mask
    over the row would cost the square of its length."""
    grouped = key_1KND.shape[1] != query_1HND.shape[1]
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    # Not slices, each of whose gradients would be as long as the row.
    rows = (
        states.squeeze(0).split([length * count for length, count in runs], dim=1)
        for states in (query_1HND, key_1KND, value_1KNE)
    )
    parts = []
    for (length, count), states in zip(runs, zip(*rows, strict=True), strict=True):
        # [H, n L, D] -> [n, H, L, D]
        query, key, value = (part.unflatten(1, (count, length)).transpose(0, 1) for part in states)
        windowed = sliding_window is not None and length > sliding_window
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=window_mask(length, sliding_window, query.device) if windowed else None,
            is_causal=not windowed,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).unsqueeze(0), None


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True where a token may look: at itself and the `window - 1` tokens before it."""
    distance = torch.arange(length, device=device)
    distance = distance.unsqueeze(1) - distance.unsqueeze(0)
    return (distance >= 0) & (distance < window)
