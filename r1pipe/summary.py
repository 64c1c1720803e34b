"""What a run has to show for itself: the table of its summary, and the curves as a picture."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from r1pipe.config import OnPolicy
from r1pipe.runs import RunFolder, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH = "completions/mean_length"
"""Of metrics.jsonl: tokens per completion of a step."""
COLUMNS: dict[str, Callable[[dict], str]] = {
    "checkpoint": lambda entry: entry["stage"],
    "pass@1": lambda entry: percent(entry["pass_at_1"]),
    "95% interval": lambda entry: f"{percent(entry['ci_low'])} - {percent(entry['ci_high'])}",
    "to the one above": lambda entry: describe_difference(entry.get("compared_with")),
    "pass@k": lambda entry: percent(entry["pass_at_k"]),
    "maj@k": lambda entry: percent(entry["maj_at_k"]),
    "format": lambda entry: percent(entry["format_rate"]),
    "tokens": lambda entry: f"{entry['mean_tokens']:.1f}",
    "truncated": lambda entry: percent(entry["truncated"]),
    "unjudged": lambda entry: percent(entry["unjudged"]),
    "wall": lambda entry: "-" if entry["wall_s"] is None else f"{entry['wall_s']:.0f} s",
}


def format_table(summary: list[dict]) -> str:
    """The summary as Markdown: for each set of problems a table, its protocol in the line below."""
    return "\n\n".join(
        draw_table([list(COLUMNS), *([cell(e) for cell in COLUMNS.values()] for e in entries)])
        + "\n\n"
        + describe_protocol(entries)
        for entries in group_by_set(summary)
    )


def format_report(summary: list[dict], lengths: Sequence[str] = ()) -> str:
    """All that is in the summary as Markdown: the tables of `format_table`, and for each set
    pass@k, pass@1 by category, and samples by length, with a column per checkpoint; then the lines
    of `describe_lengths`."""
    parts = []
    for entries in group_by_set(summary):
        parts += [f"# {entries[0]['dataset']}", format_table(entries)]
        parts += ["## pass@k", draw_pivot("k", entries, list_pass_at)]
        if len({row["category"] for entry in entries for row in entry["by_category"]}) > 1:
            parts += ["## pass@1 by category", draw_pivot("category", entries, list_categories)]
        parts += [
            "## Samples by length: share right, and how many they are",
            draw_pivot("tokens", entries, list_lengths),
        ]
    if lengths:
        parts += ["# Response length", *(f"- {line}" for line in lengths)]
    return "\n\n".join(parts) + "\n"


def describe_lengths(run: RunFolder) -> list[str]:
    """The log of response length in short: a line for each stage that samples what it trains on,
    its completions' mean tokens at the start and at the end, each over a tenth of the steps, and
    the rewards beside it."""
    lines = []
    for stage, rows in read_on_policy_metrics(run):
        longest = max(rows, key=lambda row: row[LENGTH])
        rewards = (
            f"{label} {describe_ends(rows, name, '.2f')}"
            for name, label in list_rewards(rows).items()
        )
        lines.append(
            f"{stage.name}: response length {describe_ends(rows, LENGTH, '.1f')} tokens in "
            f"{len(rows)} steps (longest {longest[LENGTH]:.1f}, step {longest['step']})"
            + "".join(f", {reward}" for reward in rewards)
        )
    return lines


def describe_ends(rows: list[dict], name: str, style: str) -> str:
    """A metric's mean over the first tenth of the steps and over the last."""
    part = max(1, len(rows) // 10)
    parts = rows[:part], rows[-part:]
    ends = ([row[name] for row in some if row.get(name) is not None] for some in parts)
    return " -> ".join(format(sum(end) / len(end), style) if end else "-" for end in ends)


def read_on_policy_metrics(run: RunFolder) -> Iterator[tuple[OnPolicy, list[dict]]]:
    """The stages that sample what they train on and have logged steps, and these."""
    for stage in run.recipe.stages:
        if isinstance(stage, OnPolicy) and (rows := read_metrics(run.stage_dir(stage.name))):
            yield stage, rows


def list_rewards(rows: list[dict]) -> dict[str, str]:
    """The metrics that are mean rewards of a function, and its name without the module's."""
    names = [name.split("/")[1] for name in rows[0] if re.fullmatch("rewards/[^/]+/mean", name)]
    return {f"rewards/{name}/mean": name.rpartition(".")[2] for name in names}


def group_by_set(summary: list[dict]) -> list[list[dict]]:
    labels = dict.fromkeys(entry["dataset"] for entry in summary)
    return [[entry for entry in summary if entry["dataset"] == label] for label in labels]


def describe_protocol(entries: list[dict]) -> str:
    first = entries[0]
    overlaps = [entry["overlap"] for entry in entries if entry["overlap"] is not None]
    overlap = f"{max(overlaps):.1%}" if overlaps else "unknown"
    return (
        f"{first['dataset']}: {first['num_problems']} problems x {first['num_samples']} samples, "
        f"T = {first['temperature']:g}, top-p = {first['top_p']:g}, k = {first['k']}; intervals "
        f"clustered by problem, differences paired by problem; overlap with training {overlap}"
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def describe_difference(comparison: dict | None) -> str:
    if comparison is None:
        return "-"
    difference, low, high = (
        f"{100 * comparison[key]:+.1f}" for key in ("difference", "ci_low", "ci_high")
    )
    return f"{difference} ({low} to {high})"


def list_pass_at(entry: dict) -> dict[str, str]:
    return {k: percent(value) for k, value in entry["pass_at"].items()}


def list_categories(entry: dict) -> dict[str, str]:
    return {
        f"{row['category']} ({row['num_problems']})": f"{percent(row['pass_at_1'])} "
        f"({percent(row['ci_low'])} - {percent(row['ci_high'])})"
        for row in entry["by_category"]
    }


def list_lengths(entry: dict) -> dict[str, str]:
    return {
        f"{row['tokens_from']} - {row['tokens_to'] - 1}": f"{percent(row['right'])} "
        f"of {row['samples']}"
        for row in entry["by_length"]
    }


def draw_pivot(
    title: str, entries: list[dict], list_cells: Callable[[dict], dict[str, str]]
) -> str:
    """A row for everything that some entry has a cell for, a column per entry."""
    columns = [list_cells(entry) for entry in entries]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if title == "tokens":
        names.sort(key=lambda name: int(name.split()[0]))
    header = [title, *(entry["stage"] for entry in entries)]
    return draw_table([header, *([n, *(c.get(n, "-") for c in columns)] for n in names)])


def draw_table(rows: list[list[str]]) -> str:
    """Markdown whose columns line up; the first row is the header."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(set_cell_size(*pair) for pair in zip(r, widths)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def plot_curves(run: RunFolder, summary: list[dict], path: Path) -> None:
    """Reward and length over the steps of the stages that train on their own samples, and for
    on_policy_distill the divergence; pass@1 on the first set of problems."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    length_axis = left.twinx()
    colors: dict[str, str] = {}
    offset = 0
    for stage, metrics in read_on_policy_metrics(run):
        steps = [offset + row["step"] for row in metrics]
        lines = {name: (label, {}) for name, label in list_rewards(metrics).items()}
        totals = {"reward": "k--", "divergence": "r:"}
        for name, style in totals.items():
            if any(name in row for row in metrics):
                lines[name] = (name, {"lw": 1, "ls": style[1:], "color": style[0]})
        for name, (label, style) in lines.items():
            values = [math.nan if row.get(name) is None else row[name] for row in metrics]
            known = label in colors  # of an earlier stage: the same colour, once in the legend
            color = colors.setdefault(label, style.pop("color", f"C{len(colors)}"))
            left.plot(steps, values, color=color, label=None if known else label, **style)
        length_axis.plot(steps, [row[LENGTH] for row in metrics], color="tab:gray", lw=1)
        if offset:
            left.axvline(offset + 0.5, color="tab:gray", lw=0.5, ls=":")
        left.text(offset + 0.6, 0.01, stage.name, fontsize=8, transform=left.get_xaxis_transform())
        offset += len(metrics)
    if offset:  # a single step's own limits would lie far from its stage's name
        left.set_xlim(0.5, offset + 0.5)
    left.set(title="on-policy: rewards of the samples", xlabel="step", ylabel="mean reward")
    if left.lines:
        left.legend(loc="best")
    length_axis.set_ylabel("mean completion length (tokens)", color="tab:gray")

    summary = group_by_set(summary)[0]
    names = [entry["stage"] for entry in summary]
    values = [100 * entry["pass_at_1"] for entry in summary]
    low = [max(0.0, 100 * (entry["pass_at_1"] - entry["ci_low"])) for entry in summary]
    high = [max(0.0, 100 * (entry["ci_high"] - entry["pass_at_1"])) for entry in summary]
    bars = right.bar(range(len(names)), values, yerr=[low, high], capsize=4, color="tab:blue")
    right.bar_label(bars, fmt="%.1f", padding=3)
    slope = 20 if len(names) > 4 else 0  # more names than fit side by side
    right.set_xticks(range(len(names)), [Path(name).name for name in names], rotation=slope)
    first = summary[0]
    right.set(
        title=f"held-out pass@1 ({first['num_problems']} x {first['num_samples']} samples, "
        f"T = {first['temperature']:g})",
        ylabel="%",
        ylim=(0, 112),
    )
    save_figure(figure, path)


def plot_expert_load(run: RunFolder, path: Path) -> None:
    """How even the experts' load is over the steps of every stage that trains a mixture of experts:
    each layer thin, the mean over layers thick. No picture if none does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {stage.name: read_metrics(run.stage_dir(stage.name)) for stage in run.recipe.stages}
    logs = {
        name: rows
        for name, log in logs.items()
        if (rows := [row for row in log if "experts/entropy" in row])
    }
    if not logs:
        return
    figure, axes = pyplot.subplots(
        len(logs), 2, figsize=(11, 3 * len(logs)), layout="constrained", squeeze=False
    )
    measures = {
        "max_violation": "expert load: max / mean - 1 (0: even)",
        "entropy": "expert load: entropy / log of experts (1: even)",
    }
    for place, (name, rows) in enumerate(logs.items()):
        steps = [row["step"] for row in rows]
        for axis, (measure, title) in zip(axes[place], measures.items(), strict=True):
            for key in rows[0]:
                if key.startswith("experts/layer_") and key.endswith(f"/{measure}"):
                    axis.plot(steps, [row[key] for row in rows], lw=0.5, color="tab:gray")
            axis.plot(steps, [row[f"experts/{measure}"] for row in rows], lw=2)
            axis.set(title=title if place == 0 else None, xlabel="step", ylabel=name)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """As a PNG, whole or not at all."""
    from matplotlib import pyplot

    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(path)
