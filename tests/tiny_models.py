"""Models of a few thousand weights, problems and rollouts, for tests of the trainer."""

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import encode_completion, encode_prompt
from r1pipe.models.weights import save_checkpoint
from r1pipe.trainer.packed import PackedTrainer
from r1pipe.types import Problem, Rollout

TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
MODELS = {
    "qwen3": TINY,
    "llama": {**TINY, "model_type": "llama", "num_key_value_heads": 1},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": {
        **DEEPSEEK,
        "model_type": "deepseek_v32",
        "q_lora_rank": 20,
        "index_topk": 6,
        "index_n_heads": 16,
        "index_head_dim": 12,
    },
    "qwen3_moe": {
        **TINY,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
"""One layer, for tests of files."""
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
"""Sizes that most architectures know by these names."""
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 50}))


def make_rollout(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    max_length: int,
    logprob: float = -1.0,
    finish_reason: str = "stop",
) -> Rollout:
    """The beginning of the problem's solution, as if it had been sampled."""
    completion = encode_completion(tokenizer, problem.solution)[:max_length]
    return Rollout(
        problem_id=problem.id,
        sample=0,
        prompt_ids=encode_prompt(tokenizer, problem.prompt),
        completion_ids=completion,
        logprobs=[logprob] * len(completion),
        completion="",
        finish_reason=finish_reason,
    )


def save_llama(
    folder: Path, tokenizer: PreTrainedTokenizerBase, end_ids: list[int] | None = None
) -> Path:
    model = build_model(LLAMA, tokenizer, 0)
    if end_ids:
        model.generation_config.eos_token_id = end_ids
    save_checkpoint(model, tokenizer, folder)
    return folder


def change_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def watch_gradients(trainer: PackedTrainer) -> dict[str, Tensor]:
    """Gets the gradients of each optimizer step."""
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        named = trainer.model.named_parameters()
        seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(look)
    return seen
