"""Runs that are killed (SIGKILL) and started again, against the run that was not."""

import json
import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import yaml
from commands import ROOT, read_lines, run, run_and_kill, start

HERE = Path(__file__).parent
TIMES = ("seconds/", "tokens_per_s/", "idle/", "timeline")
OWN_OF_A_RUN = {"stage.json", "lineage.json", "ledger.json", "ledger.jsonl"}


def read_metrics(folder: Path) -> list[dict]:
    rows = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def list_files(folder: Path) -> set[Path]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.name not in OWN_OF_A_RUN}


def assert_equal(folder: Path, other: Path) -> None:
    """Losses, rewards, sampled tokens, weights: bit by bit."""
    files = list_files(folder)
    assert {"metrics.jsonl", "model.safetensors"} < {path.name for path in files}
    assert list_files(other) == files
    assert read_metrics(other) == read_metrics(folder)
    for path in files - {Path("metrics.jsonl")}:
        assert (other / path).read_bytes() == (folder / path).read_bytes(), path


def begin_beside(folder: Path, stage: str, name: str) -> Path:
    """The folder of another run that has what comes before the stage."""
    other = folder.parent / name
    order = ("random", "sft", "grpo", "distill")
    for earlier in order[: order.index(stage)]:
        if (folder / earlier).exists():
            shutil.copytree(folder / earlier, other / earlier)
    return other


# stage: (phase in which it is killed, steps behind it; how often it saves: not when it logs). The
# engine of grpo sleeps meanwhile, that of the run that it is compared with does not.
KILLS = {
    "sft": ("supervised", 15, "stages.sft.train.save_steps=7"),
    "grpo": ("updating", 1, "stages.grpo.save_steps=1", "engine.sleep=2"),
    "distill": ("supervised", 3, "stages.distill.train.save_steps=3"),
}


@pytest.mark.parametrize(
    "stage", ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "distill"))]
)
def test_a_killed_stage_resumes_bit_equal(stage: str, finished: tuple, tiny_recipe: Path) -> None:
    folder, _ = finished
    phase, steps, *settings = KILLS[stage]
    other = begin_beside(folder, stage, f"killed-{stage}")
    settings = [f"name={other.name}", *settings]
    command = (stage, tiny_recipe, *(part for s in settings for part in ("--set", s)))
    partial = other / f".{stage}.partial"
    run_and_kill(phase, steps, 0.01, partial, *command)
    assert list(partial.glob("checkpoints/step-*"))
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step" in result.stderr
    if stage == "distill":
        assert "40 of 40 samples are on disk already" in result.stderr
    assert_equal(folder / stage, other / stage)
    cost = json.loads((other / stage / "ledger.json").read_text())
    assert (cost["attempts"], cost["outcome"]) == (2, "finished")
    assert cost["lost_s"] > 0
    whole = json.loads((folder / stage / "ledger.json").read_text())
    assert cost["tokens_trained"] >= whole["tokens_trained"] > 0
    assert cost["steps"] == whole["steps"]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    finished: tuple, tiny_recipe: Path
) -> None:
    """What RLIMIT_FSIZE does is what a full disk does: some file cannot grow any more."""
    folder, _ = finished
    other = begin_beside(folder, "sft", "full")
    command = ("sft", tiny_recipe, "--set", "name=full", "--set", "stages.sft.train.save_steps=7")
    partial = other / ".sft.partial"
    run_and_kill("supervised", 8, 0.0, partial, *command)
    kept = sorted(partial.glob("checkpoints/*"))
    size = (folder / "sft" / "model.safetensors").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, 2 * size))  # noqa: E731
    process = start(*command, preexec_fn=limit)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "the disk is full" in err.splitlines()[-1]
    assert sorted(partial.glob("checkpoints/*")) == kept
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step 7" in result.stderr
    assert_equal(folder / "sft", other / "sft")


@pytest.mark.slow
def test_a_batch_sampled_ahead_is_kept(finished: tuple, tiny_recipe: Path) -> None:
    """With max_staleness, and all else that has a state: reference, dynamic sampling, biases."""
    folder, _ = finished
    changes = {
        "max_staleness": 1,
        "max_steps": 4,
        "beta": 0.05,
        "reference_refresh_steps": 2,
        "dynamic_sampling": True,
        "bias_update_rate": 0.001,
        "save_steps": 1,
        "rewards": "[{function: reward_of_tests.undecided_for_odd_answers}]",
    }
    sets = [f"--set=stages.grpo.{key}={value}" for key, value in changes.items()]
    sets += ["--skip-doctor"]  # golds mean nothing to this reward
    whole, other = (begin_beside(folder, "grpo", name) for name in ("ahead", "ahead-killed"))
    result = run("grpo", tiny_recipe, "--set", "name=ahead", *sets)
    assert result.returncode == 0, result.stderr[-3000:]
    command = ("grpo", tiny_recipe, "--set", "name=ahead-killed", *sets)
    for phase, steps in (("updating", 1), ("syncing", 2)):
        run_and_kill(phase, steps, 0.02, other / ".grpo.partial", *command)
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_equal(whole / "grpo", other / "grpo")


PHASES = ("sampling", "scoring", "updating", "syncing", "saving")
LONGEST_DELAY_S = {"sampling": 0.7, "scoring": 0.01, "updating": 0.5, "syncing": 0.02, "saving": 0}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's recipe with a shorter cold start and half the prompts a step, and the folder of a
    run of its grpo stage."""
    folder = tmp_path_factory.mktemp("demo")
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    stages = {s.get("name", s["kind"]): s for s in values["stages"]}
    stages["sft"]["train"]["max_steps"] = 150
    stages["grpo"] |= {"max_steps": 16, "save_steps": 2, "prompts_per_step": 32}
    values |= {"runs_dir": str(folder / "runs"), "name": "whole"}
    values["stages"] = [stages[name] for name in ("random", "sft", "grpo")]
    recipe = folder / "demo.yaml"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    result = run("run", recipe, timeout_s=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    return recipe, folder / "runs" / "whole"


@pytest.mark.slow
def test_ten_kills_at_random_moments(demo: tuple[Path, Path]) -> None:
    recipe, folder = demo
    other = begin_beside(folder, "grpo", "killed")
    partial = other / ".grpo.partial"
    command = ("grpo", recipe, "--set", "name=killed")
    moments = random.Random(0)
    phases = moments.sample([*PHASES, *PHASES], k=10)
    seen: set[str] = set()
    for number, phase in enumerate(phases):
        steps = number * 3 // 2 + moments.randint(0, 1)  # of 16
        delay_s = moments.uniform(0, LONGEST_DELAY_S[phase])
        killed = run_and_kill(phase, steps, delay_s, partial, *command)
        seen |= set(re.search(r"killed: (.*)", killed.stderr)[1].split())
    assert seen >= set(PHASES)
    result = run(*command, timeout_s=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_equal(folder / "grpo", other / "grpo")
    assert any(row["grad_norm"] > 0 for row in read_metrics(folder / "grpo"))
