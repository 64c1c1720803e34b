"""Experts on sorted tokens compute what transformers' own loop does."""

import pytest
import torch
from tiny_models import MODELS
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from r1pipe.models import experts

MIXTURES = ("deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss")


def make_config(model_type: str) -> PretrainedConfig:
    if model_type in MODELS:
        values = {**MODELS[model_type]}
        return AutoConfig.for_model(values.pop("model_type"), vocab_size=64, **values)
    small = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6}
    return AutoConfig.for_model(
        model_type, vocab_size=64, num_experts_per_tok=3, pad_token_id=0, **small, **heads
    )


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_output_and_gradients_are_those_of_the_loop(model_type: str, num_tokens: int) -> None:
    """With matrices in both orders, with biases; experts without a token have a gradient of 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    ids_1N = torch.randint(0, 64, (1, num_tokens))
    found = {}
    for way in ("eager", experts.NAME):
        model.set_experts_implementation(way)
        model.zero_grad()
        logits = model(input_ids=ids_1N, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[way] = (logits.detach(), gradients)
    torch.testing.assert_close(found[experts.NAME], found["eager"], atol=1e-5, rtol=1e-5)
    if num_tokens == 1:
        of_experts = next(g for name, g in gradients.items() if name.endswith("experts.down_proj"))
        assert any(not gradient.any() for gradient in of_experts)
