"""Summary tables of a run, as Markdown."""

import re
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len, set_cell_size

from r1pipe.config.rl import OnPolicy
from r1pipe.runs.folder import RunFolder
from r1pipe.runs.logs import read_metrics

LENGTH = "completions/mean_length"
"""Metric: mean tokens of a step's completions."""
CALLING = "episodes/calling"
"""Metric: share of a step's episodes that call a tool."""
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

CALLS: dict[str, Callable[[dict], str]] = {
    "calls": lambda entry: f"{entry['tool_calls']:.2f}",
    "calling": lambda entry: percent(entry["calling"]),
    "malformed": lambda entry: f"{entry['malformed_calls']:.2f}",
}
"""Where samples called tools, or tried to: calls per sample, samples that call, malformed calls."""


def format_table(summary: list[dict]) -> str:
    """For each set of problems a table, with its protocol in the line below."""
    return "\n\n".join(
        draw_table([list(columns), *([cell(e) for cell in columns.values()] for e in entries)])
        + "\n\n"
        + describe_protocol(entries)
        for entries in group_by_set(summary)
        for columns in [list_columns(entries)]
    )


def list_columns(entries: list[dict]) -> dict[str, Callable[[dict], str]]:
    calls = any(entry.get("tool_calls") or entry.get("malformed_calls") for entry in entries)
    if not calls or not all("tool_calls" in entry for entry in entries):
        return COLUMNS
    return {**COLUMNS, **CALLS}


def format_report(summary: list[dict], lengths: Sequence[str] = ()) -> str:
    """All of the summary: for each set the tables of `format_table`, pass@k, pass@1 by category and
    samples by length, with a column per checkpoint; then `lengths`, from `describe_lengths`."""
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
    """A line for each on-policy stage: mean tokens of its completions and mean rewards, over the
    first and the last tenth of the steps."""
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
    """On-policy stages with logged steps, and their metrics."""
    for stage in run.recipe.stages:
        if isinstance(stage, OnPolicy) and (rows := read_metrics(run.stage_dir(stage.name))):
            yield stage, rows


def list_rewards(rows: list[dict]) -> dict[str, str]:
    """Metrics of mean rewards that judged something, and the function's name without its module."""
    names = [name for name in rows[0] if re.fullmatch("rewards/[^/]+/mean", name)]
    judged = [name for name in names if any(row.get(name) is not None for row in rows)]
    return {name: name.split("/")[1].rpartition(".")[2] for name in judged}


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
    """A row per name in any entry's cells, a column per entry."""
    columns = [list_cells(entry) for entry in entries]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if title == "tokens":
        names.sort(key=lambda name: int(name.split()[0]))
    header = [title, *(entry["stage"] for entry in entries)]
    return draw_table([header, *([n, *(c.get(n, "-") for c in columns)] for n in names)])


def draw_table(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(set_cell_size(*pair) for pair in zip(r, widths)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
