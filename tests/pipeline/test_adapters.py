"""Environments written for other trainers, in runs of ours."""

from pathlib import Path

import yaml
from commands import read_lines, run
from test_engine import LIMIT
from test_environments import PROBLEMS, save_talker, teach

from r1pipe.config.base import Environment
from r1pipe.envs.base import make_environment
from r1pipe.models.tokenizer import load_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rollout.store import read_rollouts
from r1pipe.types import Problem

CALLS = '<tool_call>{"name": "compare", "arguments": {"number": 42}}</tool_call>'


def save_caller(folder: Path, completion: str, problems: list[Problem], environment: dict) -> None:
    """A model that answers these problems so in this environment."""
    save_talker(folder)
    tokenizer = load_tokenizer(str(folder))
    tools = make_environment(Environment(**environment), problems[0]).tools
    model = teach(tokenizer, completion, problems, tools)
    save_checkpoint(model, tokenizer, folder)


def train(folder: Path, data: dict, environment: dict) -> tuple[list[dict], list[dict]]:
    """Two steps of GRPO; metrics and rollouts."""
    stage = {
        "kind": "grpo",
        "from": str(folder / "caller"),
        "data": data,
        "environment": {"max_turns": 3, **environment},
        "max_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 160,
        "learning_rate": 1e-4,
    }
    engine = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.25}
    recipe = {"name": "run", "runs_dir": str(folder), "engine": engine, "dtype": "float32"}
    (folder / "run.yaml").write_text(yaml.safe_dump({**recipe, "stages": [stage]}))
    result = run("grpo", folder / "run.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_lines(folder / "run" / "grpo" / "metrics.jsonl")
    assert all(row["sampler/logprob_diff_mean"] < LIMIT for row in metrics)
    return metrics, list(read_rollouts(folder / "run" / "grpo", [1, 2]))


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
