"""What a run has to show for itself: the table of its summary, and the curves as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config import Grpo
from r1pipe.runs import RunFolder, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "checkpoint": ("stage", "{}"),
    "pass@1": ("pass_at_1", "{:.1%}"),
    "95% interval": (("ci_low", "ci_high"), "{:.1%} - {:.1%}"),
    "pass@k": ("pass_at_k", "{:.1%}"),
    "maj@k": ("maj_at_k", "{:.1%}"),
    "format": ("format_rate", "{:.1%}"),
    "tokens": ("mean_tokens", "{:.1f}"),
    "truncated": ("truncated", "{:.1%}"),
    "wall": ("wall_s", "{:.0f} s"),
}


def format_table(summary: list[dict]) -> str:
    """The summary as a Markdown table with its protocol in the line below."""
    rows = [list(COLUMNS)]
    for entry in summary:
        cells = []
        for keys, template in COLUMNS.values():
            keys = (keys,) if isinstance(keys, str) else keys
            cells.append(template.format(*(entry[key] for key in keys)))
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    first = summary[0]
    overlaps = [entry["overlap"] for entry in summary if entry["overlap"] is not None]
    overlap = f"{max(overlaps):.1%}" if overlaps else "unknown"
    lines.append(
        f"\n{first['dataset']}: {first['num_problems']} problems x {first['num_samples']} samples, "
        f"T = {first['temperature']:g}, top-p = {first['top_p']:g}, k = {first['k']}; interval "
        f"clustered by problem; overlap with training {overlap}"
    )
    return "\n".join(lines)


def plot_curves(run: RunFolder, summary: list[dict], path: Path) -> None:
    """Reward, accuracy and length over the steps of each grpo stage, and pass@1 per checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    offset = 0
    length_axis = left.twinx()
    for stage in run.recipe.stages:
        if not isinstance(stage, Grpo):
            continue
        metrics = read_metrics(run.stage_dir(stage.name))
        if not metrics:
            continue
        steps = [offset + row["step"] for row in metrics]
        names = [name for name in metrics[0] if name.startswith("rewards/")]
        for name in (n for n in names if n.endswith("/mean")):
            label = name.removeprefix("rewards/").removesuffix("/mean").rpartition(".")[2]
            left.plot(steps, [row[name] for row in metrics], label=label)
        left.plot(steps, [row["reward"] for row in metrics], "k--", lw=1, label="reward")
        lengths = [row["completions/mean_length"] for row in metrics]
        length_axis.plot(steps, lengths, color="tab:gray", lw=1)
        offset += len(metrics)
    left.set(title="GRPO: rewards of the sampled groups", xlabel="step", ylabel="mean reward")
    left.legend(loc="lower right")
    length_axis.set_ylabel("mean completion length (tokens)", color="tab:gray")

    names = [entry["stage"] for entry in summary]
    values = [100 * entry["pass_at_1"] for entry in summary]
    low = [max(0.0, 100 * (entry["pass_at_1"] - entry["ci_low"])) for entry in summary]
    high = [max(0.0, 100 * (entry["ci_high"] - entry["pass_at_1"])) for entry in summary]
    bars = right.bar(range(len(names)), values, yerr=[low, high], capsize=4, color="tab:blue")
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set_xticks(range(len(names)), [Path(name).name for name in names])
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
