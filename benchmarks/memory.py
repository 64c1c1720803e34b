"""The memory estimate beside each process's peak, in training, loading and saving.

    .venv/bin/python benchmarks/memory.py

Trains models of about 200 M parameters for two steps on CPU, supervised and by GRPO's update, in
one process and in several (gloo). Peaks are of resident memory, the largest over ranks, minus that
before loading or before saving. So the estimate excludes the process itself and vLLM. Prints a
Markdown table, in GiB.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import ProblemSet
from r1pipe.config.recipe import Recipe
from r1pipe.data.problems import load_problems
from r1pipe.doctor.memory import Devices, estimate_shape
from r1pipe.models import weights
from r1pipe.models.model import build_model
from r1pipe.models.shape import GIB, MASTER, Shape
from r1pipe.models.tokenizer import build_tokenizer, encode_prompt, load_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.pipeline import silence_libraries
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.sft.encode import encode_traces
from r1pipe.sft.trainer import SupervisedTrainer
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.policy import Policy
from r1pipe.types import Problem, Rollout
from r1pipe.utils import distributed

COMMON = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
MODELS = {
    "dense": {
        **COMMON,
        "model_type": "qwen3",
        "num_hidden_layers": 24,
        "intermediate_size": 2560,
        "vocab_size": 16000,
    },
    "mixture": {
        **COMMON,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 12,
        "moe_intermediate_size": 384,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "vocab_size": 16000,
    },
}
# (model, stage, processes, dtype, gradient checkpointing)
CASES = [
    (model, stage, count, dtype, checkpointing)
    for model in MODELS
    for stage in ("sft", "grpo")
    for count, dtype, checkpointing in (
        (1, "float32", False),
        (2, "float32", False),
        (4, "float32", True),
    )
]
COLUMNS = ("model", "stage", "processes", "dtype", "checkpointing")
TOKENS, LENGTH = 1024, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", type=int, help="numbers of cases")
    parser.add_argument("--layers", type=int, help="of smaller models")
    options = parser.parse_args()
    silence_libraries()
    if options.rank_of:
        run_rank(Path(options.rank_of))
        return
    figures = ("estimate", "peak", "peak / estimate", "loading", "saving", "weights in float32")
    print("| " + " | ".join((*COLUMNS, *figures)) + " |")
    print("|" + "---|" * (len(COLUMNS) + len(figures)))
    with tempfile.TemporaryDirectory() as folder:
        cases = [CASES[number] for number in options.only or range(len(CASES))]
        for name in {case[0] for case in cases}:
            layers = {"num_hidden_layers": options.layers} if options.layers else {}
            make_checkpoint(MODELS[name] | layers, Path(folder) / name)
        for case in cases:
            print("| " + " | ".join(measure_case(case, Path(folder))) + " |", flush=True)


def make_checkpoint(settings: dict, folder: Path) -> None:
    problems = load_problems(ProblemSet(recipe="arithmetic", options={"size": 64}))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)
    save_checkpoint(build_model(settings, tokenizer, seed=0), tokenizer, folder)


def measure_case(case: tuple, folder: Path) -> list[str]:
    (folder / "case.json").write_text(json.dumps(case))
    processes = case[2]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(["-m", *launch] if processes > 1 else []), __file__, "--rank-of", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, env=environment)
    peaks = json.loads((folder / "peaks.json").read_text())
    estimate, weights = peaks["estimate"], peaks["weights"]
    ratio = f"{max(peaks['train']) / estimate:.2f}"
    sizes = [f"{max(peaks[phase]) / GIB:.2f}" for phase in ("train", "load", "save")]
    texts = [str(value) for value in case[:4]] + ["on" if case[4] else "off"]
    return [*texts, f"{estimate / GIB:.2f}", sizes[0], ratio, *sizes[1:], f"{weights / GIB:.2f}"]


def run_rank(folder: Path) -> None:
    """Load, train and save; rank 0 writes peaks.json: by phase, a peak per rank."""
    torch.set_num_threads(1)
    name, kind, processes, dtype, checkpointing = json.loads((folder / "case.json").read_text())
    with distributed.joined("cpu"):
        recipe = make_recipe(kind, str(folder / name), dtype, checkpointing)
        stage, device = recipe.stages[0], torch.device("cpu")
        tokenizer = load_tokenizer(stage.from_)
        peaks, start = {}, resident("VmRSS")

        def measure(phase: str, work: Callable[[], object]) -> object:
            gc.collect()
            # Saving counts from the memory before it.
            held = resident("VmRSS") if phase == "save" else start
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            result = work()
            peaks[phase] = distributed.gather(resident("VmHWM") - held)
            return result

        root = measure(
            "load",
            lambda: load_sharded(stage.from_, device, "sdpa", Policy, dtype=dtype),
        )
        model = root.model
        shape = Shape.of(model.config)
        if kind == "grpo":
            updater = GrpoUpdater(root, None, stage, dtype=dtype, seed=0)
            measure("train", lambda: [updater.step(make_samples(), n, check) for n in (1, 2)])
        else:
            trainer = SupervisedTrainer(root, stage.train, num_steps=2, dtype=dtype)
            traces = encode_traces(make_rows(tokenizer), tokenizer, None).rows
            events = EventLog(Path(tempfile.mkdtemp(dir=folder)))
            measure("train", lambda: [trainer.take_step(traces, n, "sft", events) for n in (1, 2)])
        # In several files, like a model above 4 GiB.
        weights.MAX_FILE_BYTES = 2**27
        saved = folder / "saved" / str(distributed.rank())
        saved.mkdir(parents=True, exist_ok=True)
        measure("save", lambda: save_checkpoint(model, tokenizer, saved))
        parts = estimate_shape(stage, recipe, shape, Devices(processes, 64 * GIB, False)).parts
        counted = [size for part, size in parts.items() if part not in OTHERS]
        peaks |= {"estimate": sum(counted), "weights": MASTER * shape.parameters}
        if distributed.is_first():
            (folder / "peaks.json").write_text(json.dumps(peaks))


OTHERS = ("process", "vLLM", "KV cache")


def make_recipe(kind: str, checkpoint: str, dtype: str, checkpointing: bool) -> Recipe:
    stage = {"kind": kind, "from": checkpoint, "data": {"recipe": "arithmetic"}}
    if kind == "sft":
        stage["train"] = {
            "max_steps": 2,
            "max_length": LENGTH,
            "micro_batch_tokens": TOKENS,
            "gradient_checkpointing": checkpointing,
        }
    else:
        stage |= {
            "rewards": [{"function": "rewards.math_correct"}],
            "max_steps": 2,
            "prompts_per_step": 4,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "micro_batch_tokens": TOKENS,
            "gradient_checkpointing": checkpointing,
        }
    recipe = {"name": "memory", "dtype": dtype, "device": "cpu", "stages": [stage]}
    return Recipe.model_validate(recipe)


def make_rows(tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """One step's rows of LENGTH tokens, one per character. TOKENS tokens per process."""
    rows = []
    size = distributed.world_size() * TOKENS // LENGTH
    for problem in load_problems(ProblemSet(recipe="arithmetic", options={"size": size})):
        left = LENGTH - len(encode_prompt(tokenizer, problem.prompt)) - 1
        rows.append(replace(problem, solution="=" * left))
    return rows


def make_samples() -> list[Sample]:
    """Two micro-batches per rank."""
    rng = random.Random(distributed.rank())
    samples = []
    for _ in range(2 * TOKENS // LENGTH):
        ids = [rng.randrange(5, 300) for _ in range(LENGTH)]
        rollout = Rollout("", 0, ids[:28], ids[28:], [-5.0] * (LENGTH - 28), "", "stop")
        samples.append(Sample(rollout, rng.choice([-1.0, 1.0])))
    return samples


def check(metrics: dict[str, float]) -> None:
    """Passes always: made-up samples are not from the policy."""


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


if __name__ == "__main__":
    main()
