"""What an engine is asked for, and what is refused before one starts, on machines that are not at
hand."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faked_gpu import fake_gpu
from transformers import AutoConfig

from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Engine
from r1pipe.doctor.model_config import find_config
from r1pipe.models.quirks import MLA_HEADS, has_mla
from r1pipe.rollout.vllm_args import CPU_HEAD_SIZES, check_engine, engine_arguments, set_environment
from r1pipe.utils.errors import UserError

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
R1 = {"model_type": "deepseek_v3"}
"""The defaults are DeepSeek-R1's sizes."""
V32 = {"model_type": "deepseek_v32"}
"""DeepSeek-V3.2's."""
KEYS = ("VLLM_MLA_DISABLE", "TRITON_F32_DEFAULT", "VLLM_USE_V2_MODEL_RUNNER")


def make_config(settings: dict) -> object:
    return AutoConfig.for_model(**settings)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own, put back at the end."""
    monkeypatch.setattr("r1pipe.rollout.vllm_args._own_variables", set())
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in KEYS})


def vllm_file(name: str) -> str:
    """The text of one of vLLM's, without importing it: some need a GPU."""
    return (Path(find_spec("vllm").origin).parent / name).read_text()


def test_sizes_are_those_of_vllm() -> None:
    found = re.search(
        r"def get_supported_head_sizes.*?return \[(.*?)\]",
        vllm_file("v1/attention/backends/cpu_attn.py"),
        re.DOTALL,
    )
    assert tuple(map(int, found[1].split(","))) == CPU_HEAD_SIZES
    heads = re.findall(
        r"qk_nope_head_dim=(\d+),\s*qk_rope_head_dim=(\d+),\s*v_head_dim=(\d+)",
        vllm_file("v1/attention/backends/mla/prefill/flash_attn.py"),
    )
    assert {tuple(map(int, sizes)) for sizes in heads} == set(MLA_HEADS)
    for backend in ("triton_mla", "flashmla", "flashattn_mla", "flashinfer_mla"):
        text = vllm_file(f"v1/attention/backends/mla/{backend}.py")
        types = re.search(r"supported_dtypes.*?= \[(.*?)\]", text, re.DOTALL)[1]
        assert "float32" not in types, f"{backend} would do: see has_mla"
    text = vllm_file("v1/attention/backends/triton_attn.py")
    assert "float32" in re.search(r"supported_dtypes.*?= \[(.*?)\]", text, re.DOTALL)[1]


# (policy, drafter, engine, device, words of the refusal)
DRAFTERS = [
    (LLAMA, {**LLAMA, "num_hidden_layers": 2}, {}, "cpu", None),
    (LLAMA, {**LLAMA, "vocab_size": 9}, {}, "cuda", "has 9 tokens, m 32000"),
    (R1, {**R1, "num_hidden_layers": 2}, {}, "cuda", "of another architecture"),
    (LLAMA, {**LLAMA, "hidden_size": 32}, {}, "cpu", "is 16; on CPU"),
    (LLAMA, {**LLAMA, "hidden_size": 32}, {}, "cuda", None),
    (LLAMA, {**LLAMA, "max_position_embeddings": 128}, {}, "cpu", "a context of 128 tokens"),
    (
        LLAMA,
        {**LLAMA, "max_position_embeddings": 128},
        {"max_model_len": 128},
        "cpu",
        None,
    ),
]


@pytest.mark.parametrize(("model", "drafter", "engine", "device", "words"), DRAFTERS)
def test_drafters(
    model: dict, drafter: dict, engine: dict, device: str, words: str | None, tmp_path: Path
) -> None:
    make_config(drafter).save_pretrained(tmp_path)
    speculative = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2}
    settings = Engine(**engine, speculative=speculative)
    if words is None:
        check_engine("m", make_config(model), settings, device, 1)
        arguments = engine_arguments(make_config(model), settings, "float32", CPU)
        assert arguments["speculative_config"] == speculative
    else:
        with pytest.raises(UserError, match=re.escape(words)):
            check_engine("m", make_config(model), settings, device, 1)


def test_a_drafter_that_is_not_here(tmp_path: Path) -> None:
    speculative = {"method": "draft_model", "num_speculative_tokens": 2}
    settings = Engine(speculative={**speculative, "model": str(tmp_path / "grpo")})
    with pytest.raises(UserError, match=r"^engine.speculative.model: /.*/grpo: no model config"):
        check_engine("m", make_config(LLAMA), settings, "cpu", 1)


# (model, whether it drafts by its module)
DRAFTS = [
    ({**R1, "num_mtp_layers": 0}, False),
    ({**R1, "num_mtp_layers": 1}, True),
    ({**V32, "num_nextn_predict_layers": 1}, False),
    ({"model_type": "glm4_moe", "num_mtp_layers": 1, "head_dim": 64}, False),
]


@pytest.mark.parametrize(("model", "drafts"), DRAFTS)
def test_only_a_model_with_the_module_drafts_by_it(model: dict, drafts: bool) -> None:
    """Not one whose config alone counts it: the trainer has deepseek_v3's."""
    config = make_config(model)
    speculative = {"method": "mtp", "num_speculative_tokens": 2}
    settings = Engine(max_model_len=128, speculative=speculative)
    check_engine("m", config, settings, "cpu", 1)
    arguments = engine_arguments(config, settings, "float32", CPU)
    assert arguments.get("speculative_config") == (speculative if drafts else None)


# (recipe, stage): what `make demo`, and the other laptop recipes with DeepSeek-V3, start from.
LAPTOP = [("demo", "random"), ("r1_tiny", "random"), ("r1_zero_tiny", "random")]


@pytest.mark.parametrize(("name", "stage"), LAPTOP, ids=lambda part: part)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_laptop_recipes_have_an_attention_everywhere(
    name: str, stage: str, device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No backend of a GPU computes MLA in float32; Triton's attention computes it in full only if
    told so."""
    device = fake_gpu(monkeypatch) if device_type == "cuda" else CPU
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    config = find_config(stage, recipe)
    check_engine(stage, config, recipe.engine, device_type, num_processes=1, trains=True)
    set_environment(config, device, recipe.dtype)
    assert os.environ["VLLM_MLA_DISABLE"] == "1"
    assert os.environ.get("TRITON_F32_DEFAULT") == ("ieee" if device_type == "cuda" else None)
    arguments = engine_arguments(config, recipe.engine, recipe.dtype, device)
    assert arguments["dtype"] == "float32"
    assert arguments["enforce_eager"] == (device_type == "cpu")


@pytest.mark.parametrize(
    ("settings", "device_type", "dtype", "expected"),
    [
        (R1, "cuda", "bfloat16", True),
        (R1, "cuda", "float32", False),
        (R1, "cpu", "bfloat16", False),
        ({**R1, "qk_nope_head_dim": 16}, "cuda", "bfloat16", False),
        (LLAMA, "cuda", "float32", True),
    ],
)
def test_where_attention_is_latent(
    settings: dict, device_type: str, dtype: str, expected: bool
) -> None:
    assert has_mla(make_config(settings), device_type, dtype) == expected


# (stage of the demo, engine, settings of its stages, device) -> level
LEVELS = [
    ("grpo", {}, [], "cuda", 1),
    ("distill", {}, [], "cuda", 1),
    ("grpo", {"sleep": 2}, [], "cuda", 2),
    ("grpo", {"sleep": 0}, [], "cuda", 0),
    ("grpo", {}, ["stages.grpo.max_staleness=1"], "cuda", 0),
    ("sft", {"sleep": 2}, [], "cuda", 0),
    ("eval", {"sleep": 2}, [], "cuda", 0),
    ("grpo", {}, [], "cpu", 0),
]


@pytest.mark.parametrize(("stage", "engine", "settings", "device_type", "level"), LEVELS)
def test_where_the_engine_sleeps(
    stage: str, engine: dict, settings: list[str], device_type: str, level: int
) -> None:
    """Where the stage trains on its samples, and waits for them."""
    settings = [*settings, *(f"engine.{key}={value}" for key, value in engine.items())]
    recipe = load_recipe(ROOT / "configs" / "demo.yaml", settings)
    assert recipe.sleep_level(recipe.stage(stage), device_type) == level


@pytest.mark.parametrize("level", [None, 0, 1, 2])
def test_vllm_is_asked_for_sleep_on_cuda_alone(level: int | None) -> None:
    """On CPU it would refuse to start."""
    config, settings = make_config(LLAMA), Engine(sleep=level)
    on_gpu, on_cpu = (
        engine_arguments(config, settings, "bfloat16", torch.device(name))
        for name in ("cuda", "cpu")
    )
    assert on_gpu.get("enable_sleep_mode", False) == bool(level)
    assert "enable_sleep_mode" not in on_cpu


def test_vllm_quantizes_where_it_is_asked_to() -> None:
    config, gpu = make_config(LLAMA), torch.device("cuda")
    for settings in (Engine(), Engine(quantization="fp8_per_block")):
        arguments = engine_arguments(config, settings, "bfloat16", gpu)
        assert arguments.get("quantization") == settings.quantization
    text = vllm_file("model_executor/layers/quantization/__init__.py")
    assert '"fp8_per_block"' in re.search(r"QuantizationMethods = Literal\[(.*?)\]", text, re.S)[1]


def test_an_engine_takes_back_what_the_one_before_it_needed() -> None:
    """Else the second model would be computed by the first one's rule."""
    gpu = torch.device("cuda", 0)
    set_environment(make_config({**R1, "v_head_dim": 32}), gpu, "bfloat16", with_routes=True)
    assert [os.environ.get(key) for key in KEYS] == ["1", None, "1"]
    set_environment(make_config(R1), gpu, "bfloat16")
    assert [os.environ.get(key) for key in KEYS] == [None, None, None]
    os.environ["VLLM_MLA_DISABLE"] = "0"
    set_environment(make_config(R1), gpu, "float32")
    assert [os.environ.get(key) for key in KEYS] == ["0", "ieee", None]
    set_environment(make_config(R1), gpu, "bfloat16")
    assert os.environ["VLLM_MLA_DISABLE"] == "0", "the user's own"


def test_functions_decorated_before_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's, where something imported it before our engine was opened."""

    def fail(graph: object, inputs: object) -> None:
        raise AssertionError("compiled")

    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    double = torch.compile(lambda x: x + x, backend=fail)
    envs = SimpleNamespace(disable_envs_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    with torch.compiler.set_stance("default"):  # put back at the end
        set_environment(make_config(LLAMA), CPU, "float32")
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
        assert double(torch.ones(1)) == 2


def compress(weights: int, activations: int | None) -> dict:
    """A config as llm-compressor writes it; bits."""
    inputs = activations and {"num_bits": activations, "type": "int", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {"num_bits": weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
W8A8, W4A16 = compress(8, 8), compress(4, None)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# (model, engine, device, processes, trains) -> words of the refusal, or None
REFUSALS = [
    (LLAMA, {}, "cpu", 1, True, None),
    ({**LLAMA, "num_attention_heads": 4}, {}, "cpu", 1, False, "m: head_dim is 16; on CPU"),
    (
        {**LLAMA, "model_type": "qwen2", "num_attention_heads": 4},
        {},
        "cpu",
        1,
        False,
        "heads is 16",
    ),
    ({**LLAMA, "num_attention_heads": 4}, {}, "cuda", 1, False, None),
    ({**LLAMA, "head_dim": 48}, {}, "cpu", 1, False, "m: head_dim is 48; on CPU"),
    ({**LLAMA, "model_type": "gemma3_text", "head_dim": 20}, {}, "cpu", 1, False, "is 20"),
    ({**R1, "qk_nope_head_dim": 20}, {}, "cpu", 1, False, "qk_rope_head_dim is 84"),
    (LLAMA, {"max_model_len": 256}, "cpu", 1, False, None),
    (LLAMA, {"max_model_len": 4096}, "cpu", 1, False, "4096 is more than the context of m, 256"),
    (
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"max_model_len": 1024},
        "cpu",
        1,
        False,
        None,
    ),
    # max_position_embeddings has YaRN's factor already, to vLLM too.
    (
        {**LLAMA, "rope_parameters": {**YARN, "original_max_position_embeddings": 256}},
        {"max_model_len": 1024},
        "cpu",
        1,
        False,
        "1024 is more than the context of m, 256",
    ),
    ({**LLAMA, "rope_parameters": YARN}, {}, "cpu", 1, False, "256 tokens, and vLLM's table"),
    ({**LLAMA, "rope_parameters": YARN}, {"max_model_len": 128}, "cpu", 1, False, None),
    (
        {**R1, "rope_parameters": {**YARN, "factor": 9999.0, "mscale_all_dim": 1.0}},
        {},
        "cuda",
        1,
        False,
        "by 1.921 in the trainer and 1.000 in vLLM",
    ),
    (V32, {"max_model_len": 2048}, "cpu", 1, True, None),
    (V32, {"max_model_len": 2049}, "cpu", 1, True, "max_model_len 2049: m is a deepseek_v32, of"),
    (
        V32,
        {},
        "cpu",
        1,
        True,
        "max_model_len 163840: m is a deepseek_v32, of which vLLM can sample",
    ),
    (LLAMA, {"tensor_parallel_size": 2}, "cuda", 4, True, None),
    (LLAMA, {"tensor_parallel_size": 2}, "cuda", 3, False, "3 processes cannot be grouped by 2"),
    (LLAMA, {"tensor_parallel_size": 2}, "cuda", 1, True, "1 process cannot be grouped by 2"),
    (LLAMA, {"tensor_parallel_size": 2}, "cuda", 1, False, None),
    (LLAMA, {"tensor_parallel_size": 4}, "cuda", 4, True, "the 2 attention heads of m"),
    (LLAMA, {"quantization": "fp8_per_block"}, "cpu", 1, True, "vLLM has no FP8 on CPU"),
    (LLAMA, {"quantization": "fp8_per_block"}, "cuda", 1, True, None),
    ({**LLAMA, "quantization_config": FP8}, {}, "cpu", 1, False, "m: its weights are in FP8"),
    ({**LLAMA, "quantization_config": W8A8}, {}, "cpu", 1, False, "computes wrongly on CPU"),
    ({**LLAMA, "quantization_config": W8A8}, {}, "cuda", 1, False, None),
    ({**LLAMA, "quantization_config": W4A16}, {}, "cpu", 1, False, None),
]


# (changes of the model, compute capability) -> whether vLLM's sparse attention is out of reach
SPARSE = [
    ({}, (9, 0), False),
    ({}, (10, 0), False),
    ({}, (8, 9), True),
    ({"index_head_dim": 64}, (9, 0), True),
]


@pytest.mark.parametrize(("changes", "capability", "dense"), SPARSE)
def test_where_sparse_attention_is_sampled(
    changes: dict, capability: tuple[int, int], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    config = make_config({**V32, **changes})
    arguments = engine_arguments(config, Engine(max_model_len=128), "bfloat16", gpu)
    assert ("hf_overrides" in arguments) == dense
    check_engine("m", config, Engine(max_model_len=2048 + (not dense)), "cuda", 1)


@pytest.mark.parametrize(("model", "engine", "device", "count", "trains", "words"), REFUSALS)
def test_refused_before_an_engine_starts(
    model: dict, engine: dict, device: str, count: int, trains: bool, words: str | None
) -> None:
    def check() -> None:
        check_engine("m", make_config(model), Engine(**engine), device, count, trains)

    if words is None:
        check()
    else:
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            check()
        assert "\n" not in str(caught.value)
