"""The recipe in two processes, as `make run NPROC=2` starts them, against one; and their deaths."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from commands import finish, read_lines, run, run_ranks, start, wait_for
from test_resume import assert_equal

from r1pipe.rollout.store import read_rollouts

pytestmark = pytest.mark.slow

TIMES = ("seconds/", "tokens_per_s", "idle/", "train_", "wall_s", "eval_s", "checkpoint")


def start_two(*arguments: object) -> subprocess.Popen:
    return start(*arguments, program=("-m", "r1pipe.launch", "--nproc-per-node", "2"))


def run_two(*arguments: object) -> subprocess.CompletedProcess:
    return finish(start_two(*arguments), timeout_s=900)  # a collective waits for half an hour


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path) -> Path:
    """A policy from random weights, of an odd vocabulary; three steps of GRPO; a few of SFT, whose
    model then teaches the policy."""
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {s.get("name", s["kind"]): s for s in values["stages"]}
    stages["random"]["tokenizer"]["vocab_size"] = 401
    stages["random"]["model"]["n_routed_experts"] = 5
    stages["grpo"] |= {
        "from": "random",
        "max_steps": 3,
        "prompts_per_step": 5,
        "max_completion_length": 16,
        "learning_rate": 1e-4,
        "rewards": [{"function": "reward_of_tests.own_tokens"}],
        "micro_batch_tokens": 256,
        "routing_replay": True,
    }
    stages["sft"]["train"] |= {"max_steps": 10, "per_device_train_batch_size": 8}
    stages["eval"] |= {"checkpoints": ["grpo", "sft"]}
    stages["eval"]["sampling"]["max_completion_length"] = 16
    stages["taught"] = {
        "kind": "on_policy_distill",
        "name": "taught",
        "from": "sft",
        "student": "grpo",
        "data": stages["grpo"]["data"],
        "max_steps": 2,
        "prompts_per_step": 5,
        "max_completion_length": 16,
        "steps_per_generation": 5,  # of a single sample each: one rank has none
        "learning_rate": 1e-3,
    }
    values["stages"] = [stages[name] for name in ("random", "grpo", "sft", "taught", "eval")]
    values["name"] = "one"
    path = tiny_recipe.with_name("processes.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def both(recipe: Path) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """The folders of the run in one process and in two, and what the latter said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as many as each of the two has
        alone = run("run", recipe)
    assert alone.returncode == 0, alone.stderr[-3000:]
    result = run_two("run", recipe, "--set", "name=two")
    assert result.returncode == 0, result.stderr[-3000:]
    runs = recipe.parent / "runs"
    return runs / "one", runs / "two", result


def without_times(row: dict) -> dict:
    return {
        k: v for k, v in row.items() if not k.startswith(TIMES) and not isinstance(v, str | list)
    }


@pytest.mark.parametrize("stage", ["grpo", "sft", "taught"])
def test_metrics_are_those_of_one_process(stage: str, both: tuple) -> None:
    one, two = (read_lines(folder / stage / "metrics.jsonl") for folder in both[:2])
    assert len(one) == len(two) >= 2
    for expected, row in zip(one, two):
        assert row.keys() == expected.keys()
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert without_times(row) == pytest.approx(without_times(expected), rel=1e-4, abs=1e-5)


def test_rollouts_are_those_of_one_process(both: tuple) -> None:
    one, two = (list(read_rollouts(folder / "grpo")) for folder in both[:2])
    assert len(one) == len(two) == 3 * 5 * 4
    assert [r["completion"] for r in one] == [r["completion"] for r in two]
    assert [r["advantage"] for r in one] == pytest.approx([r["advantage"] for r in two], abs=1e-3)


def test_groups_and_teams(recipe: Path, tmp_path: Path) -> None:
    """Experts in groups, then a row's tokens in teams as well; vLLM is sent the weights of both."""
    values = yaml.safe_load(recipe.read_text())
    values |= {"name": "ungrouped", "runs_dir": str(tmp_path), "stages": values["stages"][:3]}
    random, _, sft = values["stages"]
    random["model"]["n_routed_experts"] = 6
    sft["from"] = "grpo"
    del sft["train"]["sharding"]
    path = tmp_path / "groups.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run("run", path).returncode == 0
    stages, groups = ("grpo", "sft.train"), ("expert_parallel", "sequence_parallel")
    keys = (f"{stage}.{group}" for stage in stages for group in groups)
    changes = ["name=grouped", *(f"stages.{key}=2" for key in keys)]
    result = run_ranks(2, "run", path, *(word for change in changes for word in ("--set", change)))
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in ("grpo", "sft"):
        test_metrics_are_those_of_one_process(stage, (tmp_path / "ungrouped", tmp_path / "grouped"))


def test_a_sharded_checkpoint_is_evaluated_like_any_other(both: tuple) -> None:
    """vLLM reads what two ranks have saved. Tokens may differ where rounding does."""
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in both[:2])
    for expected, entry in zip(one, two, strict=True):
        assert entry.keys() == expected.keys()
        assert entry["mean_tokens"] == pytest.approx(expected["mean_tokens"], rel=0.1)


def test_one_rank_writes_and_speaks(both: tuple) -> None:
    one, two, result = both
    assert sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(
        p.relative_to(two) for p in two.rglob("*")
    )
    assert result.stdout.count("| grpo") == 2  # in the summary and among the costs
    assert result.stderr.count("random: done in") == 1
    assert "Traceback" not in result.stderr


# (stage, signal, to whom)
STOPS = {
    "grpo killed": ("grpo", signal.SIGKILL, "everyone"),
    "sft killed": ("sft", signal.SIGKILL, "everyone"),
    "grpo preempted": ("grpo", signal.SIGTERM, "launcher"),
}


@pytest.mark.parametrize("case", STOPS)
def test_two_processes_resume_bit_equal(case: str, both: tuple, recipe: Path) -> None:
    stage, number, to_whom = STOPS[case]
    _, two, _ = both
    other = two.with_name(case.replace(" ", "-"))
    shutil.copytree(two / "random", other / "random")
    section = "stages.grpo" if stage == "grpo" else "stages.sft.train"
    saving = ("--set", f"{section}.save_steps={'null' if number == signal.SIGTERM else 1}")
    command = (stage, recipe, "--set", f"name={other.name}", *saving)
    partial = other / f".{stage}.partial"
    process = start_two(*command)
    if number == signal.SIGKILL:
        wait_for(lambda: any(partial.glob("checkpoints/step-*")))
    else:
        wait_for(lambda: (partial / "metrics.jsonl").exists())
        wait_for(lambda: read_lines(partial / "metrics.jsonl"))
    launcher = psutil.Process(process.pid)
    targets = launcher.children(recursive=True) if to_whom == "everyone" else []
    for target in [launcher, *targets]:
        target.send_signal(number)
    _, err = process.communicate(timeout=900)
    assert process.returncode == (130 if number == signal.SIGTERM else -number), err
    if number == signal.SIGTERM:
        assert re.search(rf"{stage}: step [12] is saved", err), err  # the one that was running
        assert "interrupted; the same command resumes" in err
    alone = run(*command)
    assert alone.returncode == 2
    assert "saved by 2 processes, and this run has 1" in alone.stderr.splitlines()[-1]
    result = run_ranks(2, *command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step" in result.stderr
    assert_equal(two / stage, other / stage)


def data_file(folder: Path, on_second_rank: str) -> Path:
    """A data recipe that does something else on rank 1."""
    path = folder / "data.py"
    path.write_text(
        "import os, signal\n"
        "def load(split, **options):\n"
        f"    if os.environ.get('RANK') == '1': {on_second_rank}\n"
        "    yield {'id': '1', 'kind': 'math', 'answer': '2', 'solution': '2', 'source': 's',\n"
        "           'prompt': [{'role': 'user', 'content': '1+1?'}]}\n"
    )
    return path


# (what rank 1 does, exit code, words of the line)
ENDS = {
    "killed": ("os.kill(os.getpid(), 9)", 1, "rank 1 was killed (SIGKILL"),
    "user error": ("yield {'id': '1'}", 2, "data.py"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_rank_that_ends_brings_the_other_down(case: str, recipe: Path, tmp_path: Path) -> None:
    action, code, words = ENDS[case]
    result = run_two(
        "init",
        recipe,
        *("--set", f"runs_dir={tmp_path}"),
        *("--set", f"stages.random.tokenizer.data={{recipe: {data_file(tmp_path, action)}}}"),
    )
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("r1pipe: ")]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "one" / "random").exists()
