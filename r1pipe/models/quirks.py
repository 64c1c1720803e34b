"""Model quirks by model type, in one table. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Quirks:
    """What a model type needs beyond the defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    """Keys that vLLM reads from config.json and transformers does not declare, and defaults that
    are not transformers'."""
    cpu_engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's LLM on CPU."""


DEEPSEEK_CPU = {
    # vLLM's CPU rotary kernel mishandles the 3-D queries of DeepSeek's attention (log-prob errors
    # up to 5.6); its native PyTorch version is right.
    "cpu_engine": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}},
}

DEEPSEEK_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""Of DeepSeek-V3 and later, as vLLM calls it."""

QUIRKS: dict[str, Quirks] = {
    "deepseek_v2": Quirks(**DEEPSEEK_CPU),
    "deepseek_v3": Quirks(
        config={**DEEPSEEK_ROUTING, "num_mtp_layers": 0},
        **DEEPSEEK_CPU,
    ),
    "deepseek_v32": Quirks(config=DEEPSEEK_ROUTING, **DEEPSEEK_CPU),
}


def find_quirks(model_type: str) -> Quirks:
    return QUIRKS.get(model_type, Quirks())


MLA_HEADS = ((128, 64, 128), (192, 64, 256), (64, 64, 128), (256, 0, 256))
"""(qk_nope, qk_rope, v) head sizes with which vLLM's MLA can prefill on a GPU, in bf16."""


def has_mla(config: Any, device_type: str, dtype: str) -> bool:
    """Whether vLLM can compute this model's multi-head latent attention in the latent space. If
    not, it computes the same attention from expanded keys and values.

    CPU kernels need a latent of 512 + 64 or bf16, GPU kernels bf16 and certain head sizes. True
    for models without a latent.
    """
    if not getattr(config, "kv_lora_rank", None):
        return True
    heads = tuple(getattr(config, f"{n}_head_dim", 0) for n in ("qk_nope", "qk_rope", "v"))
    return device_type != "cpu" and dtype == "bfloat16" and heads in MLA_HEADS
