"""Routing replay: the distance between sampler and trainer with it and without it.

    .venv/bin/python benchmarks/routing_replay.py

Tiny models with random weights sample; the trainer computes the log-probabilities of the same
tokens as in training, with its own routes and with the sampler's. In bfloat16 the trainer's layers
are bf16, with autocast for comparison. Routers are float32 in both, or transformers' own with
--own-routers. Prints a Markdown table.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from r1pipe.config.base import ProblemSet, Sampling
from r1pipe.config.recipe import Engine
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model, fast_training_kernels, load_model, pick_device
from r1pipe.models.routing import find_routers, pack_routes, replaying, route_in_float32
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.pipeline import silence_libraries
from r1pipe.rollout.engines import Engines
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout

COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
MODELS = {
    "DeepSeek-V3": {
        **COMMON,
        "model_type": "deepseek_v3",
        "n_routed_experts": 32,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_mtp_layers": 0,
    },
    "Qwen3-MoE": {
        **COMMON,
        "model_type": "qwen3_moe",
        "num_experts": 32,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
}
COLUMNS = (
    "model",
    "dtype",
    "layers",
    "replay",
    "differing routes",
    "mean abs dlogp",
    "max abs dlogp",
    "KL (k3)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--own-routers", action="store_true")
    options = parser.parse_args()
    device = pick_device(options.device)
    silence_libraries()
    rows = []
    for dtype in options.dtypes:
        engines = Engines(Engine(max_model_len=128, kv_cache_gib=0.25), dtype, device)
        try:
            for name in options.models:
                rows += compare(name, MODELS[name], engines, options.own_routers)
        finally:
            engines.close()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        numbers = [f"{row.differing_routes:.2%}", *(f"{value:.1e}" for value in row[5:])]
        print("| " + " | ".join([*row[:4], *numbers]) + " |")


class Figures(NamedTuple):
    """A row of the table. `differing_routes`: share of (token, layer) pairs with different experts;
    `mean_diff`, `max_diff`: of |trainer - sampler| log-probability; `kl`: KL(sampler || trainer) by
    Schulman's k3 estimator."""

    model: str
    dtype: str
    layers: str
    replay: str
    differing_routes: float
    mean_diff: float
    max_diff: float
    kl: float


def compare(name: str, settings: dict, engines: Engines, own_routers: bool) -> list[Figures]:
    """One model, replay off and on."""
    problems = load_problems(ProblemSet(recipe="arithmetic", options={"size": 64}))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(settings, tokenizer, seed=0)
        for router in find_routers(model):
            if router.bias is not None:
                router.bias.normal_(std=0.1)
        save_checkpoint(model, tokenizer, Path(folder))
        sampler = engines.open(folder, with_routes=True)
        model = load_model(folder, engines.device)
    rollouts = sampler.generate(
        problems, 4, Sampling(max_completion_length=48), (0,), with_routes=True
    )
    model.eval()
    models = {"float32": model}
    if engines.dtype == "bfloat16":
        models = {"autocast": model, "bf16": in_bf16(model)}
    rows = []
    for layers, model in models.items():
        if engines.dtype == "bfloat16" and not own_routers:
            route_in_float32(model)
        for replay in (False, True):
            figures = measure(Policy(model), rollouts, layers, replay)
            rows.append(Figures(name, engines.dtype, layers, "on" if replay else "off", *figures))
    return rows


def in_bf16(model: PreTrainedModel) -> PreTrainedModel:
    """A copy like a gathered sharded layer: parameters in bf16, buffers unchanged."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@torch.no_grad()
def measure(policy: Policy, rollouts: list[Rollout], layers: str, replay: bool) -> tuple:
    """The numbers of `Figures`."""
    device = policy.model.device
    batch = pack([Sample(rollout, 0.0) for rollout in rollouts], device)
    routes_NLK = pack_routes([s.rollout.routes for s in batch.samples], device).long()
    taken: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_hook(keep_experts(taken))
        for router in find_routers(policy.model)
    ]
    with (
        fast_training_kernels(device, layers),
        torch.autocast(device.type, torch.bfloat16, enabled=layers == "autocast"),
        replaying(policy.model, routes_NLK if replay else None),
    ):
        logprobs_C = policy(batch, 1.0).logprobs_C
    for hook in hooks:
        hook.remove()
    read_N = routes_NLK[:, 0, 0] >= 0
    taken_NLK = torch.stack(taken, dim=1)[read_N].sort(-1).values
    differs_NL = (taken_NLK != routes_NLK[read_N].sort(-1).values).any(-1)
    ratio_C = (logprobs_C - batch.sampler_logprobs_C).double()
    k3_C = ratio_C.exp() - 1 - ratio_C
    return (
        float(differs_NL.double().mean()),
        float(ratio_C.abs().mean()),
        float(ratio_C.abs().max()),
        float(k3_C.mean()),
    )


def keep_experts(taken: list[torch.Tensor]) -> Callable:
    def hook(module: torch.nn.Module, args: tuple, output: tuple) -> None:
        taken.append(output[2])

    return hook


if __name__ == "__main__":
    main()
