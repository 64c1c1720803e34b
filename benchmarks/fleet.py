"""Sampling and whole GRPO steps on CPU: one engine in the trainer's process with one thread and
with two, and a fleet of two engines of one core each, on the demo's model.

    .venv/bin/python benchmarks/fleet.py                  # on a machine of two cores
    .venv/bin/python benchmarks/fleet.py --sides processes ray --rounds 5
    .venv/bin/python benchmarks/fleet.py --predict --sides processes    # a step, and simulated
    .venv/bin/python benchmarks/fleet.py --simulate       # what pays off on 8, 64 and 512 GPUs

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
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from common.simulation import Plan, Rates, draw_again, simulate
from common.splits import GPUS, SYNC_S, print_splits
from common.workload import Workload, describe_step, load_rows, load_updater, time_update

from r1pipe.config.recipe import SamplerPlace
from r1pipe.rl.batch import Batch
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.grpo_collect import GrpoCollector
from r1pipe.rl.loop import sync, train
from r1pipe.rl.prefetch import Prefetcher
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.engines import Engines
from r1pipe.rollout.fleet import Fleet
from r1pipe.rollout.scoring import Scorer
from r1pipe.trainer.breaker import Breaker, EventLog
from r1pipe.utils import timeline

SIDES = {"1 thread": 1, "2 threads": 2, "processes": 2, "ray": 2}
"""With the trainer's threads."""
TASKS = ("sample", "step")
NUM_SAMPLED = 256
DIVISORS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--max-staleness", type=int, default=0, help="above 1: in flight")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    parser.add_argument("--run", type=Path, help="simulate: the lengths of its rollouts")
    parser.add_argument("--sync-s", type=float, default=SYNC_S)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, make_workload(options.folder, options.max_staleness))
        return
    if options.simulate:
        print_splits(options.gpus, options.run, options.sync_s)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_workload(folder).make_checkpoint()
        if options.predict:
            print_predictions(options.sides, options.rounds, folder, options.max_staleness)
            return
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


def start(side: str, folder: str, max_staleness: int = 0) -> subprocess.Popen:
    command = [sys.executable, __file__, "--side", side, "--folder", folder]
    command += ["--max-staleness", str(max_staleness)]
    environment = os.environ | {"OMP_NUM_THREADS": str(SIDES[side]), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def ask(process: subprocess.Popen, task: str = "") -> dict:
    if task:
        process.stdin.write(f"{task}\n")
        process.stdin.flush()
    return json.loads(next(line for line in process.stdout if line.startswith("{")))


def print_predictions(sides: list[str], rounds: int, folder: str, max_staleness: int) -> None:
    """Rates from sampling, updating and syncing by themselves, of half a step's samples at most;
    the step that the simulation makes of them; and steps as they are."""
    print("| side | part | predicted, s | measured, s | ratio |\n|---|---|---|---|---|")
    for side in sides:
        process = start(side, folder, max_staleness)
        ask(process)
        found = ask(process, "calibrate")
        rates = fit_rates(found)
        plan = Plan(found["engines"], found["groups"], max_staleness, max_staleness > 1)
        if max_staleness:  # all at once, on cores that they share
            cores = len(os.sched_getaffinity(0))
            rates = replace(rates, cores=cores, trainer_threads=SIDES[side])
        outcome = simulate(rates, plan, draw_again(found["lengths"]), num_steps=50)
        predicted = {"step": outcome.step_s, "sync": rates.sync_s}
        predicted["update"] = outcome.step_s * (1 - outcome.trainer_idle)
        if not max_staleness:
            predicted["sample"] = outcome.step_s - predicted["update"] - predicted["sync"]
        for _ in range(1 + max_staleness):  # not counted
            ask(process, "step")
        steps = [ask(process, "step") for _ in range(rounds)]
        process.stdin.close()
        process.wait()
        for part in sorted(predicted):
            values = [step[part] for step in steps]
            value, measured = predicted[part], statistics.median(values)
            spread = f"{measured:.3g} ({min(values):.3g}-{max(values):.3g})"
            print(f"| {side} | {part} | {value:.3g} | {spread} | {value / measured:.2f} |")
        print(f"{side}: {rates}", file=sys.stderr)


def fit_rates(found: dict) -> Rates:
    step_s, sequence_s, read_s = fit(found["sampled"])
    token_s, update_s = fit(found["trained"])
    return Rates(
        step_s=step_s,
        sequence_s=sequence_s,
        read_s=read_s,
        token_s=token_s,
        update_s=update_s,
        sync_s=statistics.median(found["synced"]),
        max_num_seqs=found["max_num_seqs"],
        prompt_tokens=found["prompt_tokens"],
    )


def fit(rows: list[list[float]]) -> list[float]:
    """Of rows (x, y, ..., t): a, b, ... with a x + b y + ... = t, none below 0, by least squares of
    the relative error."""
    table_RN = torch.tensor(rows, dtype=torch.float64)
    scaled_RN = table_RN[:, :-1] / table_RN[:, -1:]
    kept = list(range(scaled_RN.shape[1]))
    while True:
        ones_R1 = torch.ones(len(rows), 1, dtype=torch.float64)
        found = torch.linalg.lstsq(scaled_RN[:, kept], ones_R1).solution.flatten().tolist()
        if min(found) >= 0:
            return [dict(zip(kept, found)).get(i, 0.0) for i in range(scaled_RN.shape[1])]
        del kept[found.index(min(found))]


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


def make_workload(folder: str, max_staleness: int = 0) -> Workload:
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
        max_staleness=max_staleness,
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
            if line.strip() == "calibrate":
                print(json.dumps(calibrate(work, sampler)), flush=True)
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


def calibrate(work: Workload, sampler: Sampler) -> dict:
    """How long sampling takes each engine, an update and a sync, each by itself."""
    updater, sampled, trained, lengths = load_updater(work), [], [], []
    problems = load_rows()
    number = sampler.num_engines
    sampling = work.stage.sampling
    one = sampling.model_copy(update={"max_completion_length": 1})
    sampler.generate(problems[: 2 * number], work.generations, sampling, ("warm",))
    for divisor in (8, 4, 2, 8, 4, 2):
        part = problems[: work.prompts // divisor]
        for length in (one, sampling):
            began = time.perf_counter()
            rollouts = sampler.generate(part, work.generations, length, (len(sampled),))
            elapsed = time.perf_counter() - began
            idle = timeline.describe_step(began, began + elapsed)
            groups = [
                rollouts[start : start + work.generations]
                for start in range(0, len(rollouts), work.generations)
            ]
            for engine in range(number):
                own = [rollout for group in groups[engine::number] for rollout in group]
                tokens = [rollout.num_tokens for rollout in own]
                read = sum(len(rollout.prompt_ids) for rollout in own)
                busy_s = (1 - idle[f"idle/engine_{engine}"]) * elapsed
                sampled.append((max(tokens), sum(tokens), read, busy_s))
        lengths += [[rollout.num_tokens for rollout in group] for group in groups]
        figures = time_update(updater, rollouts, len(trained))
        trained.append((figures["tokens_trained"], 1.0, figures["update"]))
    synced = []
    for _ in range(3):
        began = time.perf_counter()
        sync(updater, sampler)
        synced.append(time.perf_counter() - began)
    return {
        "engines": number,
        "groups": work.prompts,
        "max_num_seqs": work.engine.max_num_seqs,
        "prompt_tokens": statistics.mean(len(rollout.prompt_ids) for rollout in rollouts),
        "sampled": sampled,
        "trained": trained[1:],  # the first one warms up
        "synced": synced,
        "lengths": lengths,
    }


def take_steps(work: Workload, sampler: Sampler) -> Iterator[tuple[dict, Batch]]:
    stage, updater = work.stage, load_updater(work)
    collector = GrpoCollector(stage, sampler, Scorer(stage.rewards), Prompts(load_rows(), 0))
    batches = Prefetcher(collector, stage)
    folder = Path(tempfile.mkdtemp(dir=work.folder))
    return train(stage, updater, sampler, batches, Breaker(stage, EventLog(folder), folder), 1)


if __name__ == "__main__":
    main()
