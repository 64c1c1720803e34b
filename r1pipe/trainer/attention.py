"""Attention within each sample of a packed row, on CPU and with flash-attention."""

import inspect
from collections.abc import Collection
from copy import deepcopy
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r1pipe.models.model import find_layers, is_moe
from r1pipe.utils.errors import UserError

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Layer types of a config whose attention can be kept within sequences."""
COMPUTED = ("sequence_lengths", "scaling", "dropout", "sliding_window", "position_ids")
"""Keyword arguments of an attention function that `attend_packed` handles or may ignore."""

PACKED_SDPA, PROBE = "r1pipe_packed_sdpa", "r1pipe_probe"
_packable: set[tuple[str, str]] = set()
"""What `require_packable` has accepted: the doctor and then the trainer ask."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make the model attend within sequences, by its configured implementation."""
    if not is_flash(model.config._attn_implementation):
        model.set_attn_implementation(PACKED_SDPA)


def require_packable(config: PretrainedConfig, attn_implementation: str) -> None:
    """Raises UserError for a model that would mix the sequences of a row by more than its
    attention, which alone is cut at the borders.

    Not by a list: the model reads a row of two sequences, without memory for its weights. Every
    layer must call the attention that it was given, and every module that takes the cache, because
    it keeps state of earlier tokens, must be such an attention or contain one.
    """
    key = (config.to_json_string(), attn_implementation)
    if key in _packable:
        return
    name = config.model_type
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
            f"{name}: its attention takes {', '.join(sorted(extra))}, which sdpa has not: set "
            "attn_implementation to flash_attention_2, if the model has that"
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


def attention_arguments(model: PreTrainedModel, lengths: list[int]) -> dict:
    """Keyword arguments of the model's forward that tell the attention where sequences end."""
    if model.config._attn_implementation == PACKED_SDPA:
        return {"sequence_lengths": lengths}
    ends = torch.tensor([0, *lengths], device=model.device).cumsum(0, dtype=torch.int32)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def attend_packed(
    module: nn.Module,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KNE: Tensor,
    attention_mask: None,
    *,
    sequence_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention within each of the row's sequences: `[1, N, H, E]`. The parameters are those
    of transformers' attention functions.

    Neighbouring sequences of equal length are computed as one batch without a mask. A
    block-diagonal mask over the row would cost the square of its length.
    """
    grouped = key_1KND.shape[1] != query_1HND.shape[1]
    if sequence_lengths is None:
        raise UserError(
            "the model's forward does not pass our arguments to its attention, which this trainer "
            "needs to keep it within sequences"
        )
    parts, start = [], 0
    for length, run in groupby(sequence_lengths):
        count = len(list(run))
        # [H, n L, D] -> [n, H, L, D]
        query, key, value = (
            states[0, :, start : start + count * length]
            .unflatten(1, (count, length))
            .transpose(0, 1)
            for states in (query_1HND, key_1KND, value_1KNE)
        )
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
        start += count * length
    return torch.cat(parts).unsqueeze(0), None


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True where a token may look: at itself and the `window - 1` tokens before it."""
    distance = torch.arange(length, device=device)
    distance = distance.unsqueeze(1) - distance.unsqueeze(0)
    return (distance >= 0) & (distance < window)
