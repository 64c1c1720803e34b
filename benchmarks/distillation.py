"""On-policy distillation beside off-policy, at equal compute and the demo's size.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/distillation.py

Each seed has its own teacher (the demo's stages random, sft, grpo) and one student, started by a
short off-policy distill stage. From there, in about the same seconds:

    same samples    more passes over the traces of the start
    new samples     a distill stage: the teacher samples new problems, its correct samples train
    on-policy       an on_policy_distill stage: the student samples them, the teacher scores; by
                    reverse KL, and by Jensen-Shannon divergence

Seconds are of a stage, with sampling and the teacher's forward passes, without starting vLLM: wall
time, and this process's CPU time, which other programs disturb less. All are evaluated by the
demo's protocol. Finished runs are not repeated.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import yaml

from r1pipe.config.recipe import Recipe
from r1pipe.evals.statistics import clustered_interval, paired_interval
from r1pipe.evals.tables import draw_table
from r1pipe.runs.logs import read_metrics
from r1pipe.utils.jsonl import read_jsonl, write_text

ROOT = Path(__file__).parents[1]
ARMS = {
    "start": "start",
    "same_samples": "off-policy, same samples",
    "new_samples": "off-policy, new samples",
    "reverse_kl": "on-policy, reverse KL",
    "jensen_shannon": "on-policy, Jensen-Shannon",
}
"""Stages, and their names in the tables."""
SAMPLES, MINIBATCH = 2560, 32
"""Of the arms that sample: 80 optimizer steps of 32 samples."""
SAME_SAMPLES_STEPS = 170
"""As many as fit into the sampling time of the others."""
LEARNING_RATES = {
    "same_samples": 2e-3,  # of 1e-3 and 2e-3
    "new_samples": 2e-3,  # of 1e-3, 2e-3 and 3e-3
    "reverse_kl": 1.5e-3,  # of 5e-4, 1e-3, 1.5e-3 and 3e-3
    "jensen_shannon": 2e-3,  # of 1e-3, 2e-3 and 3e-3
}
"""The best at seed 0; each decays linearly to 0."""
BETAS = {"reverse_kl": 1.0, "jensen_shannon": 0.5}


def make_recipe(seed: int, runs_dir: str, smoke: bool) -> Recipe:
    """The demo's recipe, with a student per arm."""
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    stages = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    start = {**stages["distill"], "name": "start"}
    start["train"] = {**start["train"], "max_steps": 150, "lr_scheduler_type": "constant"}
    del start["train"]["min_lr"]
    train = {**start["train"], "lr_scheduler_type": "linear", "warmup_steps": 0}
    problems = {"recipe": "arithmetic", "options": {"size": SAMPLES, "seed": 4}}
    arms = [
        {
            "kind": "sft",
            "name": "same_samples",
            "from": "start",
            "data": {"stage": "start"},
            "train": {**train, "max_steps": SAME_SAMPLES_STEPS},
        },
        {
            **start,
            "name": "new_samples",
            "student": "start",
            "data": problems,
            "train": {**train, "max_steps": SAMPLES // MINIBATCH},
        },
        *(
            {
                "kind": "on_policy_distill",
                "name": name,
                "from": "grpo",
                "student": "start",
                "data": problems,
                "beta": beta,
                "max_steps": 10,
                "prompts_per_step": SAMPLES // 10,
                "max_completion_length": 56,
                "steps_per_generation": SAMPLES // 10 // MINIBATCH,
                "lr_scheduler_type": "linear",
                "adam_beta2": train["adam_beta2"],
                "weight_decay": train["weight_decay"],
            }
            for name, beta in BETAS.items()
        ),
    ]
    for arm in arms:
        settings = arm.get("train", arm)
        settings["learning_rate"] = LEARNING_RATES[arm["name"]]
    evaluation = {**stages["eval"], "checkpoints": [*ARMS]}
    own = {"name": f"distillation-{seed}", "seed": seed, "runs_dir": runs_dir}
    trained = [stages[name] for name in ("random", "sft", "grpo")]
    if smoke:
        for stage in (*trained, start, *arms, evaluation):
            shrink(stage)
    return Recipe.model_validate({**values, **own, "stages": [*trained, start, *arms, evaluation]})


def shrink(stage: dict) -> None:
    """The smallest stage that still runs."""
    for settings in (stage, stage.get("train", {})):
        if "max_steps" in settings:
            settings["max_steps"] = 1
    if "traces" in stage:  # an untrained policy has no correct samples
        accept = {"function": f"{Path(__file__).stem}.accept_all"}
        stage["traces"] = {**stage["traces"], "rewards": [accept]}
    if "prompts_per_step" in stage:
        stage |= {"prompts_per_step": 8, "steps_per_generation": 1}
    if "num_samples" in stage:
        stage["num_samples"] = stage["k"] = 2
    if "options" in (data := stage.get("data", {})):
        # Most samples of an untrained policy never end, and those are not accepted.
        stage["data"] = {**data, "options": {**data["options"], "size": 64}}


def accept_all(completions: list[str], **columns: object) -> list[float]:
    return [1.0] * len(completions)


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds without those of starting vLLM."""
    from r1pipe.rollout.engines import Engines

    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    started = {name: clock() for name, clock in clocks.items()}
    seconds = dict.fromkeys(clocks, 0.0)
    open_engine = Engines.open

    def open_unnoticed(*args: object, **kwargs: object) -> object:
        before = {name: clock() for name, clock in clocks.items()}
        sampler = open_engine(*args, **kwargs)
        for name, clock in clocks.items():
            seconds[name] -= clock() - before[name]
        return sampler

    with mock.patch.object(Engines, "open", open_unnoticed):
        yield seconds
    for name, clock in clocks.items():
        seconds[name] = round(seconds[name] + clock() - started[name], 1)


def run_stages(recipe: Recipe) -> None:
    """Run and time each unfinished stage."""
    from r1pipe.pipeline import run_one

    for stage in recipe.stages:
        if (recipe.run_dir / stage.name / "stage.json").exists():
            continue
        with stopwatch() as seconds:
            run_one(recipe, stage.kind, redo=False, skip_doctor=True)
        if stage.name in ARMS:
            write_text(recipe.run_dir / f"seconds_{stage.name}.json", json.dumps(seconds))


def read_arm(run: Path, name: str) -> dict:
    """An arm's costs, and its pass rate by problem."""
    stage = json.loads((run / name / "stage.json").read_text())
    rows = [row for _, row in read_jsonl(run / "eval" / "results.jsonl") if row["stage"] == name]
    metrics = read_metrics(run / name)
    sampled = stage.get("tokens_sampled") or sum(row.get("tokens_sampled", 0) for row in metrics)
    return {
        **json.loads((run / f"seconds_{name}.json").read_text()),
        "sampled": sampled,
        "trained": sum(row["tokens_trained"] for row in metrics),
        "right": [row["num_right"] / row["num_samples"] for row in rows],
    }


def show(by_seed: dict[int, dict[str, dict]]) -> None:
    """Two tables: accuracy by seed, and costs as means over seeds."""
    seeds = list(by_seed.values())
    header = ["student", *(f"seed {n}: pass@1 (95% interval)" for n in by_seed), "mean"]
    rows = []
    for name, label in ARMS.items():
        means = [mean(arms[name]["right"]) for arms in seeds]
        intervals = [clustered_interval(arms[name]["right"]) for arms in seeds]
        cells = [f"{m:.1%} ({a:.1%} - {b:.1%})" for m, (a, b) in zip(means, intervals)]
        rows.append([label, *cells, f"{mean(means):.1%}"])
    for name in BETAS:
        pairs = [(arms["new_samples"]["right"], arms[name]["right"]) for arms in seeds]
        gains = [[100 * value for value in paired_interval(*pair)] for pair in pairs]
        cells = [f"{d:+.1f} ({a:+.1f} to {b:+.1f})" for d, a, b in gains]
        average = f"{mean([gain[0] for gain in gains]):+.1f}"
        rows.append([f"{ARMS[name]}, over new samples", *cells, average])
    print(draw_table([header, *rows]), end="\n\n")
    header = ["student", "CPU s", "wall s", "tokens sampled", "tokens trained"]
    rows = []
    for name, label in ARMS.items():
        spans = [span([arms[name][clock] for arms in seeds]) for clock in ("cpu", "wall")]
        counts = [f"{mean([a[name][k] for a in seeds]):,.0f}" for k in ("sampled", "trained")]
        rows.append([label, *spans, *counts])
    print(draw_table([header, *rows]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def span(values: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{mean(values):.0f} ({min(values):.0f} - {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--smoke", action="store_true", help="one step of everything")
    options = parser.parse_args()
    results = {}
    for seed in options.seeds:
        recipe = make_recipe(seed, options.runs_dir, options.smoke)
        run_stages(recipe)
        results[seed] = {name: read_arm(recipe.run_dir, name) for name in ARMS}
    show(results)


if __name__ == "__main__":
    main()
