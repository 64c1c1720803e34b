"""Sampling and whole GRPO steps on CPU: one engine in the trainer's process with one thread and
with two, and a fleet of two engines of one core each, on the demo's model.

    .venv/bin/python benchmarks/fleet.py                  # on a machine of two cores
    .venv/bin/python benchmarks/fleet.py --sides processes ray --rounds 5

Each side is a process that stays open; they take turns, so a drift of the machine's speed slows
all. Weights are random, and completions end at random, at 56 tokens at the latest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from common.workload import Workload, describe_step, load_rows, load_updater

from r1pipe.config.recipe import SamplerPlace
from r1pipe.rl.batch import Batch
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.grpo_collect import GrpoCollector
from r1pipe.rl.loop import train
from r1pipe.rl.prefetch import Prefetcher
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.engines import Engines
from r1pipe.rollout.fleet import Fleet
from r1pipe.rollout.scoring import Scorer
from r1pipe.trainer.breaker import Breaker, EventLog

SIDES = {"1 thread": 1, "2 threads": 2, "processes": 2, "ray": 2}
"""With the trainer's threads."""
TASKS = ("sample", "step")
NUM_SAMPLED = 256
DIVISORS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, make_workload(options.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_workload(folder).make_checkpoint()
        sides = {side: start(side, folder) for side in options.sides}
        found: dict[tuple[str, str], list[dict]] = {}
        try:
            ready = {side: ask(process) for side, process in sides.items()}
            for number in range(options.rounds + 1):
                for task in TASKS:
                    # A B C, C B A, ...: none always runs after the same one.
                    for side in options.sides if number % 2 == 0 else options.sides[::-1]:
                        figures = ask(sides[side], task) | {"load": os.getloadavg()[0]}
                        print(f"{number} {side} {task}: {figures}", file=sys.stderr)
                        if number:
                            found.setdefault((side, task), []).append(figures)
        finally:
            for process in sides.values():
                process.stdin.close()
                process.wait()
    print_table(options.sides, ready, found)


def start(side: str, folder: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--side", side, "--folder", folder]
    environment = os.environ | {"OMP_NUM_THREADS": str(SIDES[side]), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def ask(process: subprocess.Popen, task: str = "") -> dict:
    if task:
        process.stdin.write(f"{task}\n")
        process.stdin.flush()
    return json.loads(next(line for line in process.stdout if line.startswith("{")))


def print_table(sides: list[str], ready: dict[str, dict], found: dict) -> None:
    print("| side | ready, s | tokens/s of 256 sequences | speed | GRPO step, s | speed |")
    print("|---|---|---|---|---|---|")
    columns = (("sample", "tokens_per_s"), ("step", "step"))
    medians = {
        (side, task): statistics.median(row[key] for row in found[side, task])
        for side in sides
        for task, key in columns
    }
    below = []
    for side in sides:
        cells = []
        for task, key in columns:
            values = [row[key] for row in found[side, task]]
            ratio = medians[side, task] / medians[sides[0], task]
            ratio = ratio if task == "sample" else 1 / ratio
            cells += [f"{medians[side, task]:.4g} ({min(values):.4g}-{max(values):.4g})"]
            cells += [f"{ratio:.2f} x"]
        print(f"| {side} | {ready[side]['ready_s']:.1f} | {' | '.join(cells)} |")
        rates = list(zip(*(row["per_cpu_s"] for row in found[side, "sample"])))
        told = [
            f"{statistics.median(r):.0f} of {NUM_SAMPLED // n}" for n, r in zip(DIVISORS, rates)
        ]
        below += [f"{side}: {', '.join(told)}"] if told else []
    print("\nTokens by CPU second of the busiest engine, for which a busy machine does not matter:")
    print(*below, sep="\n")


# --- One side -------------------------------------------------------------------------------------


def make_workload(folder: str) -> Workload:
    """The demo's model and step, from random weights whose completions end at random."""
    demo = yaml.safe_load((Path(__file__).parents[1] / "configs" / "demo.yaml").read_text())
    return Workload(
        folder=folder,
        settings=demo["stages"][0]["model"],
        device=torch.device("cpu"),
        prompts=64,
        generations=8,
        max_completion_length=56,
        mean_length=60,
        steps=10_000,
        kv_cache_gib=0.5,
    )


def serve(side: str, work: Workload) -> None:
    """Answers "sample" and "step" on stdin."""
    place = SamplerPlace()
    if side in ("processes", "ray"):
        place = SamplerPlace(kind="fleet", engines=2, ray="auto" if side == "ray" else None)
    started = time.perf_counter()
    engines = Engines(work.engine, "float32", work.device, place=place)
    sampler = engines.open(work.folder)
    print(json.dumps({"ready_s": time.perf_counter() - started}), flush=True)
    steps = take_steps(work, sampler)
    try:
        for number, line in enumerate(sys.stdin):
            if line.strip() == "step":
                metrics, _ = next(steps)
                print(json.dumps(describe_step(metrics)), flush=True)
                continue
            figures = {"tokens_per_s": sample(work, sampler, number, 1, time.perf_counter)}
            clock = partial(read_cpu_seconds, sampler)
            # Sums over threads say nothing of how long two take.
            divisors = () if side == "2 threads" else DIVISORS if side == "1 thread" else (1,)
            figures["per_cpu_s"] = [sample(work, sampler, number, n, clock) for n in divisors]
            print(json.dumps(figures), flush=True)
    finally:
        engines.close()


def read_cpu_seconds(sampler: Sampler) -> float:
    """Of the process of the busiest engine so far."""
    if not isinstance(sampler, Fleet):
        return time.process_time()
    texts = [Path(f"/proc/{member.process}/stat").read_text() for member in sampler.members]
    ticks = max(sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in texts)
    return ticks / os.sysconf("SC_CLK_TCK")


def sample(
    work: Workload, sampler: Sampler, seed: int, divisor: int, clock: Callable[[], float]
) -> float:
    """Tokens a second of this part of the sequences."""
    problems = load_rows()[: NUM_SAMPLED // work.generations // divisor]
    started = clock()
    rollouts = sampler.generate(problems, work.generations, work.stage.sampling, (seed,))
    return sum(rollout.num_tokens for rollout in rollouts) / (clock() - started)


def take_steps(work: Workload, sampler: Sampler) -> Iterator[tuple[dict, Batch]]:
    stage, updater = work.stage, load_updater(work)
    collector = GrpoCollector(stage, sampler, Scorer(stage.rewards), Prompts(load_rows(), 0))
    batches = Prefetcher(collector, stage)
    folder = Path(tempfile.mkdtemp(dir=work.folder))
    return train(stage, updater, sampler, batches, Breaker(stage, EventLog(folder), folder), 1)


if __name__ == "__main__":
    main()
