"""Configs that transformers refuses."""

import pytest

from r1pipe.doctor.model_config import make_config


def test_a_refused_value_is_one_line() -> None:
    """transformers tells it in two."""
    with pytest.raises(ValueError, match=r"^Validation error.*q_lora_rank.*expected int, got"):
        make_config({"model_type": "deepseek_v32", "q_lora_rank": None})
