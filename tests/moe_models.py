"""Tiny mixtures of experts, one of every architecture in models/routing.py's table."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r1pipe.models.routing import (
    find_routers,
)

COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
DEEPSEEK = {
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "n_shared_experts": 1,
}
SPECIAL = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": {**DEEPSEEK, "q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 24},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    "qwen2_moe": {"norm_topk_prob": True, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False},
}


def make_moe_model(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    values = {**COMMON, **EXPERTS, **SPECIAL.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    for router in find_routers(model):
        if router.bias is not None:
            router.bias.normal_(std=0.3)
    return model.eval()


def chosen_experts(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """The routes `[N, L, K]` of a plain forward, without routing.py."""
    seen: list[Tensor] = []
    handles = [
        r.module.register_forward_hook(lambda module, args, output: seen.append(output[2]))
        for r in find_routers(model)
    ]
    with torch.no_grad():
        model(input_ids=ids_BL)
    for handle in handles:
        handle.remove()
    return torch.stack(seen, dim=1)


def other_experts(routes_NLK: Tensor) -> Tensor:
    """Routes that mostly share no expert with the given ones."""
    return ((routes_NLK + 3) % 8).sort(-1).values


def number_padded(attention_mask: Tensor) -> Tensor:
    """Sequence number of each token `[N]` of a mask `[rows, columns]`; -1 for padding."""
    rows = torch.arange(len(attention_mask), device=attention_mask.device).unsqueeze(1)
    return torch.where(attention_mask.bool(), rows, -1).flatten()
