"""The one table of model quirks: what a model type needs beyond the defaults. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Quirks:
    """What a model type needs beyond the defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    """Keys that vLLM reads from config.json and transformers does not declare."""
    cpu_engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's LLM on CPU."""
    cpu_environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of vLLM on CPU."""


DEEPSEEK_CPU = {
    # vLLM's CPU rotary kernel mishandles the 3-D queries of DeepSeek's attention (log-prob errors
    # up to 5.6); its native PyTorch version is right.
    "cpu_engine": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}},
    # The CPU's MLA kernels want a latent of 512 + 64 or bf16; without MLA vLLM computes the same
    # attention from the expanded keys and values.
    "cpu_environment": {"VLLM_MLA_DISABLE": "1"},
}

QUIRKS: dict[str, Quirks] = {
    "deepseek_v2": Quirks(**DEEPSEEK_CPU),
    "deepseek_v3": Quirks(
        config={"topk_method": "noaux_tc", "scoring_func": "sigmoid"}, **DEEPSEEK_CPU
    ),
}


def find_quirks(model_type: str) -> Quirks:
    return QUIRKS.get(model_type, Quirks())
