"""Plots of a run: learning curves and the experts' load."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.evals.tables import CALLING, LENGTH, group_by_set, list_rewards, read_on_policy_metrics
from r1pipe.runs.folder import RunFolder
from r1pipe.runs.logs import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(run: RunFolder, summary: list[dict], path: Path) -> None:
    """Reward, divergence and length over the steps of the on-policy stages; pass@1 on the first set
    of problems."""
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
        if any(row.get(CALLING) for row in metrics):
            totals |= {CALLING: "m-."}
        for name, style in totals.items():
            if any(name in row for row in metrics):
                lines[name] = (name, {"lw": 1, "ls": style[1:], "color": style[0]})
        for name, (label, style) in lines.items():
            values = [math.nan if row.get(name) is None else row[name] for row in metrics]
            known = label in colors  # from an earlier stage: the same color, once in the legend
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
    """As a PNG, atomically."""
    from matplotlib import pyplot

    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(path)
