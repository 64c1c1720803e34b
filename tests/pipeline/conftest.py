"""A recipe of the demo's shape that runs in a minute, and models that build in a second."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

# Set before torch or vLLM are imported by any test.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[2]


def shrink(values: dict) -> dict:
    """The demo with few steps and few problems: every stage, no learning to speak of."""
    by_name = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    by_name["random"]["tokenizer"]["data"]["options"]["size"] = 300
    for name, size in (("sft", 400), ("grpo", 100), ("distill", 40), ("eval", 10)):
        by_name[name]["data"]["options"]["size"] = size
    by_name["sft"]["train"]["max_steps"] = 40
    # A prediction layer, which every stage has to carry along.
    by_name["random"]["model"]["num_mtp_layers"] = 1
    by_name["sft"]["train"]["mtp"] = by_name["grpo"]["mtp"] = {}
    by_name["grpo"] |= {"max_steps": 2, "prompts_per_step": 8, "num_generations": 4}
    by_name["grpo"] |= {"steps_per_generation": 2, "routing_replay": True, "verify_sync": True}
    # In several processes a stage of each kind; the policy's log-probs twice.
    del by_name["grpo"]["sharding"], by_name["grpo"]["old_policy"]
    # An untrained policy is never right: the student learns from whatever is well formed.
    by_name["distill"]["traces"]["rewards"] = [{"function": "reward_of_tests.always_one"}]
    by_name["distill"]["train"]["max_steps"] = 5
    by_name["eval"]["num_samples"] = 2
    by_name["eval"]["k"] = 2
    return values


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    values = shrink(yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text()))
    values["name"] = "tiny"
    values["runs_dir"] = str(folder / "runs")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def finished(tiny_recipe: Path) -> tuple[Path, subprocess.CompletedProcess]:
    """The run's folder after `r1pipe run`, and what the command said."""
    from commands import run

    result = run("run", tiny_recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    return tiny_recipe.parent / "runs" / "tiny", result
