"""Adapters through the command line, of a mixture and of a dense model: sampler and trainer agree,
a killed run ends with the same weights, and the real peft loads what is published."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import read_lines, run, run_and_kill
from safetensors.torch import load_file
from test_resume import assert_equal, begin_beside
from transformers import AutoModelForCausalLM, PreTrainedModel

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow
STEPS = 4
IDS_BL = torch.arange(5, 25).reshape(2, 10)


@pytest.fixture(scope="module")
def recipes(finished: tuple, tiny_recipe: Path) -> dict[str, Path]:
    """grpo of the finished run's policy, a mixture; sft and grpo of its dense student, which is
    taught by the policy, too."""
    run_dir, _ = finished
    values = yaml.safe_load(tiny_recipe.read_text())
    data = {"recipe": "arithmetic", "options": {"size": 60, "seed": 4}}
    grpo = {
        "kind": "grpo",
        "data": data,
        "rewards": [{"function": "reward_of_tests.undecided_for_odd_answers"}],
        "max_steps": STEPS,
        "prompts_per_step": 8,
        "num_generations": 4,
        "max_completion_length": 16,
        "steps_per_generation": 2,
        "learning_rate": 1e-2,
        "verify_sync": True,
        "beta": 0.1,
        "adapter": {"r": 4, "alpha": 8},
    }
    train = {"max_steps": 8, "learning_rate": 1e-2, "adapter": {"target_modules": ["q_proj"]}}
    sft = {"kind": "sft", "from": str(run_dir / "distill"), "data": data, "train": train}
    taught = {
        "kind": "on_policy_distill",
        "from": str(run_dir / "sft"),
        "student": str(run_dir / "distill"),
        "data": data,
        "max_steps": 16,
        "prompts_per_step": 16,
        "max_completion_length": 16,
        "learning_rate": 1e-2,
        "verify_sync": True,
        "adapter": {},
    }
    by_name = {
        "taught": [taught],
        "mixture": [{**grpo, "from": str(run_dir / "sft")}],
        "dense": [sft, {**grpo, "from": "sft"}],
    }
    recipes = {}
    for name, stages in by_name.items():
        recipes[name] = tiny_recipe.with_name(f"adapted-{name}.yaml")
        recipes[name].write_text(yaml.safe_dump({**values, "name": name, "stages": stages}))
    return recipes


@pytest.fixture(scope="module")
def adapted(recipes: dict[str, Path]) -> Path:
    """The folder with the runs."""
    for recipe in recipes.values():
        result = run("run", recipe, "--skip-doctor")
        assert result.returncode == 0, result.stderr[-3000:]
    return recipe.parent / "runs"


@pytest.mark.parametrize("name", ["mixture", "dense"])
def test_sampler_and_trainer_agree(name: str, adapted: Path) -> None:
    """At each step and after each sync, whatever has been learnt."""
    rows = read_lines(adapted / name / "grpo" / "metrics.jsonl")
    assert len(rows) == STEPS
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["sampler/logprob_diff_mean"] <= 1e-4
        assert row["sync/logprob_diff_mean"] <= 1e-4
    record = json.loads((adapted / name / "grpo" / "stage.json").read_text())
    assert record["last_sync/logprob_diff_mean"] <= 1e-4
    assert record["adapter_parameters"] > 1000
    # The reference is the policy without its adapter: at first the same.
    assert rows[0]["kl"] < rows[-1]["kl"]


@pytest.mark.parametrize(
    ("name", "alone", "told"),
    [
        ("dense", True, "vLLM takes the adapter alone (mean |dlogp| "),
        ("mixture", False, "vLLM gets merged weights, not the adapter alone: "),
    ],
)
def test_sync_of_the_adapter_alone(
    name: str, alone: bool, told: str, adapted: Path, recipes: dict[str, Path]
) -> None:
    """Where vLLM takes it: on CPU not the experts'. Sampler and trainer agree either way."""
    run_dir = begin_beside(adapted / name, "grpo", f"{name}-alone")
    more = ("--set", f"name={run_dir.name}", "--set", "stages.grpo.adapter.sync=alone")
    result = run("grpo", recipes[name], *more, "--set", "stages.grpo.max_steps=2", "--skip-doctor")
    assert result.returncode == 0, result.stderr[-3000:]
    assert told in result.stderr
    rows = read_lines(run_dir / "grpo" / "metrics.jsonl")
    merged = read_lines(adapted / name / "grpo" / "metrics.jsonl")
    for row, other in zip(rows, merged):
        assert row["sync/logprob_diff_mean"] <= 1e-4
        assert row["sampler/logprob_diff_mean"] <= 1e-4
        if not alone:
            assert row["loss"] == other["loss"]
    assert rows[1]["kl"] > 0


def test_a_student_that_is_adapted_comes_nearer_to_its_teacher(adapted: Path) -> None:
    folder = adapted / "taught" / "on_policy_distill"
    rows = read_lines(folder / "metrics.jsonl")
    divergences = [row["divergence"] for row in rows]
    assert sum(divergences[-5:]) < sum(divergences[:5])  # one step's differs by 5%
    assert all(row["sync/logprob_diff_mean"] <= 1e-4 for row in rows)
    assert json.loads((folder / "stage.json").read_text())["adapter_parameters"] > 1000


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def find_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS_BL).logits


@pytest.mark.parametrize(
    ("stage", "base"),
    [("mixture/grpo", "tiny/sft"), ("dense/sft", "tiny/distill"), ("dense/grpo", "dense/sft")],
)
def test_peft_adds_the_adapter_to_the_base(stage: str, base: str, adapted: Path) -> None:
    """Which gives the merged checkpoint."""
    model, merged = load(adapted / base), find_logits(load(adapted / stage))
    assert (find_logits(model) - merged).abs().mean() > 0.01
    unmerged = peft.PeftModel.from_pretrained(model, adapted / stage / "adapter")
    assert torch.allclose(find_logits(unmerged), merged, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "base", "rank"), [("mixture/grpo", "tiny/sft", 4), ("dense/grpo", "tiny/distill", 20)]
)
def test_published_unmerged(stage: str, base: str, rank: int, adapted: Path) -> None:
    """Beside the model that all of the run goes back to: adapters of two stages are one."""
    options = ["--repo", "ana/tiny", "--adapter", "--dry-run", "--force", "--license", "mit"]
    options += ["--license", f"{adapted / base}=mit"]
    told = run("publish", adapted / stage, *options)
    assert told.returncode == 2
    assert "--base-model FOLDER=HUB_ID" in told.stderr
    result = run("publish", adapted / stage, *options, "--base-model", f"{adapted / base}=ana/base")
    assert result.returncode == 0, result.stderr[-3000:]
    name, _, last = stage.partition("/")
    published = adapted / name / "publish" / last
    assert not list(published.glob("*model-*")) + list(published.glob("config.json"))
    config = json.loads((published / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("ana/base", rank)
    unmerged = peft.PeftModel.from_pretrained(load(adapted / base), published)
    merged = find_logits(load(adapted / stage))
    assert torch.allclose(find_logits(unmerged), merged, atol=1e-4)
    card = (published / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model_relation: adapter" in card
    assert 'model = AutoModelForCausalLM.from_pretrained("ana/base", dtype="float32")' in card
    assert 'model = PeftModel.from_pretrained(model, "ana/tiny")' in card


def test_a_model_trained_whole_has_no_adapter_to_publish(adapted: Path) -> None:
    options = ("--repo", "ana/tiny", "--adapter", "--dry-run", "--force", "--license", "mit")
    result = run("publish", adapted / "tiny" / "distill", *options)
    assert result.returncode == 2
    assert "distill was trained whole: publish it merged" in result.stderr


def test_only_targets_change(adapted: Path) -> None:
    base, made = (
        load_file(adapted / stage / "model.safetensors") for stage in ("tiny/distill", "dense/sft")
    )
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed == {name for name in base if "q_proj" in name}


@pytest.mark.parametrize(
    ("name", "stage", "phase", "settings"),
    [
        # Its engine sleeps and its base is away, as that of the run beside it is not.
        (
            "mixture",
            "grpo",
            "updating",
            ("save_steps=1", "adapter.offload_base=true", "engine.sleep=2"),
        ),
        ("dense", "sft", "supervised", ("train.save_steps=1",)),
    ],
)
def test_a_killed_stage_resumes_bit_equal(
    name: str,
    stage: str,
    phase: str,
    settings: tuple[str, ...],
    adapted: Path,
    recipes: dict[str, Path],
) -> None:
    """From a checkpoint of the adapter alone."""
    killed = adapted / f"{name}-killed"
    keys = (s if s.startswith("engine") else f"stages.{stage}.{s}" for s in settings)
    more = [f"--set={key}" for key in (f"name={killed.name}", *keys)]
    command = (stage, recipes[name], *more, "--skip-doctor")
    run_and_kill(phase, 2, 0.01, killed / f".{stage}.partial", *command)
    saved = max(killed.glob(f".{stage}.partial/checkpoints/step-*/rank-0.pt"))
    whole = adapted / name / stage
    assert saved.stat().st_size < (whole / "model.safetensors").stat().st_size
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step" in result.stderr
    assert_equal(whole, killed / stage)


def test_unknown_target_is_told_before_anything_starts(recipes: dict[str, Path]) -> None:
    change = "stages.grpo.adapter.target_modules=[k_proj]"
    result = run("grpo", recipes["mixture"], "--set", "name=wrong", "--set", change)
    assert result.returncode == 2
    assert 'deepseek_v3 has no "k_proj"; it has q_proj, ' in result.stderr
    assert "Traceback" not in result.stderr
