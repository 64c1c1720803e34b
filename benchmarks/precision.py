"""What eight bits do to GRPO at the demo's size; FP8 is emulated (r1pipe/models/fp8.py).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/precision.py

From the demo's cold start, with the sampler and the trainer in float32, in bf16, with the sampler's
weights in FP8, and with the trainer's products in FP8 as well. First table: how far sampler and
trainer are apart over a few steps from the first seed's cold start, with and without the correction
by importance weights and routing replay. Second: accuracy by the demo's protocol after its whole
GRPO stage, with both. Finished stages are not repeated.
"""

import argparse
import itertools
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from r1pipe.config.recipe import Recipe
from r1pipe.evals.statistics import clustered_interval, paired_interval
from r1pipe.evals.tables import draw_table
from r1pipe.pipeline import run_recipe
from r1pipe.runs.logs import read_metrics
from r1pipe.utils.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]


class Numbers(NamedTuple):
    label: str
    dtype: str = "float32"
    fp8: str | None = None


NUMBERS = {
    "float32": Numbers("float32"),
    "bf16": Numbers("bf16", dtype="bfloat16"),
    "rounded": Numbers("FP8 weights", fp8="rollouts"),
    "both": Numbers("FP8 both", fp8="both"),
}
SWITCHES = [*itertools.product((False, True), repeat=2)]
"""Correction by importance weights, routing replay."""
TRAINED = ("float32", "rounded", "both")
"""Of the second table; their stages have their names."""


def name_short(numbers: str, corrects: bool, replays: bool) -> str:
    return f"{numbers}{'-corrected' * corrects}{'-replayed' * replays}-short"


def make_arm(
    grpo: dict, numbers: str, corrects: bool, replays: bool, **changes: Any
) -> dict[str, Any]:
    arm = {**grpo, "name": numbers, "fp8": NUMBERS[numbers].fp8, "routing_replay": replays}
    # The distance is what is measured.
    arm["breaker"] = {"logprob_diff": {"action": "ignore"}}
    return {**arm, "vllm_importance_sampling_correction": corrects, **changes}


def make_recipes(seed: int, options: argparse.Namespace, is_first: bool) -> list[Recipe]:
    """The demo's recipe with a GRPO stage for each arm, and one of those in bf16."""
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    random, sft, grpo, _, evaluation = values["stages"]
    del grpo["old_policy"]  # the sampler's log-probs, which the correction is about
    formats, switches = [*NUMBERS], SWITCHES
    if options.smoke:
        formats, switches = ["both"], SWITCHES[-1:]
        sft["train"] |= {"max_steps": 1, "warmup_steps": 0}
        grpo |= {"max_steps": 1, "prompts_per_step": 4, "num_generations": 2}
        evaluation |= {"num_samples": 2, "k": 2}
        for stage in (sft, grpo, evaluation):
            stage["data"]["options"]["size"] = 8
        random["tokenizer"]["data"]["options"]["size"] = 300
    trained = [name for name in TRAINED if name in formats]
    whole = [make_arm(grpo, name, True, True) for name in trained]
    short: dict[str, list[dict]] = {"float32": [], "bfloat16": []}
    for name, flags in itertools.product(formats, switches if is_first else []):
        steps = {"name": name_short(name, *flags), "max_steps": options.steps}
        short[NUMBERS[name].dtype].append(make_arm(grpo, name, *flags, **steps))
    run = f"precision-{seed}"
    for arm in short["bfloat16"]:
        arm["from"] = f"{options.runs_dir}/{run}/sft"
    evaluation["checkpoints"] = ["sft", *trained]
    stages = {run: [random, sft, *short["float32"], *whole, evaluation]}
    if short["bfloat16"]:
        stages[f"{run}-bf16"] = short["bfloat16"]
    own = {"seed": seed, "runs_dir": options.runs_dir}
    return [
        Recipe.model_validate({**values, **own, "name": name, "dtype": dtype, "stages": some})
        for (name, some), dtype in zip(stages.items(), short)
    ]


def show_distances(recipes: list[Recipe]) -> None:
    """Means over steps of sampled tokens, before the first update on them."""
    rows = [["numbers", "correction", "replay", "mean abs dlogp", "KL (k3)", "ESS"]]
    for name, flags in itertools.product(NUMBERS, SWITCHES):
        stage = name_short(name, *flags)
        folder = next((r.run_dir / stage for r in recipes if r.stage(stage)), None)
        if folder is None:
            continue
        steps = read_metrics(folder)
        diff, kl, ess = (
            fmean(row[f"sampler/{key}"] for row in steps)
            for key in ("logprob_diff_mean", "kl", "ess")
        )
        switches = ["on" if flag else "off" for flag in flags]
        rows.append([NUMBERS[name].label, *switches, f"{diff:.1e}", f"{kl:.1e}", f"{ess:.4f}"])
    print(draw_table(rows), end="\n\n")


def show_accuracies(runs: dict[int, Path]) -> None:
    labels = {"sft": "cold start", **{name: NUMBERS[name].label for name in TRAINED}}
    rates: dict[str, list[list[float]]] = {}
    for run in runs.values():
        found: dict[str, list[float]] = {}
        for _, row in read_jsonl(run / "eval" / "results.jsonl"):
            found.setdefault(row["stage"], []).append(row["num_right"] / row["num_samples"])
        for name, of_problems in found.items():
            rates.setdefault(name, []).append(of_problems)
    rows = [["", *(f"seed {seed}: pass@1 (95% interval)" for seed in runs), "mean"]]
    for name, by_seed in rates.items():
        spans = [clustered_interval(some) for some in by_seed]
        cells = [f"{fmean(r):.1%} ({a:.1%} - {b:.1%})" for r, (a, b) in zip(by_seed, spans)]
        rows.append([labels[name], *cells, f"{fmean(map(fmean, by_seed)):.1%}"])
    for name in [name for name in TRAINED[1:] if "float32" in rates]:
        pairs = zip(rates["float32"], rates[name])
        gains = [[100 * value for value in paired_interval(*pair)] for pair in pairs]
        cells = [f"{d:+.1f} ({a:+.1f} to {b:+.1f})" for d, a, b in gains]
        average = f"{fmean(gain[0] for gain in gains):+.1f}"
        rows.append([f"{labels[name]}, over float32", *cells, average])
    print(draw_table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3, help="of the first table")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--smoke", action="store_true", help="one step of two arms")
    options = parser.parse_args()
    runs, first = {}, []
    for seed in options.seeds:
        recipes = make_recipes(seed, options, is_first=not runs)
        for recipe in recipes:
            run_recipe(recipe, skip_doctor=True)
        first = first or recipes
        runs[seed] = recipes[0].run_dir
    show_distances(first)
    show_accuracies(runs)


if __name__ == "__main__":
    main()
