"""The memory estimate against what is allocated, and what it says of a recipe."""

import re
from pathlib import Path

import pytest
import torch
from grpo_settings import make_grpo, make_on_policy_distill
from tiny_models import MODELS, PROBLEMS
from transformers import AutoConfig, PreTrainedModel

from r1pipe.config.base import Stage
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Engine, SamplerPlace
from r1pipe.doctor.memory import Devices, estimate_shape, estimate_stage
from r1pipe.doctor.model_config import find_stage_config
from r1pipe.models.adapter import NewAdapter
from r1pipe.models.model import build_model
from r1pipe.models.mtp import find_mtp_layer
from r1pipe.models.shape import GIB, Shape
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy, compute_hidden, compute_mtp_hidden
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import format_size

ROOT = Path(__file__).parents[3]
TOLERANCE = 1 / 3
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}


QWEN2_MATH = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QWEN2_MATH_7B = {
    **QWEN2_MATH,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",  # whose sizes are transformers' defaults
    "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def make_model(name: str, **changes: int) -> PreTrainedModel:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    wide = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    model = build_model({**MODELS[name], **wide, **changes}, tokenizer, 0)
    model.set_experts_implementation("eager")
    return model


def make_samples(num_tokens: int) -> list[Sample]:
    rollout = Rollout("", 0, [1] * 56, [2] * 8, [-1.0] * 8, "", "stop")
    return [Sample(rollout, 1.0) for _ in range(num_tokens // 64)]


def measure_activations(policy: Policy, num_tokens: int) -> int:
    """Bytes that autograd keeps of one forward to the last hidden state, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = pack(make_samples(num_tokens), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_ND = compute_hidden(policy.model, batch)
        if policy.mtp:
            compute_mtp_hidden(policy.model, batch, hidden_ND, detached=False)
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_activations(name: str, dtype: torch.dtype) -> None:
    """bf16 as in sharded layers, which are put together in it, and not by autocast."""
    model = make_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    shape, policy, size = Shape.of(model.config), Policy(model), dtype.itemsize
    whole = measure_activations(policy, 512)
    estimate = shape.activations(512, size, checkpointing=False)
    assert estimate == pytest.approx(whole, rel=TOLERANCE)

    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # In the backward pass one layer more is there.
    kept = measure_activations(policy, 512) + whole / 4
    estimate = shape.activations(512, size, checkpointing=True)
    assert estimate == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_the_prediction_layer(checkpointing: bool) -> None:
    model = make_model("deepseek_v3", num_mtp_layers=1)
    shape, policy = Shape.of(model.config), Policy(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept, estimates = [], []
    for policy.mtp in (None, "joint"):
        kept.append(measure_activations(policy, 512))
        predicting = policy.mtp is not None
        estimates.append(shape.activations(512, 4, checkpointing, predicting=predicting))
    assert estimates[1] - estimates[0] == pytest.approx(kept[1] - kept[0], rel=TOLERANCE)


@pytest.mark.parametrize("draft", ["mtp", "draft_model", None])
def test_the_drafter_counts(draft: str | None, tmp_path: Path) -> None:
    """Its weights, and its keys and values; a prediction layer that nobody drafts with is not
    loaded."""
    model, drafter = make_model("deepseek_v3", num_mtp_layers=1), make_model("qwen3")
    drafter.config.save_pretrained(tmp_path)
    values = {"method": draft, "num_speculative_tokens": 1}
    values |= {"model": str(tmp_path)} if draft == "draft_model" else {}
    engine = Engine(kv_cache_gib=1e-7, speculative=values if draft else None)
    recipe = load_recipe(ROOT / "configs" / "demo.yaml").model_copy(update={"engine": engine})
    shape, other = Shape.of(model.config), Shape.of(drafter.config)
    estimate = estimate_shape(make_grpo(), recipe, shape, Devices(1, GIB, is_gpu=False))
    layer = sum(p.numel() for p in find_mtp_layer(model).parameters())
    more = {"mtp": layer, "draft_model": other.parameters, None: 0}[draft]
    assert estimate.parts["vLLM"] == 4 * (shape.parameters - layer + more)
    kv_bytes = shape.kv_bytes_per_token(4, 1)
    more = {"mtp": kv_bytes / 4, "draft_model": other.kv_bytes_per_token(4, 1), None: 0}[draft]
    needed = format_size(shape.config.max_position_embeddings * (kv_bytes + more))
    assert f"needs {needed} for one sequence" in estimate.problems[0]


def test_weights_gradients_and_optimizer() -> None:
    recipe = load_recipe(ROOT / "configs" / "demo.yaml")
    model, settings = make_model("deepseek_v3"), make_grpo(beta=0.1)
    parts = estimate_shape(settings, recipe, Shape.of(model.config), Devices(1, GIB)).parts
    updater = GrpoUpdater(model, make_model("deepseek_v3"), settings, dtype="float32", seed=0)
    kept: dict[str, int] = {}
    updater.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: kept.update(
            gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        )
    )
    updater.step(make_samples(256), 1, lambda metrics: None)
    kept["weights"] = sum(p.nbytes for p in model.parameters())
    kept["reference"] = sum(p.nbytes for p in updater.reference.parameters())
    moments = [state[key] for state in updater.optimizer.state.values() for key in state]
    kept["optimizer"] = sum(m.nbytes for m in moments if m.ndim)
    for name, size in kept.items():
        assert parts[name] == size, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_an_adapter_beside_a_frozen_base(name: str, dtype: str, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "configs" / "demo.yaml", [f"dtype={dtype}"])
    model, settings = make_model(name), make_grpo(beta=0.1, adapter={"r": 4})
    parts = estimate_shape(settings, recipe, Shape.of(model.config), Devices(1, GIB)).parts
    model.save_pretrained(tmp_path)
    adapter = NewAdapter(settings.adapter, 0)
    place = (str(tmp_path), torch.device("cpu"), "sdpa", Policy)
    policy = load_sharded(*place, dtype=dtype, adapter=adapter)
    updater = GrpoUpdater(policy, policy, settings, dtype=dtype, seed=0)
    kept: dict[str, int] = {}
    updater.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: kept.update(
            gradients=sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
        )
    )
    updater.step(make_samples(256), 1, lambda metrics: None)
    kept["base"] = sum(p.nbytes for p in policy.parameters() if not p.requires_grad)
    kept["weights"] = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    moments = [state[key] for state in updater.optimizer.state.values() for key in state]
    kept["optimizer"] = sum(m.nbytes for m in moments if m.ndim)
    for part, size in kept.items():
        assert parts[part] == size, part
    assert "reference" not in parts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the config of what a hub id stands for."""
    folder = tmp_path_factory.mktemp("models")
    configs = {
        "Qwen/Qwen3-30B-A3B-Base": QWEN3_30B,
        "Qwen/Qwen2.5-Math-1.5B": QWEN2_MATH,
        "Qwen/Qwen2.5-Math-7B": QWEN2_MATH_7B,
        "checkpoints/DeepSeek-V3-Base-bf16": DEEPSEEK_V3,
        "Qwen/Qwen2.5-7B": {**QWEN2_MATH_7B, "max_position_embeddings": 131072},
    }
    places = {name: folder / name.partition("/")[2] for name in configs}
    for name, values in configs.items():
        AutoConfig.for_model(**values).save_pretrained(places[name])
    return places


def estimate_recipe(
    name: str, devices: str, models: dict[str, Path], *settings: str
) -> dict[str, str]:
    """The line of each stage that trains, of a shipped recipe."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    for hub_id, folder in models.items():
        text = re.sub(rf"{hub_id}\b(?!-)", str(folder), text)
    path = next(iter(models.values())).with_name(f"{name}.yaml")
    path.write_text(text)
    recipe, node = load_recipe(path, settings), Devices.parse(devices)
    found = {stage.name: estimate_stage(stage, recipe, node) for stage in recipe.stages}
    return {name: line for name, line in found.items() if line is not None}


def test_the_large_recipe_fits_its_node(models: dict[str, Path]) -> None:
    def lines(*settings: str) -> dict[str, str]:
        return estimate_recipe("qwen3_30b_a3b", "8x80GB", models, *settings)

    shipped = lines()
    assert shipped.keys() == {"cold_start", "grpo", "student_1_5b", "student_7b"}
    assert all(line.endswith(": fits") for line in shipped.values()), shipped
    # Of 30.5e9 parameters on 8 devices: float32; both moments of the largest tensor, one layer's
    # gate and up projections of 128 experts; a reference in bf16; the sampler's share in bf16.
    assert "30.5 B parameters on 8 x 80.0 GiB" in shipped["grpo"]
    assert "weights 14.2, gradients 14.2, optimizer 0.4" in shipped["grpo"]
    assert "reference 7.1" in shipped["grpo"]
    assert "vLLM 8.6" in shipped["grpo"]

    resident = lines("stages.grpo.offload_optimizer=false")["grpo"]
    assert "optimizer 28.4" in resident
    assert "DOES NOT FIT" in resident
    whole = lines("engine.tensor_parallel_size=1", "engine.gpu_memory_utilization=0.18")["grpo"]
    assert "vLLM has 0 B for its KV cache" in whole


def test_deepseek_v3_fits_256_devices(models: dict[str, Path]) -> None:
    """Neither the 256 experts of a layer, 23 GB and their gradients, nor a sequence of 33k tokens,
    whole on each of them."""

    def line(*settings: str) -> str:
        changes = (f"stages.grpo.{setting}" for setting in settings)
        return estimate_recipe("deepseek_v3_671b", "256x80GB", models, *changes)["grpo"]

    shipped = line()
    assert shipped.endswith(": fits"), shipped
    assert "682.6 B parameters" in shipped  # 671 and the prediction layer
    for setting in ("expert_parallel=1", "sequence_parallel=1"):
        assert "DOES NOT FIT" in line(setting)
    gathered, exchanged = (
        float(re.search(r"each sends ([\d.]+) GiB", text)[1])
        for text in (line("expert_parallel=1"), shipped)
    )
    assert gathered > 7 * exchanged


def test_a_7b_model_fits_a_24gb_card(models: dict[str, Path]) -> None:
    """With an adapter, and its base away while the engine samples."""

    def lines(*settings: str) -> dict[str, str]:
        return estimate_recipe("lora_7b_24gb", "1x24GB", models, *settings)

    shipped = lines()
    assert shipped.keys() == {"sft", "grpo"}
    assert all(line.endswith(": fits") for line in shipped.values()), shipped
    # 7.6e9 parameters in bf16; 40 M of the adapter in float32.
    for line in shipped.values():
        assert "base 14.2, weights 0.2, gradients 0.2, optimizer 0.3" in line
    for change in ("stages.grpo.adapter.offload_base=false", "engine.sleep=0"):
        assert "DOES NOT FIT" in lines(change)["grpo"]
    whole = lines("stages.sft.train.adapter=null", "stages.grpo.adapter=null")
    assert all("DOES NOT FIT" in line for line in whole.values())


@pytest.mark.parametrize(
    ("name", "devices"), [("qwen3_30b_a3b", "8x80GB"), ("r1", "8x80GB"), ("r1_zero", "1x80GB")]
)
def test_trainer_and_engine_take_turns(name: str, devices: str, models: dict[str, Path]) -> None:
    """A KV cache of 30 GiB and more, for which there is no room beside the training."""
    lines = estimate_recipe(name, devices, models)
    shared = {stage: line for stage, line in lines.items() if "KV cache" in line}
    assert shared
    for line in shared.values():
        assert float(re.search(r"KV cache ([\d.]+)", line)[1]) >= 30
        training, sampling = re.search(
            r"in training \((.*?)\).* in sampling \((.*?)\)", line
        ).groups()
        assert "vLLM asleep" in training
        assert "KV cache" not in training
        assert "gradients" not in sampling
        assert line.endswith(": fits"), line
    at_once = estimate_recipe(name, devices, models, "engine.sleep=0")
    assert "DOES NOT FIT" in " ".join(at_once.values())


def test_what_stays_while_the_engine_samples() -> None:
    """The moments unless they are offloaded; of what distill trains, nothing is loaded yet."""
    recipe = load_recipe(ROOT / "configs" / "demo.yaml")
    shape = Shape.of(find_stage_config(recipe.stage("grpo"), recipe))

    def halves(stage: Stage) -> dict[str, dict[str, float]]:
        return estimate_shape(stage, recipe, shape, Devices(1, 80 * GIB)).halves

    of_grpo = make_grpo(**{"from": "sft"}, beta=0.1)
    shared = {"weights", "reference", "process"}
    engine = {"vLLM", "KV cache"}
    assert halves(of_grpo)["sampling"].keys() == shared | engine | {"optimizer", "probe"}
    offloaded = of_grpo.model_copy(update={"offload_optimizer": True})
    assert halves(offloaded)["sampling"].keys() == shared | engine | {"probe"}
    assert halves(recipe.stage("distill"))["sampling"].keys() == {"process"} | engine
    assert halves(of_grpo.model_copy(update={"max_staleness": 1})).keys() == {""}
    assert halves(recipe.stage("sft")).keys() == {""}
    fleet = recipe.model_copy(update={"sampler": SamplerPlace(kind="fleet", engines=3)})
    apart = estimate_shape(of_grpo, fleet, shape, Devices(1, 80 * GIB)).halves
    assert apart["sampling"].keys() == engine
    assert not apart["training"].keys() & engine
    assert apart["sampling"]["vLLM"] == halves(of_grpo)["sampling"]["vLLM"]
    estimate = estimate_shape(of_grpo, recipe, shape, Devices(1, 80 * GIB, is_gpu=False))
    assert estimate.halves.keys() == {""}


def test_the_teacher_counts() -> None:
    """Whole in one process; of several, its share, the head, and a layer on its way."""
    deeper = "stages.random.model.num_hidden_layers=4"
    recipe = load_recipe(ROOT / "configs" / "demo.yaml", [deeper])
    stage = make_on_policy_distill(**{"from": "grpo", "student": "distill"})
    student, teacher = (
        Shape.of(find_stage_config(recipe.stage(name), recipe)) for name in ("distill", "grpo")
    )
    alone = estimate_shape(stage, recipe, student, Devices(1, GIB))
    assert alone.parts["teacher"] == 4 * teacher.parameters
    assert alone.parts["weights"] == 4 * student.parameters
    shared = estimate_shape(stage, recipe, student, Devices(4, GIB)).parts
    assert teacher.parameters < shared["teacher"] < alone.parts["teacher"]
    lines = [estimate_stage(stage, recipe, Devices(1, size * GIB)) for size in (8, 1)]
    assert lines[0].endswith("fits")
    assert "DOES NOT FIT" in lines[1]


def test_what_fits_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(ROOT / "configs" / "demo.yaml")
    stage = recipe.stage("grpo")
    assert estimate_stage(stage, recipe, Devices.parse("1x8GB")).endswith("fits")
    assert "DOES NOT FIT" in estimate_stage(stage, recipe, Devices.parse("1 x 1 GiB"))
    assert estimate_stage(recipe.stage("eval"), recipe, Devices.parse("1x8GB")) is None
    with pytest.raises(UserError, match="8x80GB"):
        Devices.parse("eight")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1pipe.models.hub_cache.reaches_hub", lambda: False)
    recipe = load_recipe(ROOT / "configs" / "r1_zero.yaml")
    line = estimate_stage(recipe.stage("grpo"), recipe, Devices.parse("1x80GB"))
    assert line.startswith("grpo: no memory estimate: no config of")


def test_no_size_is_printed_as_nothing() -> None:
    sizes = {
        0: "0 B",
        900: "0.9 KiB",
        2**18: "0.2 MiB",
        2**30 // 2: "0.5 GiB",
        1536 * 2**20: "1.5 GiB",
    }
    assert {size: format_size(size) for size in sizes} == sizes
