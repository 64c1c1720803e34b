"""What cannot be grouped is refused in one line, before any weights are loaded."""

import re
from contextlib import nullcontext

import pytest
from tiny_models import MODELS
from transformers import AutoConfig

from r1pipe.trainer.expert_parallel import require_groups
from r1pipe.trainer.sequence_parallel import require_teams
from r1pipe.utils.errors import UserError


@pytest.mark.parametrize(
    ("model", "size", "processes", "words"),
    [
        ("deepseek_v3", 2, 4, None),
        ("qwen3", 1, 3, None),
        ("qwen3", 2, 4, "expert_parallel 2: a layer of the qwen3 has no experts"),
        ("qwen3_moe", 3, 3, "has 4 experts, which cannot be shared out evenly"),
        ("deepseek_v3", 4, 6, "6 processes cannot be grouped by 4: start as many with NPROC"),
        ("deepseek_v3", 2, 1, "1 process cannot be grouped by 2"),
    ],
)
def test_experts(model: str, size: int, processes: int, words: str | None) -> None:
    config = AutoConfig.for_model(**MODELS[model], vocab_size=100)
    with pytest.raises(UserError, match=re.escape(words)) if words else nullcontext():
        require_groups(config, size, processes)


@pytest.mark.parametrize(
    ("size", "processes", "attention", "words"),
    [
        (2, 4, "r1pipe_varlen", None),
        (4, 4, "r1pipe_auto", "sequence_parallel 4: 2 heads cannot be shared out evenly"),
        (2, 3, "r1pipe_auto", "3 processes cannot be grouped by 2"),
        (2, 2, "flash_attention_2", "attn_implementation: flash_attention_2: take auto"),
    ],
)
def test_teams(size: int, processes: int, attention: str, words: str | None) -> None:
    config = AutoConfig.for_model(**MODELS["llama"])
    with pytest.raises(UserError, match=re.escape(words)) if words else nullcontext():
        require_teams(config, attention, size, processes)
