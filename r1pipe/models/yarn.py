"""YaRN (Peng et al. 2023, arXiv:2309.00071): rotary positions beyond those of pretraining, by
`rope_parameters` (or the older `rope_scaling`) of a model's config. Imports no torch.

transformers computes it in the trainer, vLLM in the sampler. Where they read the same keys
otherwise, the model is refused.
"""

import math
from typing import Any

from r1pipe.utils.errors import UserError

REQUIRED = {"factor", "original_max_position_embeddings"}
NUMBERS = REQUIRED | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
KNOWN = NUMBERS | {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"}


def check_yarn_keys(settings: dict[str, Any]) -> None:
    """Raises UserError for a new model's settings that transformers would read as another YaRN, or
    leave out, with a warning in its log."""
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) != "yarn":
        return
    if missing := sorted(REQUIRED - scaling.keys()):
        raise UserError(f"model: yarn needs {' and '.join(missing)}")
    if unknown := sorted(scaling.keys() - KNOWN):
        known = ", ".join(sorted(KNOWN))
        raise UserError(f'model: yarn has no "{unknown[0]}"; it has {known}')
    for key in sorted(scaling.keys() & NUMBERS):
        if not isinstance(scaling[key], int | float | None):
            raise UserError(f'model: {key} of yarn is "{scaling[key]}": give a number')


def find_yarn(config: Any) -> dict[str, Any] | None:
    """The parameters of a config, an object or the dict in config.json; None if it has no YaRN."""
    values = config if isinstance(config, dict) else vars(config)
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return scaling if scaling.get("rope_type", scaling.get("type")) == "yarn" else None


def check_yarn(name: str, config: Any, context: int) -> None:
    """Raises UserError if vLLM has not all positions of this context, or computes a model with MLA
    otherwise than transformers does."""
    yarn = find_yarn(config)
    if yarn is None:
        return
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]
    if context > factor * original:
        # Its kernels read on behind the table's end.
        raise UserError(
            f"{name}: a context of {context} tokens, and vLLM's table of YaRN's rotations ends at "
            f"{factor:g} x original_max_position_embeddings = {factor * original:g}: set "
            "engine.max_model_len"
        )
    if not getattr(config, "kv_lora_rank", None):
        return
    for key, value in {"attention_factor": None, "truncate": True}.items():
        if yarn.get(key, value) != value:
            raise UserError(
                f"{name}: {key} {yarn[key]} of YaRN is not computed by vLLM's {config.model_type}: "
                "sampler and trainer would disagree"
            )
    low, high = yarn.get("mscale"), yarn.get("mscale_all_dim")
    in_trainer = scale(factor, low) / scale(factor, high) if low and high else scale(factor, 1)
    in_vllm = scale(factor, 1 if low is None else low) / scale(factor, high or 0)
    if in_trainer != in_vllm:
        raise UserError(
            f"{name}: mscale {low} and mscale_all_dim {high} of YaRN scale the rotations by "
            f"{in_trainer:.3f} in the trainer and {in_vllm:.3f} in vLLM: give both or neither"
        )


def scale(factor: float, mscale: float) -> float:
    """The paper's eq. 22, times `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def describe_yarn(config: dict[str, Any]) -> str:
    """For a model's card; empty without YaRN."""
    yarn = find_yarn(config)
    if yarn is None:
        return ""
    context, original = (
        f"{number:,}"
        for number in (config["max_position_embeddings"], yarn["original_max_position_embeddings"])
    )
    return (
        f" Its context is {context} tokens, by YaRN with a factor of {yarn['factor']:g} over "
        f"{original}: transformers and vLLM apply it whatever the length."
    )
