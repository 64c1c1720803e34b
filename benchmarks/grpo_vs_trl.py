"""GRPO steps of TRL's GRPOTrainer and of r1pipe, on the same model, problems and batch sizes.

    .venv/bin/python benchmarks/grpo_vs_trl.py                 # sampling and training
    .venv/bin/python benchmarks/grpo_vs_trl.py --update-only   # training alone, also without vLLM
    .venv/bin/python benchmarks/grpo_vs_trl.py --max-staleness 1   # r1pipe samples while it trains

Blocks of steps alternate between the two, each in its own process, so a drift of the machine's
speed slows both; the first step of a block is a warm-up and is not counted. Completion lengths are
geometric, 10 times apart between the 10th and 90th percentile, like a policy's. Both take one
optimizer step per batch, `loss_type` dapo, no KL term. common/trl_steps.py says what had to be
repaired for TRL to run on CPU.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from common.trl_steps import run_trl
from common.workload import (
    Workload,
    describe_step,
    device_name,
    load_updater,
    make_rollouts,
    measure_matmul,
    peak_gib,
    run_ours,
    time_update,
)
from transformers import AutoConfig

from r1pipe.models.flops import train_flops
from r1pipe.models.model import pick_device
from r1pipe.utils import distributed
from r1pipe.utils.threads import available_cores

MODELS = {
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    },
}
SIDES = ("r1pipe", "TRL")


def main() -> None:
    options = parse_options()
    if options.side:
        if options.cpu_time:
            time.perf_counter = time.process_time
        with contextlib.redirect_stdout(sys.stderr):
            steps = run_side(options)
        if distributed.is_first():
            print(json.dumps({"steps": steps[1:], "peak_gib": peak_gib()}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_workload(options, folder).make_checkpoint()
        blocks: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(options.blocks):
            # A B, B A, ...: neither always runs second.
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                blocks[side].append(run_block(options, side, folder))
                print(f"block {number + 1} of {options.blocks}: {side} done", file=sys.stderr)
    print_tables(options, blocks)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--update-only", action="store_true", help="made-up rollouts, no vLLM")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a block, the first not counted")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-completion-length", type=int, default=256)
    parser.add_argument("--trl-batch", type=int, default=8, help="completions in a TRL micro-batch")
    parser.add_argument("--trl-eager", action="store_true", help="TRL's engine compiles nothing")
    parser.add_argument("--processes", type=int, default=1, help="of either side, a core each")
    parser.add_argument(
        "--max-staleness", type=int, default=0, help="of r1pipe, in one process and an engine's"
    )
    parser.add_argument("--micro-batch-tokens", type=int, help="of r1pipe; default: as in a recipe")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of CPU time, not the clock's: on a busy machine, with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.update_only and options.processes > 1:
        parser.error("--update-only: of one process")
    return options


def run_block(options: argparse.Namespace, side: str, folder: str) -> dict:
    command = [__file__, *sys.argv[1:], "--side", side, "--folder", folder]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    if side == "r1pipe" and options.max_staleness:
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() - 1))  # one is the engine's
    elif options.processes > 1:
        count = ["--nproc-per-node", str(options.processes)]
        command = ["-m", "torch.distributed.run", "--standalone", *count, *command]
        environment["OMP_NUM_THREADS"] = "1"
    command.insert(0, sys.executable)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_workload(options: argparse.Namespace, folder: str) -> Workload:
    return Workload(
        folder=folder,
        settings=MODELS[options.model],
        device=pick_device("auto"),
        prompts=options.prompts,
        generations=options.generations,
        max_completion_length=options.max_completion_length,
        steps=options.steps,
        micro_batch_tokens=options.micro_batch_tokens,
        trl_batch=options.trl_batch,
        trl_eager=options.trl_eager,
        processes=options.processes,
        max_staleness=options.max_staleness,
    )


def run_side(options: argparse.Namespace) -> list[dict]:
    work = make_workload(options, options.folder)
    if options.side == "TRL":
        return run_trl(work, update_only=options.update_only)
    if not options.update_only:
        return [describe_step(metrics) for metrics in run_ours(work)]
    updater = load_updater(work)
    return [time_update(updater, make_rollouts(work, n), n) for n in range(work.steps)]


# --- Figures --------------------------------------------------------------------------------------


def print_tables(options: argparse.Namespace, blocks: dict[str, list[dict]]) -> None:
    steps = {side: [s for block in blocks[side] for s in block["steps"]] for side in SIDES}
    what = "update only" if options.update_only else "whole steps"
    print(
        f"{options.model}, {what}, {options.prompts} prompts x {options.generations} samples of at "
        f"most {options.max_completion_length} tokens; {device_name()}, "
        f"{options.processes} processes; {options.blocks} blocks of {options.steps - 1} steps\n"
    )
    rows = list(list_figures(options, steps, blocks))
    print("| figure, median over steps | r1pipe | TRL | ratio |\n|---|---|---|---|")
    for name, ours, theirs, more_is_better in rows:
        ratio = ours / theirs if more_is_better else theirs / ours
        print(f"| {name} | {ours:,.3g} | {theirs:,.3g} | {ratio:.2f} |")
    if not options.update_only:
        print("\n| share of the step | sample | score | update | sync |\n|---|---|---|---|---|")
        for side in SIDES:
            shares = [
                statistics.median(s[phase] / s["step"] for s in steps[side])
                for phase in ("sample", "score", "update", "sync")
            ]
            print(f"| {side} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    print_matmul_share(options, steps)


def list_figures(
    options: argparse.Namespace, steps: dict[str, list[dict]], blocks: dict[str, list[dict]]
) -> Iterator[tuple[str, float, float, bool]]:
    """Name, ours, theirs, whether more is better."""

    def median(figure: Callable[[dict], float]) -> tuple[float, float]:
        ours, theirs = (statistics.median(map(figure, steps[side])) for side in SIDES)
        return ours, theirs

    yield "step, s", *median(lambda s: s["step"]), False
    yield (
        "tokens trained a second of the step",
        *median(lambda s: s["tokens_trained"] / s["step"]),
        True,
    )
    if not options.update_only:
        yield (
            "tokens sampled a second of sampling",
            *median(lambda s: s["tokens_sampled"] / s["sample"]),
            True,
        )
        yield (
            "tokens trained a second of updating",
            *median(lambda s: s["tokens_trained"] / s["update"]),
            True,
        )
    peaks = (max(block["peak_gib"] for block in blocks[side]) for side in SIDES)
    yield "peak memory of a process, GiB", *peaks, False


def print_matmul_share(options: argparse.Namespace, steps: dict[str, list[dict]]) -> None:
    """Model FLOPs, attention between tokens left out, against the rate of a large product."""
    device, settings = pick_device("auto"), {**MODELS[options.model], "vocab_size": 512}
    flops = train_flops(AutoConfig.for_model(**settings), [1])
    rate = measure_matmul(device, 8192 if device.type == "cuda" else 1536)
    for side in SIDES:
        achieved = statistics.median(flops * s["tokens_trained"] / s["update"] for s in steps[side])
        print(
            f"\n{side}: the update achieves {achieved / 1e9:,.0f} GFLOP/s, {achieved / rate:.0%} "
            f"of the {rate / 1e9:,.0f} GFLOP/s of a large matrix product here"
        )


if __name__ == "__main__":
    main()
