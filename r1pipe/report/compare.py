"""Two runs side by side: settings that differ, curves, and accuracy on the same problems.

    r1pipe compare runs/seed1 runs/seed2

Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1pipe.evals.metrics import ProblemResult, compare_paired
from r1pipe.evals.tables import draw_table
from r1pipe.report.html import Rollouts, collect_curves, render, write_page
from r1pipe.runs.folder import flatten
from r1pipe.runs.logs import read_metrics
from r1pipe.runs.reader import StageFolder, find_stages, read_summary
from r1pipe.utils.jsonl import read_jsonl


def compare_runs(a: Path, b: Path, out: Path | None = None) -> str:
    """The comparison as Markdown; with `out` also as a page with the curves of both."""
    stages = [{stage.name: stage for stage in find_stages(run)} for run in (a, b)]
    names = [run.resolve().name for run in (a, b)]
    settings = list(list_differences(*stages))
    accuracy = list(compare_accuracy(a, b, *stages))
    parts = [
        f"# {names[0]} and {names[1]}",
        "## Settings that differ",
        draw_table([["stage", "setting", *names], *settings]) if settings else "none",
        "## pass@1 on the same problems",
        draw_table([["checkpoint", "set", *names, "difference (paired 95% interval)"], *accuracy])
        if accuracy
        else "no checkpoint of both was evaluated on the same set",
        "## Last step",
        draw_table([["stage", "metric", *names], *compare_last_steps(*stages)]),
    ]
    if out is not None:
        write_page(out, render(collect(names, stages, settings)))
    return "\n\n".join(parts)


def list_differences(
    a: dict[str, StageFolder], b: dict[str, StageFolder]
) -> Iterator[tuple[str, str, str, str]]:
    """(stage, key, value in a, value in b) of every setting that differs."""
    for name in {**a, **b}:
        if name not in a or name not in b:
            yield name, "", *("yes" if name in run else "no such stage" for run in (a, b))
            continue
        left, right = (dict(flatten(run[name].settings)) for run in (a, b))
        for key in {**left, **right}:
            values = [side.get(key, "not set") for side in (left, right)]
            if values[0] != values[1]:
                yield name, key, *values


def compare_accuracy(
    a: Path, b: Path, stages_a: dict[str, StageFolder], stages_b: dict[str, StageFolder]
) -> Iterator[tuple[str, ...]]:
    """pass@1 of every checkpoint that both runs evaluated on the same set, and the difference over
    the problems that both have."""
    results = [read_results(stages) for stages in (stages_a, stages_b)]
    summaries = map(read_summary, (a, b))
    entries = [{(e["dataset"], e["stage"]): e for e in summary} for summary in summaries]
    for key in entries[0]:
        if key not in entries[1] or not all(key in found for found in results):
            continue
        difference = compare_paired(*(found[key] for found in results))
        yield (
            key[1],
            key[0],
            *(f"{e[key]['pass_at_1']:.1%}" for e in entries),
            f"{100 * difference['difference']:+.1f} "
            f"({100 * difference['ci_low']:+.1f} to {100 * difference['ci_high']:+.1f}), "
            f"{difference['num_problems']} problems",
        )


def read_results(stages: dict[str, StageFolder]) -> dict[tuple[str, str], list[ProblemResult]]:
    """Results by (set, checkpoint), problem by problem, from the eval stages."""
    results: dict[tuple[str, str], list[ProblemResult]] = {}
    for stage in stages.values():
        for _, row in read_jsonl(stage.folder / "results.jsonl", missing_ok=True):
            key = row.pop("dataset"), row.pop("stage")
            results.setdefault(key, []).append(ProblemResult(**row))
    return results


LAST_STEP = ("step", "reward", "loss", "completions/mean_length", "entropy", "kl", "grad_norm")


def compare_last_steps(
    a: dict[str, StageFolder], b: dict[str, StageFolder]
) -> Iterator[tuple[str, ...]]:
    for name in (name for name in a if name in b):
        last = [(read_metrics(run[name].folder) or [{}])[-1] for run in (a, b)]
        for metric in LAST_STEP:
            values = [row.get(metric) for row in last]
            if values != [None, None]:
                yield name, metric, *("-" if v is None else f"{v:.4g}" for v in values)


def collect(
    names: list[str], stages: list[dict[str, StageFolder]], settings: list[tuple]
) -> dict[str, Any]:
    """The report page's data for two runs: their curves over each other."""
    return {
        "name": " and ".join(names),
        "written": "",
        "running": False,
        "stages": [],
        "summary": [],
        "curves": list(overlay_curves(*stages)),
        "timelines": [],
        "experts": [],
        "events": [],
        "cost": None,
        "differences": {"columns": ["stage", "setting", *names], "rows": settings},
        "rollouts": Rollouts().pack(),
    }


def overlay_curves(
    a: dict[str, StageFolder], b: dict[str, StageFolder]
) -> Iterator[dict[str, Any]]:
    """The second run's series under names that begin with "B: "."""
    for name in a:
        sides = [collect_curves(run[name]) for run in (a, b) if name in run]
        if len(sides) < 2 or None in sides:
            continue
        steps = sorted({step for side in sides for step in side["steps"]})
        series = {}
        for prefix, side in zip(("", "B: "), sides, strict=True):
            places = {step: place for place, step in enumerate(side["steps"])}
            for metric, values in side["series"].items():
                series[prefix + metric] = [
                    values[places[step]] if step in places else None for step in steps
                ]
        yield {"stage": name, "kind": sides[0]["kind"], "steps": steps, "series": series}
