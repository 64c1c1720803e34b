"""Environments written for other trainers, in runs of ours."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from commands import ROOT, read_lines, run
from test_engine import LIMIT
from test_environments import PROBLEMS, save_talker, teach

from r1pipe.config.base import Environment, ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.envs.base import make_environment
from r1pipe.models.tokenizer import load_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rollout.store import read_rollouts
from r1pipe.types import Problem

CALLS = '<tool_call>{"name": "compare", "arguments": {"number": 42}}</tool_call>'


TAUGHT = ("same_completion", "entropy", "identical_groups")
"""Checks of the breaker that a model fails which was taught to say one thing."""


def save_caller(folder: Path, completion: str, problems: list[Problem], environment: dict) -> None:
    """A model that answers these problems so in this environment."""
    save_talker(folder)
    tokenizer = load_tokenizer(str(folder))
    tools = make_environment(Environment(**environment), problems[0]).tools
    model = teach(tokenizer, completion, problems, tools)
    save_checkpoint(model, tokenizer, folder)


def train(
    folder: Path,
    data: dict,
    environment: dict,
    rewards: Sequence[str] = (),
    run: Callable[..., subprocess.CompletedProcess] = run,
) -> tuple[list[dict], list[dict]]:
    """Two steps of GRPO; metrics and rollouts."""
    stage = {
        "kind": "grpo",
        "from": str(folder / "caller"),
        "data": data,
        "environment": {"max_turns": 3, **environment},
        "rewards": [{"function": name} for name in rewards],
        "max_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 160,
        "learning_rate": 1e-4,
        "breaker": {check: {"action": "ignore"} for check in TAUGHT},
    }
    engine = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    recipe = {"name": "run", "runs_dir": str(folder), "engine": engine, "dtype": "float32"}
    (folder / "run.yaml").write_text(yaml.safe_dump({**recipe, "stages": [stage]}))
    result = run("grpo", folder / "run.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_lines(folder / "run" / "grpo" / "metrics.jsonl")
    assert all(row["sampler/logprob_diff_mean"] < LIMIT for row in metrics)
    return metrics, list(read_rollouts(folder / "run" / "grpo", [1, 2]))


@pytest.mark.slow
def test_a_class_for_trl_is_learnt_from(tmp_path: Path) -> None:
    asked = [
        Problem(p.id, p.kind, [{"role": "user", "content": f"{p.question} Compare."}], p.answer)
        for p in PROBLEMS
    ]
    options = {"factory": "envs_of_tests.Guess"}
    environment = {"name": "trl", "options": options, "tool_parser": "hermes"}
    save_caller(tmp_path / "caller", CALLS, asked, environment)
    data = {"recipe": "arithmetic", "options": {"size": 8}}
    metrics, rows = train(tmp_path, data, environment)
    called = [row for row in rows if row["episode"]["num_tool_calls"]]
    assert len(called) > len(rows) / 2
    for row in called:
        results = [m["content"] for m in row["episode"]["messages"] if m["role"] == "tool"]
        assert results[0] == ("more" if int(row["answer"]) < 42 else "not more")
        assert row["rewards"]["environment"] == row["episode"]["num_tool_calls"] == row["reward"]
    assert all(row["episodes/tool_calls"] > 0.5 for row in metrics)


@pytest.mark.slow
def test_reasoning_gym_rows_are_played_with_tools(tmp_path: Path) -> None:
    """An answer without a call is a path of one turn, judged by the task's own scorer."""
    pytest.importorskip("reasoning_gym")
    options = {"task": "chain_sum", "config": {"min_terms": 2, "max_terms": 2}, "size": 8}
    options["system"] = None
    data = {"recipe": "reasoning_gym", "options": options}
    problems = load_problems(ProblemSet(**data))
    gold = problems[0].answer
    environment = {"name": "tools", "tool_parser": "hermes"}
    save_caller(tmp_path / "caller", f"<answer>{gold}</answer>", problems, environment)
    _, rows = train(tmp_path, data, environment, ["rewards.reasoning_gym_score"])
    answered = [row for row in rows if row["completion"] == f"<answer>{gold}</answer>"]
    assert len(answered) > len(rows) / 2
    for row in answered:
        assert (row["episode"]["ended"], row["episode"]["given"]) == ("done", [])
        assert (row["reward"] == 1.0) == (row["answer"] == gold)
    assert {row["answer"] == gold for row in answered} == {True, False}


PACKAGES = Path(__file__).with_name("verifiers_packages.txt")
UNREACHABLE = ("Could not find a version", "Connection", "Temporary failure", "Max retries")


def install(folder: Path, *packages: object) -> Path:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    result = subprocess.run([*command, *packages], capture_output=True, text=True)
    if result.returncode and any(sign in result.stderr for sign in UNREACHABLE):
        pytest.skip(f"no package registry: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("verifiers"), "-r", PACKAGES)


def run_with(packages: Path, *command: object) -> subprocess.CompletedProcess:
    """Python, with packages that are not in its environment."""
    tests = ROOT / "tests"
    folders = [packages, ROOT, tests, tests / "pipeline", tests / "unit" / "envs"]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, folders))},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_adapter_of_verifiers_with_the_package(installed: Path) -> None:
    test = "tests/unit/envs/test_verifiers_environment.py"
    result = run_with(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", test)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "1 skipped" in result.stdout, "only that of a missing package"


COUNTED = {"recipe": "verifiers", "options": {"env": "verifiers_of_tests.counted"}}


def save_counted_caller(folder: str) -> None:
    problems = load_problems(ProblemSet(**COUNTED))
    call = CALLS.replace("compare", "double")
    save_caller(Path(folder), call, problems, {"name": "verifiers"})


@pytest.mark.slow
def test_an_environment_of_verifiers_is_learnt_from(installed: Path, tmp_path: Path) -> None:
    code = "import test_adapters, sys; test_adapters.save_counted_caller(sys.argv[1])"
    result = run_with(installed, "-c", code, tmp_path / "caller")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics, rows = train(
        tmp_path,
        COUNTED,
        {"name": "verifiers", "tool_parser": "hermes"},
        run=lambda *command: run_with(installed, "-m", "r1pipe", *command),
    )
    called = [row for row in rows if row["episode"]["num_tool_calls"]]
    assert len(called) > len(rows) / 2
    for row in called:
        results = [m["content"] for m in row["episode"]["messages"] if m["role"] == "tool"]
        assert results[0] == "84"
        assert row["rewards"]["environment"] == len(results) == row["reward"]
    assert all(row["episodes/tool_calls"] > 0.5 for row in metrics)


@pytest.mark.slow
def test_verifiers_without_classic_environments_is_one_line(tmp_path: Path) -> None:
    packages = install(tmp_path / "verifiers", "verifiers==0.4.0")
    stage = {"kind": "grpo", "from": str(tmp_path), "max_steps": 1, "prompts_per_step": 1}
    stage |= {"learning_rate": 1e-4, "num_generations": 2, "max_completion_length": 9}
    stage["data"] = {"recipe": "verifiers", "options": {"env": "wordle"}}
    stage["environment"] = {"name": "verifiers"}
    recipe = {"name": "run", "runs_dir": str(tmp_path), "stages": [stage]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    result = run_with(packages, "-m", "r1pipe", "grpo", tmp_path / "run.yaml")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "verifiers 0.4.0 has no classic environments: pip install" in result.stderr
    assert "Traceback" not in result.stderr
