"""What vLLM makes of our arguments on a Hopper GPU, as far as its code goes without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from r1pipe.rollout.vllm_args import require_moe_layers

pytestmark = pytest.mark.slow

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
TINY_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
DEEPSEEK_HEADS = {
    **TINY_DEEPSEEK,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
MODELS = {
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "tiny_deepseek": TINY_DEEPSEEK,
    "deepseek_heads": DEEPSEEK_HEADS,
}
LATENT = {"VLLM_MLA_DISABLE": "0"}
TWO_RANKS = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


def make_case(model: dict, dtype: str = "bfloat16", **changes: object) -> dict:
    case = {"model": model, "dtype": dtype, "routes": False, "sleep_modes": False}
    return {**case, "engine": {}, "environment": {}, **changes}


CASES = {
    f"{name} {dtype}": make_case(model, dtype, routes=model is not QWEN3)
    for name, model in MODELS.items()
    for dtype in ("bfloat16", "float32")
} | {
    "without our variable: tiny": make_case(TINY_DEEPSEEK, environment=LATENT),
    "without our variable: float32": make_case(DEEPSEEK_HEADS, "float32", environment=LATENT),
    "V1's runner": make_case(QWEN3_MOE, routes=True, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "settings": make_case(QWEN3, engine={"kv_cache_gib": 2, "max_num_seqs": 64}),
    "eager": make_case(QWEN3, engine={"enforce_eager": True}),
    "two ranks": make_case(
        QWEN3_MOE, routes=True, engine={"tensor_parallel_size": 2}, environment=TWO_RANKS
    ),
    "sleeping": make_case(QWEN3, engine={"sleep": 1}, sleep_modes=True),
    "sleeping, with routes": make_case(
        QWEN3_MOE, routes=True, engine={"sleep": 2}, sleep_modes=True
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case, from one process for all of them: the platform is chosen at import."""
    pytest.importorskip("vllm")
    cases = tmp_path_factory.mktemp("hopper") / "cases.json"
    cases.write_text(json.dumps(CASES))
    script = Path(__file__).with_name("hopper_engine.py")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    run = subprocess.run(
        [sys.executable, script, cases],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "TORCHDYNAMO_DISABLE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_model_has_kernels(answers: dict, name: str, dtype: str) -> None:
    """flash-attention 3 in bf16, Triton's in float32; attention over the latent only where vLLM has
    it; the experts by Triton, which a reload does not leave with old weights."""
    found = answers[f"{name} {dtype}"]
    assert found["dtype"] == f"torch.{dtype}"
    assert found["latent"] == (name == "deepseek_heads" and dtype == "bfloat16")
    if found["latent"]:
        assert (found["attention"], found["prefill"]) == (["FLASH_ATTN_MLA"], ["FLASH_ATTN"])
    elif dtype == "bfloat16":
        assert (found["attention"], found["flash"]) == (["FLASH_ATTN"], [3])
    else:
        assert found["attention"] == ["TRITON_ATTN"]
    assert found["experts"] == ([] if name == "qwen3" else ["TRITON"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("without our variable: tiny", "No valid MLA prefill backend"),
        ("without our variable: float32", "No valid attention backend"),
        ("V1's runner", "requires Model Runner V2"),
    ],
)
def test_vllm_refuses_what_we_do_not_ask_for(answers: dict, name: str, words: str) -> None:
    assert words in answers[name]["refused"]


@pytest.mark.parametrize("name", CASES)
def test_arguments_arrive(answers: dict, name: str) -> None:
    if name.startswith("without") or name == "V1's runner":
        return
    case, found = CASES[name], answers[name]
    assert found["logprobs_mode"] == "processed_logprobs"
    assert (found["v2"], found["routes"]) == (True, case["routes"])
    assert found["worker"] == "vllm.v1.worker.gpu_worker.Worker"
    # vLLM's defaults, on which sampler.py counts or which cost speed if they change.
    assert found["prefix_caching"]
    assert found["asynchronous"]
    assert found["num_batched_tokens"] == 16384
    assert found["sleep"] == ("sleep" in case["engine"])


def test_settings_arrive(answers: dict) -> None:
    assert (answers["settings"]["kv_bytes"], answers["settings"]["num_seqs"]) == (2 * 2**30, 64)
    # Decoding fits a graph whatever the number of sequences.
    assert answers["settings"]["largest_graph"] >= 64
    assert answers["qwen3 bfloat16"]["graphs"] == "FULL_AND_PIECEWISE"
    assert answers["eager"]["graphs"] == "NONE"


def test_ranks_share_an_engine_on_the_trainers_process_group(answers: dict) -> None:
    assert answers["two ranks"]["executor"] == "ExecutorWithExternalLauncher"
    assert answers["qwen3 bfloat16"]["executor"] == "UniProcExecutor"


@pytest.mark.parametrize("name", ["qwen3_moe", "tiny_deepseek", "deepseek_heads"])
def test_routes_of_a_layer_stand_where_the_sampler_reads_them(answers: dict, name: str) -> None:
    """A row for each decoder layer, dense ones included."""
    found = answers[f"{name} bfloat16"]
    config = AutoConfig.for_model(**MODELS[name])
    assert found["layers_with_routes"] == require_moe_layers(config)
    assert found["shape_of_routes"] == [config.num_hidden_layers, config.num_experts_per_tok]


def test_an_engine_with_routes_sleeps_in_one_mode(answers: dict) -> None:
    """The one in which `Sampler.sleep` asks for it."""
    assert answers["sleeping"]["sleep_modes"] == ["abort", "keep"]
    assert answers["sleeping, with routes"]["sleep_modes"] == ["keep"]
