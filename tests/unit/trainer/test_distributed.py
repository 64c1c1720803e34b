"""Two gloo processes on CPU against one: the same losses, shards only, nothing that hangs."""

import copy
import json
import pickle
import random
import subprocess
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run, run_ranks, run_script
from grpo_settings import make_grpo, make_on_policy_distill
from tiny_models import MODELS, PROBLEMS, make_rollout
from transformers import AutoModelForCausalLM, PreTrainedModel

from r1pipe.config.rl import OnPolicy, OnPolicyDistill
from r1pipe.models.adapter import NewAdapter, merge
from r1pipe.models.model import build_model, load_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.update import Updater
from r1pipe.trainer.checkpoints import Checkpoints
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.policy import Policy
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")
VOCABULARY = 401
"""Odd, so that the ranks' parts of the embedding and the head differ."""

# (model, changes of its config, settings, samples of rank 0 and of rank 1)
CASES = {
    "moe": (
        "deepseek_v3",
        {"n_routed_experts": 5},
        {"steps_per_generation": 2, "loss_type": "dapo", "bias_update_rate": 0.01},
        (12, 8),
    ),
    "tied": (
        "qwen3",
        {"tie_word_embeddings": True},
        {"beta": 0.1, "num_iterations": 2, "reference_refresh_steps": 9},
        (7, 13),
    ),
    # Minibatches of a single sample: one rank has nothing to train on.
    "one_idle": (
        "qwen3_moe",
        {},
        {"beta": 0.1, "gradient_checkpointing": True, "steps_per_generation": 4},
        (5, 0),
    ),
    # A prediction layer that a rank runs without samples.
    "predicting": (
        "deepseek_v3",
        {"num_mtp_layers": 1},
        {"mtp": {}, "gradient_checkpointing": True, "steps_per_generation": 4}
        | {"bias_update_rate": 0.01},
        (5, 0),
    ),
    # Tokens travel to experts, replayed ones too; also to those of a rank without samples.
    "grouped": (
        "deepseek_v3",
        {"num_mtp_layers": 1},
        {"mtp": {}, "gradient_checkpointing": True, "steps_per_generation": 4, "beta": 0.1}
        | {"bias_update_rate": 0.01, "seq_aux_loss_coef": 0.1}
        | {"expert_parallel": 2, "routing_replay": True},
        (5, 0),
    ),
    "grouped_bf16": ("qwen3_moe", {}, {"beta": 0.1, "expert_parallel": 2}, (9, 11)),
    # Ranks share out the tokens of one row; fewer heads of keys than ranks, then groups as well.
    "teamed": (
        "llama",
        {},
        {"beta": 0.1, "num_iterations": 2, "sequence_parallel": 2, "gradient_checkpointing": True},
        (7, 4),
    ),
    "teamed_moe": (
        "deepseek_v3",
        {"num_mtp_layers": 1},
        {"mtp": {}, "steps_per_generation": 4, "loss_type": "dapo", "bias_update_rate": 0.01}
        | {"sequence_parallel": 2, "expert_parallel": 2, "routing_replay": True},
        (5, 0),
    ),
    # Indexers that a rank runs without samples.
    "indexed": (
        "deepseek_v32",
        {},
        {"indexer": {"phase": "sparse"}, "gradient_checkpointing": True}
        | {"bias_update_rate": 0.01, "steps_per_generation": 4},
        (5, 0),
    ),
    "adapted": (
        "qwen3_moe",
        {},
        {"beta": 0.1, "gradient_checkpointing": True, "steps_per_generation": 4, "adapter": {}},
        (5, 0),
    ),
    "adapted_bf16": ("qwen3_moe", {}, {"beta": 0.1, "adapter": {"r": 3}}, (9, 11)),
    "bf16": ("qwen3_moe", {}, {"beta": 0.1, "offload_optimizer": True}, (9, 11)),
    # A micro-batch for each sample: tiles of tokens are those of one process.
    "fp8": ("deepseek_v3", {}, {"fp8": "both", "micro_batch_tokens": 1}, (9, 11)),
    # Whole models, whose gradients are summed.
    "whole": (
        "deepseek_v3",
        {"num_mtp_layers": 1},
        {"mtp": {}, "steps_per_generation": 4, "beta": 0.1, "bias_update_rate": 0.01}
        | {"sharding": "none"},
        (5, 0),
    ),
    "whole_tied": (
        "qwen3",
        {"tie_word_embeddings": True},
        {"num_iterations": 2, "old_policy": "sampler", "sharding": "none"},
        (7, 13),
    ),
    "whole_adapted": ("qwen3_moe", {}, {"beta": 0.1, "adapter": {}, "sharding": "none"}, (5, 4)),
    # By a teacher; minibatches of a single sample, and a last one of two.
    "taught": (
        "qwen3",
        {"tie_word_embeddings": True},
        {"kind": "on_policy_distill", "steps_per_generation": 4},
        (5, 0),
    ),
    # By two teachers: minibatches in which a rank has nothing of one of them.
    "merged": (
        "qwen3",
        {},
        {
            "kind": "on_policy_distill",
            "from": None,
            "teachers": {"math": "x", "code": "z"},
            "teacher_field": "kind",
            "steps_per_generation": 4,
        },
        (8, 3),
    ),
}
QUICK = ("moe", "teamed_moe", "bf16", "whole")
"""The others are for make test-slow."""


def by_case(names: Collection[str]) -> pytest.MarkDecorator:
    marks = {name: () if name in QUICK else pytest.mark.slow for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


FLOAT32 = [name for name in CASES if "bf16" not in name and name != "fp8"]


def make_samples(tokenizer: object) -> list[Sample]:
    rng = random.Random(0)
    samples = []
    for problem in PROBLEMS[:20]:
        length, finish_reason = rng.randint(3, 40), rng.choice(["stop", "stop", "length"])
        rollout = make_rollout(tokenizer, problem, length, -5.0, finish_reason)
        samples.append(Sample(rollout, rng.choice([-1.0, 0.0, 0.5, 2.0])))
    return samples


def add_routes(samples: list[Sample]) -> list[Sample]:
    """Two of four experts in one layer, at random."""
    rng = np.random.default_rng(0)

    def draw(sample: Sample) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(4), (sample.num_tokens - 1, 1, 1)), axis=-1)[..., :2]

    return [replace(s, rollout=replace(s.rollout, routes=draw(s))) for s in samples]


def make_stage(**settings: object) -> OnPolicy:
    if settings.get("kind") == "on_policy_distill":
        return make_on_policy_distill(**settings)
    fixed = {
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
        "mask_truncated_completions": True,
        "vllm_importance_sampling_correction": False,
    }
    if "old_policy" in settings:
        del fixed["vllm_importance_sampling_correction"]
    return make_grpo(**{**fixed, **settings})


def run_on_ranks(script: str, *arguments: object, ranks: int = 2) -> subprocess.CompletedProcess:
    return run_ranks(ranks, Path(__file__).with_name(script), *arguments, program=run_script)


@pytest.fixture(scope="module")
def cases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """The folder with what two ranks have made of every case that was chosen, and the cases."""
    own = [item for item in request.session.items if item.path == request.path]
    chosen = {item.callspec.params.get("name") for item in own if hasattr(item, "callspec")}
    names = [name for name in CASES if name in chosen | {"moe"}]
    return run_cases(tmp_path_factory.mktemp("ranks"), "cpu", names)


def run_cases(
    folder: Path, device: str, names: Collection[str] = CASES, ranks: int = 2
) -> tuple[Path, dict]:
    texts = (f"{p.question}\n{p.solution}" for p in PROBLEMS)
    tokenizer = build_tokenizer(texts, VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    samples = make_samples(tokenizer)
    cases = {}
    for name in names:
        model, changes, settings, (first, second) = CASES[name]
        checkpoint = folder / f"{name}-start"
        start = build_model({**MODELS[model], **changes}, tokenizer, 0)
        save_checkpoint(start, tokenizer, checkpoint)
        teacher = build_model({**MODELS[model], **changes}, tokenizer, 1)
        save_checkpoint(teacher, tokenizer, folder / f"{name}-teacher")
        own = add_routes(samples) if settings.get("routing_replay") else samples
        routes = {s.rollout.problem_id: "math" if n % 3 else "code" for n, s in enumerate(samples)}
        cases[name] = {
            "dtype": "bfloat16" if "bf16" in name else "float32",
            "settings": make_stage(**{"micro_batch_tokens": 200, "max_grad_norm": 0.1, **settings}),
            "samples": (own[:first], own[first : first + second], *[[]] * (ranks - 2)),
            "routes": routes,
        }
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    result = run_on_ranks("sharded_update.py", folder, device, ranks=ranks)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, cases


@by_case(FLOAT32)
def test_losses_are_those_of_one_process(name: str, cases: tuple[Path, dict]) -> None:
    folder, by_name = cases
    compare_with_one_process(folder, name, by_name[name], tolerance=1e-5)


@by_case(["fp8"])
def test_fp8_is_that_of_one_process(name: str, cases: tuple[Path, dict]) -> None:
    """Up to the first update. After it, weights that differ in the last bit may round to other
    codes."""
    folder, by_name = cases
    case = by_name[name]
    results = json.loads((folder / f"{name}.json").read_text())
    assert results[0]["metrics"] == results[1]["metrics"]
    samples = [sample for part in case["samples"] for sample in part]
    expected = make_updater(folder, name, case).step(samples, 1, lambda metrics: None)
    for key, value in expected.items():  # each by itself: some are lists
        assert results[0]["metrics"][0][key] == pytest.approx(value, rel=1e-5), key


@by_case(["bf16", "grouped_bf16"])
def test_bf16_layers_and_float32_masters(name: str, cases: tuple[Path, dict]) -> None:
    """Against one process, which sums in another order."""
    folder, by_name = cases
    results = json.loads((folder / f"{name}.json").read_text())
    for result in results:
        assert result["computed_in"] == "torch.bfloat16"
        assert result["masters"] == ["torch.float32"]
        assert result["reference"] == ["torch.bfloat16"]
    assert results[0]["metrics"] == results[1]["metrics"]
    updater = make_updater(folder, name, by_name[name])
    samples = [sample for part in by_name[name]["samples"] for sample in part]
    for step in range(1, 4):
        expected = updater.step(copy.deepcopy(samples), step, lambda metrics: None)
        for key, tolerance in {"loss": 0.02, "entropy": 0.01, "kl": 0.01}.items():
            assert results[0]["metrics"][step - 1][key] == pytest.approx(
                expected[key], abs=tolerance
            )


@by_case(CASES)
def test_samples_are_shared_out_by_tokens(name: str, cases: tuple[Path, dict]) -> None:
    """Whole, each to one rank; of every minibatch the ranks' tokens differ by one sample's."""
    folder, by_name = cases
    results = json.loads((folder / f"{name}.json").read_text())
    samples = [sample for part in by_name[name]["samples"] for sample in part]
    shares = [{int(n): ids for n, ids in result["share"].items()} for result in results]
    if by_name[name]["settings"].sequence_parallel > 1:
        assert shares[0] == shares[1]
        assert sorted(shares[0]) == [*range(len(samples))]
        return
    assert not shares[0].keys() & shares[1].keys()
    for number, ids in (shares[0] | shares[1]).items():
        assert ids == samples[number].rollout.completion_ids
    assert sorted(shares[0] | shares[1]) == [*range(len(samples))]
    for numbers in results[0]["minibatches"]:
        # Without a KL term a sample of advantage 0 costs nothing.
        beta = by_name[name]["settings"].beta
        costs = {n: s.num_tokens * (beta > 0 or s.advantage != 0) for n, s in enumerate(samples)}
        loads = [sum(costs[n] for n in numbers if n in share) for share in shares]
        assert abs(loads[0] - loads[1]) <= max(costs[n] for n in numbers)


@by_case(CASES)
def test_two_ranks_resume_bit_equal(name: str, cases: tuple[Path, dict]) -> None:
    folder, _ = cases
    for result in json.loads((folder / f"{name}.json").read_text()):
        assert result["again"] == result["metrics"][1:]
        assert result["same_weights_again"]


def test_one_process_does_not_resume_from_two(cases: tuple[Path, dict]) -> None:
    folder, by_name = cases
    updater = make_updater(folder, "moe", by_name["moe"])
    settings = by_name["moe"]["settings"]
    checkpoints = Checkpoints(folder / "moe-partial", settings, "moe", {"it": updater}, {})
    with pytest.raises(UserError, match="saved by 2 processes, and this run has 1"):
        checkpoints.restore_last_good()


def load_start(folder: Path, name: str, settings: OnPolicy) -> PreTrainedModel:
    adapter = settings.adapter and NewAdapter(settings.adapter, 0)
    start = str(folder / f"{name}-start")
    return load_sharded(start, CPU, "sdpa", Policy, dtype="float32", adapter=adapter).model


def make_updater(folder: Path, name: str, case: dict) -> Updater:
    settings, dtype = case["settings"], case["dtype"]
    model = load_start(folder, name, settings)
    if isinstance(settings, OnPolicyDistill):
        teacher = TeacherModel(
            load_model(str(folder / f"{name}-teacher"), CPU).requires_grad_(False)
        )
        teachers = {"": teacher}
        if settings.teachers:
            other = TeacherModel(copy.deepcopy(model).requires_grad_(False))
            teachers = {"math": teacher, "code": other}
        routes = case["routes"]
        return DistillUpdater(model, teachers, settings, dtype=dtype, seed=0, routes=routes)
    policy = Policy(model)
    reference = copy.deepcopy(policy) if settings.keeps_reference else policy
    return GrpoUpdater(policy, reference if settings.beta else None, settings, dtype=dtype, seed=0)


def compare_with_one_process(folder: Path, name: str, case: dict, tolerance: float) -> None:
    results = json.loads((folder / f"{name}.json").read_text())
    assert results[0]["metrics"] == results[1]["metrics"]
    updater = make_updater(folder, name, case)
    model, settings = updater.model, case["settings"]
    for step in range(1, 4):
        samples = copy.deepcopy([sample for part in case["samples"] for sample in part])
        expected = updater.step(samples, step, lambda metrics: None)
        row = results[0]["metrics"][step - 1]
        for key, value in expected.items():  # each by itself: some are lists
            near = {"abs": 2e-3} if key.endswith("/load") else {"rel": tolerance, "abs": tolerance}
            assert row[key] == pytest.approx(value, **near), key
        assert row.keys() == expected.keys()
        assert expected["grad_norm"] > settings.max_grad_norm
    for n, bias in results[0]["biases"].items():
        torch.testing.assert_close(torch.tensor(bias), model.get_buffer(n))
        assert bias == results[1]["biases"][n]
        assert any(bias)
    saved = AutoModelForCausalLM.from_pretrained(folder / f"{name}-saved", dtype=torch.float32)
    expected = merge(model, model.state_dict())
    for n, weight in saved.state_dict().items():
        close = (weight - expected[n]).abs() < 1e-5
        assert close.float().mean() > 0.99, n


@by_case(CASES)
def test_a_rank_holds_its_part(name: str, cases: tuple[Path, dict]) -> None:
    folder, by_name = cases
    results = json.loads((folder / f"{name}.json").read_text())
    settings = by_name[name]["settings"]
    model = load_start(folder, name, settings)
    held = {True: 2, False: 4}  # bytes of a frozen weight
    size = held[by_name[name]["dtype"] == "bfloat16" and bool(settings.adapter)]
    whole = sum(p.numel() * (4 if p.requires_grad else size) for p in model.parameters())
    if settings.sharding == "none":
        assert all(result["bytes"] == whole for result in results)
        return
    assert all(result["all_sharded"] for result in results)
    assert sum(result["bytes"] for result in results) == whole
    # Five experts are three and two.
    assert max(result["bytes"] for result in results) < 0.62 * whole


def test_freed_memory_is_given_back(tmp_path: Path) -> None:
    """Every other of 64 blocks of 8 MiB is freed: 256 of 512 MiB are in use."""
    code = """
import torch
from pathlib import Path
from r1pipe.trainer.fsdp import give_memory_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024

give_memory_back()
torch.ones(2**21)  # freed: glibc now knows the size
before = resident()
blocks = [torch.ones(2**21) for _ in range(64)]
assert resident() - before > 500
del blocks[::2]
assert resident() - before < 300, resident() - before
"""
    (tmp_path / "frees.py").write_text(code)
    done = run(tmp_path / "frees.py", program=run_script)
    assert done.returncode == 0, done.stderr
