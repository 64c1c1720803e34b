"""A run folder with the files of finished stages, made without running any."""

import json
from pathlib import Path

from r1pipe.config.recipe import KeptRollouts
from r1pipe.rollout.store import RolloutFiles
from r1pipe.utils.jsonl import write_jsonl, write_text

FUNCTIONS = ("rewards.math_correct", "rewards.format")
SOURCE = {"data": {"recipe": "arithmetic", "stage": None}}

TIMES = {
    "seconds/step": 4.0,
    "staleness/tokens": [30, 10],
    "idle/engine_0": 0.25,
    "idle/judges": 0.75,
    "idle/trainer": 0.75,
    "timeline": [
        ["engine_0", "sampling", 0.0, 3.0],
        ["judges", "scoring", 2.0, 3.0],
        ["trainer", "update", 3.0, 3.8],
        ["trainer", "sync", 3.8, 4.0],
    ],
}


def write_run(
    run: Path, num_steps: int = 6, num_prompts: int = 4, num_samples: int = 4, beta: float = 0.0
) -> Path:
    """sft, then grpo with more and more correct samples, then eval."""
    write_stage(run / "sft", "sft", {**SOURCE, "from": "random"}, wall_s=12.5)
    metrics = [{"step": step, "loss": 3 / step} for step in range(1, num_steps + 1)]
    write_jsonl(run / "sft" / "metrics.jsonl", metrics)

    grpo = write_stage(run / "grpo", "grpo", {**SOURCE, "from": "sft", "beta": beta}, wall_s=90.0)
    files = RolloutFiles(grpo, KeptRollouts())
    metrics = []
    for step in range(1, num_steps + 1):
        rows = [
            describe_sample(problem, sample, right=sample * num_steps < step * num_samples)
            for problem in range(num_prompts)
            for sample in range(num_samples)
        ]
        files.write(step, [add_tokens(row) for row in rows], {})
        reward = sum(row["reward"] for row in rows) / len(rows)
        load = {"experts/max_violation": 0.5, "experts/layer_1/load": [1.5, 0.5, 1.0, 1.0]}
        metrics.append(
            {"step": step, "reward": reward, "entropy": None, "mfu": 0.4, **load, **TIMES}
        )
    write_jsonl(grpo / "metrics.jsonl", metrics)
    event = {"step": 2, "check": "kl", "value": 0.5, "limit": 0.1, "action": "warn", "says": "far"}
    write_jsonl(grpo / "events.jsonl", [event])

    measured = write_stage(run / "eval", "eval", {"checkpoints": ["sft", "grpo"]}, wall_s=5.0)
    summary, results = [], []
    for name, right in (("sft", False), ("grpo", True)):
        samples = [describe_sample(problem, 0, right) for problem in range(num_prompts)]
        write_jsonl(measured / f"samples_{name}.jsonl", samples)
        summary.append(describe_evaluation(name, float(right)))
        results += [describe_result(name, problem, right) for problem in range(num_prompts)]
    write_jsonl(measured / "results.jsonl", results)
    for folder in (measured, run):
        write_text(folder / "summary.json", json.dumps(summary))
    return run


def write_stage(folder: Path, kind: str, settings: dict, wall_s: float) -> Path:
    folder.mkdir(parents=True)
    finished = f"2026-01-0{1 + ('sft', 'grpo', 'eval').index(kind)}T00:00:00Z"
    record = {"stage": kind, "kind": kind, "settings": settings, "wall_s": wall_s}
    record["finished"] = finished
    write_text(folder / "stage.json", json.dumps(record))
    return folder


def describe_sample(problem: int, sample: int, right: bool) -> dict:
    ending = f"</think>\\boxed{{{problem}}}" if right else "</think>a guess </script><b>"
    return {
        "problem_id": f"p{problem}",
        "sample": sample,
        "prompt": f"How many apples are {problem} apples?",
        "answer": str(problem),
        "completion": f"<think>I count {problem} & more.{ending}",
        "finish_reason": "stop",
        "num_tokens": 20 + sample,
        "rewards": dict(zip(FUNCTIONS, (float(right), 1.0))),
        "reward": 0.2 + right,
    }


def describe_result(checkpoint: str, problem: int, right: bool) -> dict:
    return {
        "stage": checkpoint,
        "dataset": "arithmetic/test",
        "problem_id": f"p{problem}",
        "category": "",
        "num_samples": 1,
        "num_right": int(right),
        "majority_right": right,
        "mean_tokens": 20.0,
    }


def add_tokens(row: dict) -> dict:
    tokens = {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-0.5], "routes": None}
    return {**row, "group": 0, "advantage": 0.0, "used": True, **tokens}


def describe_evaluation(name: str, pass_at_1: float) -> dict:
    return {
        "stage": name,
        "dataset": "arithmetic/test",
        "num_problems": 4,
        "num_samples": 1,
        "temperature": 0.6,
        "top_p": 0.95,
        "k": 1,
        "pass_at_1": pass_at_1,
        "ci_low": 0.0,
        "ci_high": 1.0,
        "pass_at_k": pass_at_1,
        "maj_at_k": pass_at_1,
        "format_rate": 1.0,
        "mean_tokens": 20.0,
        "truncated": 0.0,
        "overlap": None,
        "samples": f"samples_{name}.jsonl",
        "compared_with": None,
    }


CALL = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "0"}'}}


def write_episode(grpo: Path, step: int) -> None:
    """A step of one rollout of two turns."""
    messages = [
        {"role": "assistant", "content": "<tool_call>0</tool_call>", "tool_calls": [CALL]},
        {"role": "tool", "name": "calculator", "content": "0, said the tool"},
        {"role": "assistant", "content": "<think>As it says.</think>none"},
    ]
    episode = {"given": [[1, 2]], "messages": messages, "reward": None, "ended": "done"}
    row = describe_sample(0, 0, right=True) | {"prompt": "An episode?", "episode": episode}
    RolloutFiles(grpo, KeptRollouts()).write(step, [add_tokens(row)], {})
