"""The sampler agrees with the trainer, in each of the cases in which it was seen not to.

Every test here failed before the line in rollout/ or models/ that it names. Engines are real
vLLM; each is started once for the module.
"""

import gc
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from frequencies import counts_p
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from r1pipe.config.adapter import Adapter
from r1pipe.config.base import ProblemSet, Sampling
from r1pipe.config.recipe import Engine
from r1pipe.data.problems import load_problems
from r1pipe.models.adapter import add_adapter, initialize
from r1pipe.models.fp8 import add_fp8, computing_as_sampler
from r1pipe.models.model import build_model, fast_training_kernels
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rollout.cpu_sampling import replace_kernels_once
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.engines import Engines
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy, Truncation
from r1pipe.types import Problem, Rollout
from r1pipe.utils.errors import UserError
from r1pipe.utils.seeds import derive_seed

ROOT = Path(__file__).parents[2]
DEMO = {
    stage.get("name", stage["kind"]): stage
    for stage in yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["stages"]
}
CPU = torch.device("cpu")
SETTINGS = Engine(max_model_len=256, max_num_seqs=256, kv_cache_gib=0.1)
SAMPLING = Sampling(max_completion_length=24)
LIMIT = 1e-5
"""Mean |sampler - trainer| log-probability in float32; the wrong ones were 0.2 to 5.6."""
APART = 10 * LIMIT
"""Less than what rounding to FP8 does to it."""

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ARCHITECTURES = {
    "deepseek_v3": DEMO["random"]["model"],
    "qwen3, tied": DEMO["distill"]["student"],
    "qwen3_moe": QWEN3_MOE,
    "olmoe": {**LLAMA, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "llama": LLAMA,
}


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_problems(ProblemSet(recipe="arithmetic", options={"size": 24}))


@pytest.fixture(scope="module")
def tokenizer(problems: list[Problem]) -> object:
    return build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    engines = Engines(SETTINGS, "float32", CPU)
    yield engines
    engines.close()


def make_model(name: str, tokenizer: object, seed: int) -> PreTrainedModel:
    """Random weights, large enough that a wrong one shows; the router's bias too."""
    model = build_model({**ARCHITECTURES[name], "initializer_range": 0.1}, tokenizer, seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def lengthen(problem: Problem, times: int) -> Problem:
    """The question so many times over: about 26 tokens each."""
    content = " ".join([problem.question] * times)
    return replace(problem, prompt=[{"role": "user", "content": content}])


@torch.no_grad()
def logprob_diff(
    model: PreTrainedModel, rollouts: list[Rollout], truncation: Truncation | None = None
) -> float:
    batch = pack([Sample(rollout, 0.0) for rollout in rollouts], CPU)
    logprobs_C = Policy(model)(batch, 1.0, truncation=truncation).logprobs_C
    return float((logprobs_C - batch.sampler_logprobs_C).abs().mean())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def opened(
    request: pytest.FixtureRequest,
    engines: Engines,
    tokenizer: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, PreTrainedModel, Sampler]:
    model = make_model(request.param, tokenizer, seed=0)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(model, tokenizer, folder)
    return request.param, model, engines.open(str(folder))


def test_fresh_engine_agrees(opened: tuple, problems: list[Problem]) -> None:
    """dtype (float32 became bf16) and the rotary kernel (DeepSeek)."""
    _, model, sampler = opened
    assert sampler.llm.llm_engine.model_config.dtype == torch.float32
    assert logprob_diff(model, sampler.generate(problems, 2, SAMPLING, (0,))) < LIMIT


def test_reloaded_engine_agrees(opened: tuple, tokenizer: object, problems: list[Problem]) -> None:
    """Expert kernels, the tied head, the bias buffer, the experts' names, the prefix cache.

    The same prompts before and after: a prefix cache that is kept would serve old keys and values.
    It caches whole blocks of 128 tokens, so the prompts are longer than that.
    """
    problems = [lengthen(problem, 7) for problem in problems[:8]]
    name, model, sampler = opened
    before = sampler.generate(problems, 1, SAMPLING, (0,))
    assert min(len(rollout.prompt_ids) for rollout in before) > 128
    other = make_model(name, tokenizer, seed=1)
    for weights in (other, model, other):
        sampler.load_weights(export_weights(weights))
        rollouts = sampler.generate(problems, 1, SAMPLING, (0,))
        assert logprob_diff(weights, rollouts) < LIMIT
    assert logprob_diff(model, rollouts) > 0.01, "the two models are too alike to tell"
    sampler.load_weights(export_weights(model))
    again = sampler.generate(problems, 1, SAMPLING, (0,))
    assert [r.completion_ids for r in again] == [r.completion_ids for r in before]


def test_merged_adapter_agrees(opened: tuple, tokenizer: object, problems: list[Problem]) -> None:
    name, model, sampler = opened
    adapted = make_model(name, tokenizer, seed=0)
    add_adapter(adapted, Adapter(r=4))
    initialize(adapted, seed=1, std_b=0.1)
    sampler.load_weights(export_weights(adapted))
    rollouts = sampler.generate(problems, 2, SAMPLING, (0,))
    assert logprob_diff(adapted, rollouts) < LIMIT
    assert logprob_diff(model, rollouts) > 0.01, "the adapter does too little to tell"
    sampler.load_weights(export_weights(model))


def test_rounded_weights_and_back(
    opened: tuple, tokenizer: object, problems: list[Problem]
) -> None:
    """FP8: what the trainer computes with the same rounding; then as before, bit by bit."""
    name, _, sampler = opened
    model = make_model(name, tokenizer, seed=0)
    before = sampler.generate(problems, 1, SAMPLING, (0,))
    add_fp8(model, is_on=False)
    sampler.load_weights(export_weights(model, fp8=True))
    rounded = sampler.generate(problems, 1, SAMPLING, (0,))
    assert logprob_diff(model, rounded) > APART
    with computing_as_sampler(model, weights=True):
        assert logprob_diff(model, rounded) < LIMIT
        assert logprob_diff(model, before) > APART
    sampler.load_weights(export_weights(model))
    again = sampler.generate(problems, 1, SAMPLING, (0,))
    assert [r.completion_ids for r in again] == [r.completion_ids for r in before]
    assert [r.logprobs for r in again] == [r.logprobs for r in before]


def test_checkpoint_of_the_same_architecture_reuses_the_engine(
    opened: tuple, engines: Engines, tokenizer: object, problems: list[Problem], tmp_path: Path
) -> None:
    name, model, sampler = opened
    other = make_model(name, tokenizer, seed=2)
    save_checkpoint(other, tokenizer, tmp_path)
    assert engines.open(str(tmp_path)) is sampler
    assert logprob_diff(other, sampler.generate(problems, 1, SAMPLING, (0,))) < LIMIT
    sampler.load_weights(export_weights(model))


def test_samples_do_not_depend_on_the_batch(opened: tuple, problems: list[Problem]) -> None:
    """A sample's seed comes from (seed, step, problem, sample), not from global state."""
    _, _, sampler = opened
    whole = sampler.generate(problems, 2, SAMPLING, (0, "step", 1))
    torch.manual_seed(123)
    part = sampler.generate(problems[5:7], 2, SAMPLING, (0, "step", 1))
    assert [r.completion_ids for r in part] == [r.completion_ids for r in whole[10:14]]
    other = sampler.generate(problems[5:7], 2, SAMPLING, (0, "step", 2))
    assert [r.completion_ids for r in other] != [r.completion_ids for r in part]
    assert derive_seed(0, "a") != derive_seed(1, "a")


def test_prompts_beyond_the_batch_budget(opened: tuple, problems: list[Problem]) -> None:
    """More prompt tokens than one engine step takes, of few enough prompts to run together: chunked
    prefill needs a generator that can rewind, which torch's CPU generator cannot."""
    _, _, sampler = opened
    problems = [lengthen(problem, 2) for problem in problems[:8]]
    rollouts = sampler.generate(problems, 32, Sampling(max_completion_length=1), (0,))
    assert len(rollouts) == 256
    assert sum(len(r.prompt_ids) for r in rollouts) > 8192


# (temperature, top_p, top_k)
CUTS = [(0.5, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 5), (0.7, 0.9, 20)]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), CUTS)
def test_logprobs_are_of_the_distribution_that_was_sampled(
    opened: tuple, problems: list[Problem], temperature: float, top_p: float, top_k: int
) -> None:
    """At the sampling temperature, and renormalised over what top_p and top_k leave: otherwise the
    ratio of trainer and sampler is the mass that was left (trl#6789)."""
    _, model, sampler = opened
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_completion_length=16)
    batch = pack([Sample(r, 0.0) for r in sampler.generate(problems, 1, sampling, (0,))], CPU)
    policy, truncation = Policy(model), Truncation(top_p, top_k)
    with torch.no_grad():
        now = policy(batch, temperature, truncation=truncation if truncation.cuts else None)
        whole = policy(batch, temperature)
        again = policy(batch, temperature, support=now.support)
    assert (now.logprobs_C - batch.sampler_logprobs_C).abs().max() < 1e-4
    assert torch.equal(again.logprobs_C, now.logprobs_C)
    assert (now.entropy_C >= 0).all()
    if truncation.cuts:
        assert (now.logprobs_C - whole.logprobs_C).mean() > 0.05


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.5, 1.0, 0), *CUTS])
def test_tokens_come_as_often_as_the_model_says(
    opened: tuple,
    tokenizer: object,
    problems: list[Problem],
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    name, _, sampler = opened
    count, model = 600, make_model(name, tokenizer, seed=0)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_completion_length=1)
    rollouts = sampler.generate(problems[:1], count, sampling, ("frequencies",))
    ids = torch.tensor([rollouts[0].prompt_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double() / temperature
    order = logits.argsort(descending=True)
    cut = logits.softmax(-1)[order]
    if top_k:
        cut[top_k:] = 0
    cut /= cut.sum()
    cut[cut.cumsum(-1) - cut >= top_p] = 0  # what is above it is enough
    expected = torch.zeros_like(cut)
    expected[order] = cut / cut.sum() * count
    found = torch.bincount(
        torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=len(cut)
    )
    assert not found[expected == 0].any()
    rare = expected < 5  # counted together
    counts = [torch.cat([n[~rare], n[rare].sum()[None]]).numpy() for n in (found, expected)]
    kept = counts[1] > 0
    assert counts_p(counts[0][kept], counts[1][kept]) > 1e-4


def test_draws_and_norms_are_our_own(opened: tuple, problems: list[Problem]) -> None:
    """The kernels where they are as exact; PyTorch's for bf16, and for rows of odd lengths."""
    from vllm.ir.ops import rms_norm

    _, _, sampler = opened
    with torch.profiler.profile() as profile:
        sampler.generate(problems[:2], 2, Sampling(max_completion_length=2), (0,))
    seen = {event.key for event in profile.key_averages()}
    assert {"_C::rms_norm", "_C::fused_add_rms_norm"} <= seen
    assert "aten::exponential_" not in seen
    heads = torch.randn(40, 512)[:, :256].view(40, 4, 64)
    for x in (heads, torch.randn(5, 33), torch.randn(5, 64, dtype=torch.bfloat16)):
        weight = torch.rand(x.shape[-1], dtype=x.dtype)
        expected = rms_norm.impls["native"].impl_fn(x, weight, 1e-6)
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


def test_kernels_are_replaced_once(opened: tuple) -> None:
    """Not by an engine of an earlier test and once more by this one."""
    from vllm.triton_utils.dispatcher import KernelOverride, _registry

    assert _registry
    assert not any(isinstance(original, KernelOverride) for original, _ in _registry.values())


def test_nothing_is_compiled(opened: tuple, problems: list[Problem]) -> None:
    """vLLM decorates functions of its sampler and of routers; each shape used to take seconds."""
    name, _, sampler = opened
    for count, temperature in ((8, 1.0), (1, 1.0), (2, 0.0)):
        sampling = Sampling(temperature=temperature, max_completion_length=4)
        sampler.generate(problems[:count], 1, sampling, (0,))
    if name in ("deepseek_v3", "qwen3_moe", "olmoe"):
        sampler.prepare_routes()
        sampler.generate(problems[:2], 1, SAMPLING, (0,), with_routes=True)
    for temperature, top_p, top_k in CUTS:
        cut = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_completion_length=2)
        sampler.generate(problems[:2], 1, cut, (0,))
    assert not counters["frames"], "frames that torch.compile has looked at in this process"


def test_all_cores_sample_and_train(opened: tuple) -> None:
    """vLLM's workers keep a core for themselves and bind threads to the others. In one process
    with the trainer that must not happen to the trainer's."""
    assert len(os.sched_getaffinity(0)) == os.cpu_count()
    assert torch.get_num_threads() == int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))


def test_requests_and_results_are_let_go(opened: tuple, problems: list[Problem]) -> None:
    """Of many samples the engine has few at a time, and their results are read and dropped."""
    _, _, sampler = opened
    engine = sampler.llm.llm_engine
    seen: list[tuple[int, int]] = []

    def look(rollout: Rollout) -> None:
        results = sum(type(o).__name__ == "RequestOutput" for o in gc.get_objects())
        seen.append((engine.get_num_unfinished_requests(), results))

    few = Sampling(max_completion_length=2)
    gc.freeze()  # what there was before is not looked at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "settings", SETTINGS.model_copy(update={"max_num_seqs": 4}))
        journal = SimpleNamespace(find_samples=lambda *_: {}, add_sample=look)
        groups = list(sampler.generate_groups(problems[:4], 12, few, (0,), journal=journal))
    gc.unfreeze()
    assert len(seen) == 48
    assert max(unfinished for unfinished, _ in seen) <= 8
    # One engine step's, at most as many as run.
    assert max(results for _, results in seen) <= 8
    assert sorted(group.index for group in groups) == [0, 1, 2, 3]
    rollouts = sampler.generate(problems[:4], 12, few, (0,))
    for group in groups:
        assert group.rollouts == rollouts[12 * group.index : 12 * (group.index + 1)]


def test_a_prompt_is_tokenized_once(
    opened: tuple, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, sampler = opened
    first = sampler.encode(problems, 24)

    def fail(*arguments: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("r1pipe.rollout.engine.encode_prompt", fail)
    assert sampler.encode(problems, 24) == first
    with pytest.raises(AssertionError, match="again"):
        sampler.encode([lengthen(problems[0], 3)], 24)


def test_weights_that_are_missing_are_named(opened: tuple) -> None:
    """vLLM only logs them, at a level that is not shown."""
    _, model, sampler = opened
    name = "model.layers.1.input_layernorm"
    with pytest.raises(UserError, match=rf"no weights of {name}$"):
        sampler.load_weights((n, w) for n, w in export_weights(model) if name not in n)
    sampler.load_weights(export_weights(model))


def test_a_kept_prefix_cache_is_an_error(opened: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, sampler = opened
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda **_: False)
    with pytest.raises(RuntimeError, match="keys and values"):
        sampler.load_weights(export_weights(model))


def test_no_step_is_in_flight_after_sampling(
    engines: Engines,
    tokenizer: object,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asynchronous scheduling, vLLM's default on GPUs, which only the CPU's platform turns off."""
    engines.close()  # an engine that ends takes the process groups of all with it
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_schedule(cls: type, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_schedule))
    model = make_model("llama", tokenizer, seed=0)
    save_checkpoint(model, tokenizer, tmp_path)
    sampler = Sampler(str(tmp_path), SETTINGS, "float32", CPU)
    core = sampler.llm.llm_engine.engine_core.engine_core
    assert core.batch_queue is not None
    assert logprob_diff(model, sampler.generate(problems, 2, SAMPLING, (0,))) < LIMIT
    assert not core.batch_queue
    for _ in sampler.generate_groups(problems, 2, SAMPLING, (1,)):
        break
    assert not core.batch_queue
    assert sampler.llm.reset_prefix_cache()
    sampler.close()


def test_a_reused_engine_takes_over_the_tokenizer(
    engines: Engines, tokenizer: object, tmp_path: Path
) -> None:
    """Two fine-tunes of one architecture: their templates differ, their end tokens may."""
    folders = [tmp_path / name for name in ("one", "template", "ends")]
    for seed, folder in enumerate(folders):
        save_checkpoint(make_model("llama", tokenizer, seed), tokenizer, folder)
    template = folders[1] / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("<|{{ message.role }}|>", "[{{message.role}}]")
    )
    ends = json.loads((folders[2] / "generation_config.json").read_text())
    ends["eos_token_id"] = [ends["eos_token_id"], 7]
    (folders[2] / "generation_config.json").write_text(json.dumps(ends))
    question = Problem("q", "math", [{"role": "user", "content": "1 + 1?"}])
    first = engines.open(str(folders[0]))
    (before,) = first.encode([question], 4)
    assert engines.open(str(folders[1])) is first
    (after,) = first.encode([question], 4)
    assert first.tokenizer.decode(after).startswith("[user]1 + 1?")
    assert before != after
    third = engines.open(str(folders[2]))
    assert third is not first
    rollouts = third.generate([question], 64, SAMPLING, (0,))
    ended = {r.completion_ids[-1] for r in rollouts if r.finish_reason == "stop"}
    assert 7 in ended


def test_a_reload_that_goes_wrong_gives_way_to_a_new_engine(
    engines: Engines,
    tokenizer: object,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """As it would without the line that rebuilds the experts' kernels."""
    models = [make_model("qwen3_moe", tokenizer, seed) for seed in range(2)]
    for number, model in enumerate(models):
        save_checkpoint(model, tokenizer, tmp_path / str(number))
    first = engines.open(str(tmp_path / "0"))
    monkeypatch.setattr("r1pipe.rollout.weight_sync.drop_expert_kernels", lambda model: None)
    second = engines.open(str(tmp_path / "1"))
    assert second is not first
    assert "started anew" in capfd.readouterr().err
    assert logprob_diff(models[1], second.generate(problems, 1, SAMPLING, (0,))) < LIMIT


def test_closing_collects_garbage_once_and_thaws_nothing(
    engines: Engines, tokenizer: object, tmp_path: Path
) -> None:
    """A collection that looks at all imports takes most of a second."""
    save_checkpoint(make_model("llama", tokenizer, 0), tokenizer, tmp_path)
    gc.freeze()
    engines.open(str(tmp_path))
    frozen, collected = gc.get_freeze_count(), []
    note = lambda phase, info: collected.append((phase, info["generation"]))  # noqa: E731
    gc.callbacks.append(note)
    engines.close()
    gc.callbacks.remove(note)
    assert collected.count(("start", 2)) == 1
    assert gc.get_freeze_count() == frozen > 0
    gc.unfreeze()


def test_kernels_are_looked_for_in_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import dispatcher

    seen: list[str] = []
    look = lambda kernels: seen.extend(dispatcher.sys.modules)  # noqa: E731
    monkeypatch.setattr(dispatcher, "_rebind_kernels", look)
    monkeypatch.setattr(CpuPlatform, "register_triton_kernel_overrides", staticmethod(list))
    replace_kernels_once()
    dispatcher._rebind_kernels([])
    assert {"vllm.v1.sample.rejection_sampler", "vllm.v1.worker.block_table"} < set(seen)
    assert all(name.startswith("vllm") for name in seen)


def test_a_context_beyond_the_models_is_told(
    tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By us, and, where we do not know, in vLLM's words, not in pydantic's count of errors."""
    save_checkpoint(make_model("llama", tokenizer, 0), tokenizer, tmp_path)
    settings = SETTINGS.model_copy(update={"max_model_len": 4096})
    with pytest.raises(UserError, match=r"max_model_len 4096 is more than the context of .*, 256"):
        Sampler(str(tmp_path), settings, "float32", CPU)
    monkeypatch.setattr("r1pipe.rollout.engine.check_engine", lambda *arguments: None)
    with pytest.raises(UserError, match=r"vLLM cannot run it: .*max_model_len .*4096"):
        Sampler(str(tmp_path), settings, "float32", CPU)


def test_prompt_that_does_not_fit_is_named(opened: tuple, problems: list[Problem]) -> None:
    _, _, sampler = opened
    long = Problem(
        id="long-1", kind="math", prompt=[{"role": "user", "content": "7 " * 300}], answer="1"
    )
    with pytest.raises(UserError, match=r'"long-1".*do not fit the context of 256'):
        sampler.encode([*problems, long], 24)


def test_checkpoint_has_what_vllm_reads(tokenizer: object, tmp_path: Path) -> None:
    model = make_model("deepseek_v3", tokenizer, seed=0)
    save_checkpoint(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    names = {name for name, _ in export_weights(model)}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in names


def test_head_size_that_the_cpu_kernel_refuses(tokenizer: object, tmp_path: Path) -> None:
    settings = {**ARCHITECTURES["deepseek_v3"], "qk_nope_head_dim": 20, "qk_rope_head_dim": 20}
    save_checkpoint(build_model(settings, tokenizer, 0), tokenizer, tmp_path)
    with pytest.raises(UserError, match="qk_rope_head_dim is 40; on CPU"):
        Sampler(str(tmp_path), SETTINGS, "float32", CPU)


def test_model_that_vllm_cannot_run(tokenizer: object, tmp_path: Path) -> None:
    settings = {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 1, "n_head": 1}
    save_checkpoint(build_model(settings, tokenizer, 0), tokenizer, tmp_path)
    with pytest.raises(UserError, match="vLLM cannot run the architecture OpenAIGPT"):
        Sampler(str(tmp_path), SETTINGS, "float32", CPU)


def test_training_kernels_are_switched_and_restored() -> None:
    before = torch.backends.mkldnn.enabled
    with fast_training_kernels(CPU, "float32"):
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == before
    with fast_training_kernels(CPU, "bfloat16"):
        assert torch.backends.mkldnn.enabled == before
