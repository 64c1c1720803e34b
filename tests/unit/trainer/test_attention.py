"""Attention within each packed sample, and the models that it is refused for."""

import pytest
import torch
from tiny_models import MAMBA, MODELS, SMALL
from transformers import (
    AutoConfig,
    PreTrainedTokenizerBase,
)

from r1pipe.models.model import build_model
from r1pipe.trainer import attention
from r1pipe.trainer.attention import attend_packed
from r1pipe.trainer.policy import require_trainable
from r1pipe.utils.errors import UserError

LINEAR = ["linear_attention"] * 3 + ["full_attention"]
# Models of which a packed row would be wrong, and a word of the line that says why.
UNPACKABLE = {
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "Lfm2ShortConv|layers of conv"),
    "granitemoehybrid": ({"layer_types": LINEAR, **MAMBA}, "Mamba|linear_attention"),
    "qwen3_next": ({"layer_types": LINEAR, "num_experts": 4}, "DeltaNet|linear_attention"),
    "qwen3_5_text": ({"layer_types": LINEAR}, "DeltaNet|linear_attention"),
    "bamba": ({}, "Mixer|linear_attention"),
    "falcon_h1": ({}, "Mixer|hybrid"),
    "jamba": ({}, "Mixer|linear_attention"),
    "nemotron_h": ({}, "Block|Mixer|linear_attention"),
    "minimax": ({"layer_types": LINEAR, "num_local_experts": 4}, "Lightning|linear_attention"),
    "mamba2": ({"num_hidden_layers": 2}, "Mixer|linear_attention"),
    "recurrent_gemma": ({}, "layer 0"),
    "gemma3": ({}, "multimodal"),
    "llama4": ({}, "multimodal"),
    "bloom": ({}, "BloomBlock"),
    "bert": ({}, "is_causal=False"),
    "stablelm": ({}, "StableLmAttention"),
    "phimoe": ({"sliding_window": 8, "num_local_experts": 4}, "sliding_window of 8"),
    "doge": ({}, "attention_mask"),
    "gemma2": ({"final_logit_softcapping": None}, "softcap"),
    "gpt_oss": ({"num_local_experts": 4}, "s_aux"),
}


@pytest.mark.parametrize("by_name", [True, False], ids=["layer_types", "modules"])
@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_a_model_that_cannot_be_packed_is_refused(
    model_type: str, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its config alone, before there are weights; by what its layers do, too, whatever they are
    called there."""
    if not by_name:
        every = {"conv", "linear_attention", "hybrid", "moe", "mlp", *attention.ATTENTION_TYPES}
        monkeypatch.setattr(attention, "ATTENTION_TYPES", every)
    changes, words = UNPACKABLE[model_type]
    known = AutoConfig.for_model(model_type)
    # Multimodal and mamba-only configs as they are: without memory their size is no matter.
    sizes = {key: value for key, value in SMALL.items() if hasattr(known, key)}
    sizes = {} if model_type in ("gemma3", "llama4", "mamba2", "bamba", "jamba") else sizes
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    with pytest.raises(UserError, match=rf"^{model_type}\w*: .*({words})") as error:
        require_trainable(config, "sdpa")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_looking_at_a_model_leaves_its_config(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """It says which attention and which code of the experts the model runs: batched_mm, by which
    it is looked at, takes ten times as long."""
    config = build_model(MODELS[name], tokenizer, seed=0).config
    before = (config._attn_implementation, config._experts_implementation)
    require_trainable(config, "sdpa")
    assert (config._attn_implementation, config._experts_implementation) == before


def test_sliding_window_and_grouped_heads() -> None:
    torch.manual_seed(0)
    lengths, window = [6, 6, 3], 4
    query, key, value = (torch.randn(1, heads, 15, 8) for heads in (4, 2, 2))
    out, _ = attend_packed(
        None, query, key, value, None, sequence_lengths=lengths, scaling=0.3, sliding_window=window
    )
    row, column = torch.arange(15).unsqueeze(1), torch.arange(15).unsqueeze(0)
    owner = torch.tensor([0] * 6 + [1] * 6 + [2] * 3)
    seen = (owner.unsqueeze(1) == owner) & (column <= row) & (row - column < window)
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
