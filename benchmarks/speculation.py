"""Multi-token prediction and speculative decoding, at the demo's size.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/speculation.py

For each seed the beginning of the demo's cold start, with the loss of a prediction layer and
without, from the same weights on the same rows. Then completions of the first seed's policy with
drafts and without, in turn in one engine: by its prediction layer, and by a small model trained as
long. Seconds are this process's CPU time. Finished stages are not repeated.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean, median
from unittest import mock

import torch
import yaml

from r1pipe.config.base import ProblemSet, Sampling
from r1pipe.config.recipe import Recipe, Speculative
from r1pipe.data.problems import load_problems
from r1pipe.evals.tables import draw_table
from r1pipe.pipeline import run_one
from r1pipe.rollout.engine import Sampler
from r1pipe.runs.logs import read_metrics
from r1pipe.sft.trainer import SupervisedTrainer
from r1pipe.utils.jsonl import write_text

ROOT = Path(__file__).parents[1]
TRAINED = ("with", "without")
LAST = 20
"""Steps over which figures at the end are averaged."""
DRAFTS = [("mtp", 1), ("mtp", 2), ("draft_model", 3)]
"""Who drafts, and how many tokens."""
SAMPLINGS = {
    "T = 1": Sampling(max_completion_length=56),
    "T = 0.6, top-p = 0.95": Sampling(max_completion_length=56, temperature=0.6, top_p=0.95),
}


def make_recipe(seed: int, runs_dir: str, num_steps: int, *, is_first: bool, smoke: bool) -> Recipe:
    """The first seed's run has a drafter as well."""
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    random, sft, _, distill, _ = values["stages"]
    if smoke:
        for data in (sft["data"], random["tokenizer"]["data"]):
            data["options"]["size"] = 300
    random["model"]["num_mtp_layers"] = 1
    small = {**random, "name": "small", "model": distill["student"]}
    train = {**sft["train"], "max_steps": num_steps, "warmup_steps": min(20, num_steps - 1)}
    arms = [
        {**sft, "name": "with", "train": {**train, "mtp": {"loss_weight": 0.3}}},
        {**sft, "name": "without", "train": train},
    ]
    if is_first:
        arms += [small, {**sft, "name": "drafter", "from": "small", "train": train}]
    own = {"name": f"speculation-{seed}", "seed": seed, "runs_dir": runs_dir}
    return Recipe.model_validate({**values, **own, "stages": [random, *arms]})


def run_stages(recipe: Recipe) -> None:
    """Run each unfinished stage, and note the CPU seconds of a training stage's steps."""
    take_step = SupervisedTrainer.take_step
    for stage in recipe.stages:
        if (recipe.run_dir / stage.name / "stage.json").exists():
            continue
        seconds = []

        def take_timed(*args: object, seconds: list[float] = seconds) -> dict:
            started = time.process_time()
            metrics = take_step(*args)
            seconds.append(time.process_time() - started)
            return metrics

        with mock.patch.object(SupervisedTrainer, "take_step", take_timed):
            run_one(recipe, stage.kind, redo=False, skip_doctor=True)
        if stage.name in TRAINED:
            write_text(recipe.run_dir / f"seconds_{stage.name}.json", json.dumps(seconds))


def show_training(runs: dict[int, Path]) -> None:
    header = ["seed", "loss with", "without", "mtp/loss", "mtp/accuracy", "CPU s a step with"]
    rows = [[*header, "without", "ratio"]]
    for seed, run in runs.items():
        steps = {name: read_metrics(run / name)[-LAST:] for name in TRAINED}
        figures = [
            fmean(row[key] for row in steps[name])
            for name, key in (
                ("with", "loss"),
                ("without", "loss"),
                ("with", "mtp/loss"),
                ("with", "mtp/accuracy"),
            )
        ]
        times = [median(json.loads((run / f"seconds_{name}.json").read_text())) for name in TRAINED]
        cells = [*(f"{x:.3f}" for x in figures), *(f"{t:.3f}" for t in times)]
        rows.append([str(seed), *cells, f"{times[0] / times[1]:.2f}"])
    print(draw_table(rows), end="\n\n")


def show_sampling(recipe: Recipe, sizes: list[int], rounds: int, drafts: list) -> None:
    problems = load_problems(
        ProblemSet(recipe="arithmetic", split="test", options={"size": max(sizes), "seed": 100})
    )
    rows = [["drafts", "sampling", "requests at once", "accepted", "with", "without", "ratio"]]
    for method, count in drafts:
        drafter = str(recipe.run_dir / "drafter") if method == "draft_model" else None
        speculative = Speculative(
            method=method, model=drafter, num_speculative_tokens=count, trial=False
        )
        settings = recipe.engine.model_copy(update={"speculative": speculative})
        policy, device = str(recipe.run_dir / "with"), torch.device("cpu")
        sampler = Sampler(policy, settings, recipe.dtype, device)
        for name, sampling in SAMPLINGS.items():
            for size in sizes:
                rates, share = alternate(sampler, problems, size, sampling, rounds)
                cells = [f"{share:.3f}", *(f"{rate:,.0f}" for rate in rates)]
                ratio = f"{rates[0] / rates[1]:.2f}"
                rows.append([f"{method}, {count}", name, str(size), *cells, ratio])
        sampler.close()
    print("tokens a second of CPU time:", draw_table(rows), sep="\n\n")


def alternate(
    sampler: Sampler, problems: list, size: int, sampling: Sampling, rounds: int
) -> tuple[list[float], float]:
    """Tokens a second with drafts and without, medians over rounds of which the first does not
    count, and the share of drafts that stood."""
    calls = [problems[start : start + size] for start in range(0, min(16, len(problems)), size)]
    rates: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    for number in range(rounds + 1):
        for drafting in rates:
            sampler.set_drafting(drafting)
            sampler.drafts.clear()
            started = time.process_time()
            some = [sampler.generate(call, 1, sampling, (number,)) for call in calls]
            seconds = time.process_time() - started
            num_tokens = sum(rollout.num_tokens for call in some for rollout in call)
            rates[drafting].append(num_tokens / seconds)
            if drafting:
                shares.append(sampler.drafts.acceptance())
    return [median(values[1:]) for values in rates.values()], fmean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--smoke", action="store_true", help="few problems and one drafter")
    options = parser.parse_args()
    recipes = {
        seed: make_recipe(
            seed,
            options.runs_dir,
            options.steps,
            is_first=seed == options.seeds[0],
            smoke=options.smoke,
        )
        for seed in options.seeds
    }
    for recipe in recipes.values():
        run_stages(recipe)
    show_training({seed: recipe.run_dir for seed, recipe in recipes.items()})
    first = recipes[options.seeds[0]]
    drafts = DRAFTS[:1] if options.smoke else DRAFTS
    show_sampling(first, options.sizes, options.rounds, drafts)


if __name__ == "__main__":
    main()
