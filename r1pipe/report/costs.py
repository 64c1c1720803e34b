"""`r1pipe cost RUN`: a table of a run's cost, in all and per point of accuracy."""

import contextlib
from pathlib import Path
from typing import Any

from r1pipe.evals.tables import draw_table, group_by_set
from r1pipe.runs.ledger import LEDGER, summarize_run
from r1pipe.runs.lineage import read_record
from r1pipe.runs.reader import StageFolder, read_summary
from r1pipe.utils.errors import UserError

PAPER = {
    "what": "DeepSeek-R1, as its authors report it",
    "source": "Guo et al. 2025, Nature 645, 633-638, doi 10.1038/s41586-025-09422-z, "
    "Supplementary Information, training cost (also arXiv:2501.12948v2)",
    "unit": "H800 GPU-hour",
    "hours": {"R1-Zero": 101_000, "SFT data": 5_000, "R1": 41_000},
    "price_per_hour": 2.0,
    "currency": "USD",
}
"""Reinforcement learning and data, without the base model's pre-training."""

COLUMNS = (
    "stage", "wall", "lost", "hours", "idle", "sampled", "trained", "cost", "pass@1", "per point",
)  # fmt: skip


def describe_costs(run_dir: Path) -> str:
    """The table of a run, finished or running, and the paper's figures below it.

    Raises UserError for a folder without a ledger.
    """
    if not (run_dir / LEDGER).exists():
        raise UserError(f"{run_dir}: no {LEDGER}: not a run folder, or nothing was run in it")
    stages = summarize_run(run_dir)
    gains = find_gains(run_dir, [stage["stage"] for stage in stages])
    total = add_up(stages)
    rows = [format_stage(stage, gains.get(stage["stage"])) for stage in stages]
    rows.append(format_stage(total, gains.get("")))
    unit = "/".join(dict.fromkeys(stage["unit"] for stage in stages))
    lines = [
        draw_table([list(COLUMNS), *rows]),
        "",
        f"hours: {unit}-hours, all attempts; lost: work done twice or thrown away, in wall; idle: "
        "share of the steps in which the device neither samples nor trains; sampled, trained: "
        "tokens; per point: of pass@1 (0.01) gained over the checkpoint that the stage starts from",
    ]
    if total["cost"] is None:
        lines.append("cost: unknown, the recipe has no price_per_device_hour")
    lines += [describe_judge(stage) for stage in stages if "judge" in stage]
    return "\n".join([*lines, describe_paper()])


def describe_judge(stage: dict[str, Any]) -> str:
    spent = stage["judge"]
    cost = f"{format_money(spent['cost'])} {stage['currency']}" if spent["cost"] else "no price"
    return (
        f"judge of {stage['stage']}, not in the table: {spent['requests']:,} requests, "
        f"{spent['prompt_tokens']:,} tokens read and {spent['completion_tokens']:,} written, {cost}"
    )


def describe_paper() -> str:
    hours = PAPER["hours"]
    parts = ", ".join(f"{name} {count / 1000:g}K" for name, count in hours.items())
    total = sum(hours.values())
    return (
        f"for comparison, {PAPER['what']} (not measured here): {parts}, together "
        f"{total / 1000:g}K {PAPER['unit']}s, {PAPER['currency']} "
        f"{total * PAPER['price_per_hour'] / 1000:g}K at {PAPER['price_per_hour']:g} an hour "
        f"({PAPER['source']})"
    )


def find_gains(run_dir: Path, stages: list[str]) -> dict[str, float]:
    """Points of pass@1 on the first set of problems that each stage has gained over the checkpoint
    that it trains, where both were evaluated; under "" the last checkpoint's over the first's."""
    summary = read_summary(run_dir)
    if not summary:
        return {}
    summary = group_by_set(summary)[0]
    accuracy = {entry["stage"]: entry["pass_at_1"] for entry in summary}
    gains = {}
    for stage in stages:
        parent = find_parent(run_dir / stage)
        if stage in accuracy and parent in accuracy:
            gains[stage] = 100 * (accuracy[stage] - accuracy[parent])
    if len(summary) > 1:
        gains[""] = 100 * (summary[-1]["pass_at_1"] - summary[0]["pass_at_1"])
    return gains


def find_parent(stage_dir: Path) -> str | None:
    """The checkpoint that a finished stage has trained; None for random weights."""
    record = read_record(stage_dir)
    if record is None:
        return None
    with contextlib.suppress(UserError):  # made by a version with other settings
        return StageFolder(stage_dir, record).section.weights_from
    return None


def add_up(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The table's last row."""

    def total(key: str) -> float | None:
        values = [stage[key] for stage in stages]
        return None if None in values else sum(values)

    keys = ("wall_s", "lost_s", "device_hours", "tokens_sampled", "tokens_trained")
    return {
        "stage": "all",
        **{key: total(key) for key in (*keys, "cost")},
        "idle_share": None,
        "unit": stages[-1]["unit"],
        "currency": stages[-1]["currency"],
    }


def format_stage(stage: dict[str, Any], gain: float | None) -> list[str]:
    cost, hours, currency = stage["cost"], stage["device_hours"], stage["currency"]
    per_point = "-"
    if gain is not None and gain > 0:
        unit = f"{stage['unit']}-h" if cost is None else currency
        per_point = f"{format_money((hours if cost is None else cost) / gain)} {unit}"
    return [
        stage["stage"],
        f"{stage['wall_s']:.0f} s",
        f"{stage['lost_s']:.0f} s" if stage["lost_s"] else "-",
        f"{hours:.3g}",
        "-" if stage["idle_share"] is None else f"{stage['idle_share']:.1%}",
        f"{stage['tokens_sampled']:,}",
        f"{stage['tokens_trained']:,}",
        "-" if cost is None else f"{format_money(cost)} {currency}",
        "-" if gain is None else f"{gain:+.1f}",
        per_point,
    ]


def format_money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"
