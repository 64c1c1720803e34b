"""The card of a published model: the hub's metadata and the text, written from the run's records.

Nothing is typed by hand, so nothing can differ from what was run. Imports no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from r1pipe import __version__
from r1pipe.data.problems import read_constants
from r1pipe.evals.tables import draw_table, format_table
from r1pipe.publish.artifacts import Artifacts
from r1pipe.publish.candidate import Candidate
from r1pipe.publish.origin import Origin
from r1pipe.publish.usage import (
    describe_gguf,
    fence,
    write_transformers_example,
    write_vllm_example,
)
from r1pipe.report.costs import describe_costs
from r1pipe.runs.hashes import hash_file
from r1pipe.runs.ledger import LEDGER
from r1pipe.runs.lineage import FILE as LINEAGE
from r1pipe.runs.lineage import hide_places, read_lineage
from r1pipe.runs.reader import Evaluation, StageFolder

SHARES = {
    "pass_at_1": "pass@1",
    "pass_at_k": "pass@{k}",
    "maj_at_k": "maj@{k}",
}
"""Figures of a summary for `model-index`, and the hub's names for them."""


THINKS = " It was trained to write its reasoning between `<think>` and `</think>`, then the answer."


@dataclass(frozen=True)
class Card:
    """Everything that a card says is read from these."""

    repo_id: str
    candidate: Candidate
    origin: Origin
    artifacts: Artifacts
    objections: list[str]
    """Those that `--force` has overridden."""

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def is_adapter(self) -> bool:
        return self.artifacts.adapter_rank is not None

    @property
    def run_folder(self) -> Path:
        return self.candidate.run.path

    @property
    def stage(self) -> StageFolder:
        return self.candidate.stage

    @property
    def base_model(self) -> str | None:
        return self.candidate.base_model

    @property
    def lineage(self) -> list[StageFolder]:
        return self.candidate.lineage

    @property
    def evaluations(self) -> list[Evaluation]:
        return self.candidate.evaluations


def write_model_card(card: Card) -> str:
    """README.md of the model's repository."""
    metadata = ModelCardData(
        license=card.origin.license,
        library_name="peft" if card.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=card.origin.base_hub_id,
        base_model_relation=find_relation(card),
        datasets=sorted({d.hub_id for d in card.origin.data if d.hub_id}) or None,
        tags=["r1pipe", "reasoning", *sorted({stage.kind for stage in card.lineage} - {"init"})],
        model_name=card.name,
        eval_results=[r for e in card.evaluations for r in list_results(e)] or None,
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {card.name}",
        describe_model(card),
        *describe_objections(card),
        "## Evaluation",
        *(describe_evaluation(card, evaluation) for evaluation in card.evaluations),
        "## How to run it",
        fence("python", write_transformers_example(card)),
        *([] if card.is_adapter else [fence("python", write_vllm_example(card))]),
        *describe_gguf(card),
        "## What it was made from",
        describe_sources(card),
        "## Training data",
        describe_data(card),
        "## Cost",
        describe_cost(card),
        "## Limits",
        describe_limits(card),
        "## Recipe",
        "Every setting, with defaults filled in, in the order of the stages:",
        fence("yaml", dump_recipe(card)),
        "## Lineage",
        describe_lineage(card),
    ]
    return "\n\n".join(sections) + "\n"


def find_relation(card: Card) -> str | None:
    """The hub's word for what the model is of its base model."""
    if card.origin.base_hub_id is None:
        return None
    return "adapter" if card.is_adapter else "finetune"


def list_results(evaluation: Evaluation) -> list[EvalResult]:
    """The figures of one evaluation for the card's `model-index`."""
    entry = evaluation.entry
    protocol = {
        key: entry[key]
        for key in ("num_problems", "num_samples", "temperature", "top_p", "max_completion_length")
    }
    data = evaluation.data
    dataset = read_constants(data.recipe).get("HUB_ID", data.recipe) if data.recipe else data.label
    results = []
    for key, template in SHARES.items():
        name = template.format(k=entry["k"])
        arguments = {**protocol, "overlap": entry["overlap"]}
        if entry[key] is None:  # there is no majority of programs
            continue
        if key == "pass_at_1":
            arguments |= {"ci_95_low": entry["ci_low"], "ci_95_high": entry["ci_high"]}
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=entry["dataset"],
                dataset_split=data.split,
                metric_type=name,
                metric_name=name,
                metric_value=entry[key],
                metric_args=arguments,
            )
        )
    return results


def describe_model(card: Card) -> str:
    start = (
        f"trained from `{hide_places(card.base_model)}`"
        if card.base_model
        else "from random weights"
    )
    model = card.artifacts
    what = f"A {model.model_type} model of {model.num_parameters:,} parameters in {model.dtype}"
    if card.is_adapter:
        what = (
            f"A LoRA adapter of {model.num_parameters:,} parameters, of rank {model.adapter_rank}, "
            f"beside [{card.origin.base_hub_id}](https://huggingface.co/{card.origin.base_hub_id}) "
            f"in {model.dtype}"
        )
    return (
        f"{what}, {start}: the stage `{card.stage.name}` ({card.stage.section.how_made}) of the "
        f"run `{card.run_folder.name}`, made and published with r1pipe {__version__}."
        + model.long_context
        + (THINKS if card.stage.section.optimization else "")
    )


def describe_objections(card: Card) -> list[str]:
    if not card.objections:
        return []
    lines = ["> [!WARNING]", "> Published with `--force`; overridden checks:", ">"]
    return ["\n".join([*lines, *(f"> - {objection}" for objection in card.objections)])]


def describe_evaluation(card: Card, evaluation: Evaluation) -> str:
    """The checkpoint and its ancestors on the same problems."""
    names = {card.base_model, *(stage.name for stage in card.lineage)}
    rows: list[dict[str, Any]] = []
    for entry in evaluation.stage.read_summary():
        if entry["stage"] in names and entry["dataset"] == evaluation.entry["dataset"]:
            compared = entry.get("compared_with")
            if not rows or compared is None or compared["stage"] != rows[-1]["stage"]:
                entry = {**entry, "compared_with": None}
            rows.append(entry)
    return format_table([{**row, "stage": hide_places(row["stage"])} for row in rows])


def describe_sources(card: Card) -> str:
    rows = [[s.role, f"`{hide_places(s.name)}`", s.license] for s in card.origin.sources]
    if card.base_model is None:
        rows.insert(0, ["base model", "none: random weights", ""])
    return (
        format_rows(["", "", "license"], rows)
        + f"\n\nThe model's own license, which these allow: {card.origin.license}."
    )


def describe_data(card: Card) -> str:
    rows = []
    for data in card.origin.data:
        record = data.stage.record
        dropped, rate = record.get("overlap_dropped"), record.get("overlap_rate")
        rows.append(
            [
                data.stage.name,
                f"`{hide_places(data.name)}`",
                data.split,
                record.get("train_rows", ""),
                "not compared" if dropped is None else f"{dropped} ({rate:.2%})",
            ]
        )
    ngram = card.stage.settings["ngram"]
    return (
        format_rows(["stage", "data", "split", "rows trained on", "dropped for overlap"], rows)
        + f"\n\nRows that share {ngram} words in a row with a held-out problem were dropped before "
        f"training. Contamination of this model: {describe_overlap(card)}."
    )


def describe_overlap(card: Card) -> str:
    if not card.evaluations:
        return "unknown: it was not evaluated"
    overlaps = [e.entry["overlap"] for e in card.evaluations]
    if None in overlaps:
        return f"unknown: nothing says what {hide_places(card.base_model)} was trained on"
    return f"{max(overlaps):.1%} of the held-out problems overlap with what it was trained on"


def describe_cost(card: Card) -> str:
    """The whole run's, from its ledger; without one, the stages' records."""
    if (card.run_folder / LEDGER).exists():
        table, notes = describe_costs(card.run_folder).split("\n\n", 1)
        return f"{table}\n\n" + "\n".join(f"- {note}" for note in notes.splitlines())
    rows = [
        [s.name, s.kind, f"{s.record['wall_s']:.0f} s", f"{s.record['peak_memory_gib']} GiB"]
        for s in card.lineage
    ]
    total = sum(s.record["wall_s"] for s in card.lineage)
    return (
        format_rows(["stage", "kind", "wall time", "peak memory"], rows)
        + f"\n\n{total:.0f} s in all, evaluation not counted."
    )


def describe_limits(card: Card) -> str:
    sets = sorted({e.entry["dataset"] for e in card.evaluations})
    lines = [
        f"It was measured on {', '.join(sets) or 'nothing'} and nothing else: what it does on "
        "other tasks, in other languages or in longer conversations is not known.",
        "Its reasoning is text that was rewarded for right answers. It need not be how the "
        "answer came about.",
        "It was not trained to refuse anything, and its safety was not evaluated.",
    ]
    for evaluation in card.evaluations:
        entry = evaluation.entry
        if entry["truncated"] > 0:
            lines.append(
                f"{entry['truncated']:.1%} of its samples on {entry['dataset']} were cut at "
                f"{entry['max_completion_length']} tokens and count as wrong."
            )
        if entry["unjudged"] > 0:
            lines.append(
                f"{entry['unjudged']:.1%} of its samples on {entry['dataset']} could not be judged "
                "and count as wrong."
            )
        if entry["num_problems"] < 100:
            lines.append(
                f"{entry['dataset']} is {entry['num_problems']} problems here: see the interval."
            )
    return "\n".join(f"- {line}" for line in lines)


def dump_recipe(card: Card) -> str:
    """The stages in the lineage and the evaluations, as one recipe."""
    stages = card.lineage + [e.stage for e in card.evaluations]
    shared = {key: value for key, value in card.stage.config.items() if key != "stage"}
    sections = [s.config.get("stage") or hide_places(s.settings) for s in stages]
    recipe = {**shared, "stages": sections}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def describe_lineage(card: Card) -> str:
    """Commits and hashes, down to those of each stage's own record."""
    rows = []
    for stage in [*card.lineage, *(e.stage for e in card.evaluations)]:
        file, record = stage.folder / LINEAGE, read_lineage(stage.folder) or {}
        commit = (record.get("git") or {}).get("commit")
        rows.append(
            [
                stage.name,
                ", ".join(map(hide_places, stage.parents)),
                stage.record["finished"],
                f"`{commit[:12]}`" if commit else "",
                f"`{hash_file(file)}`" if file.exists() else "none",
            ]
        )
    files = [[f"`{name}`", f"`{digest}`"] for name, digest in card.artifacts.hashes.items()]
    return "\n\n".join(
        [
            format_rows(["stage", "from", "finished", "r1pipe at", f"SHA-256 of {LINEAGE}"], rows),
            format_rows(["published file", "SHA-256"], files),
        ]
    )


def write_dataset_card(card: Card, num_rows: dict[str, int]) -> str:
    """README.md of the rollouts' repository. `num_rows`: by file or pattern of files."""
    metadata = DatasetCardData(
        license=card.origin.license,
        task_categories=["text-generation"],
        tags=["r1pipe", "reasoning", "rollouts"],
        configs=[
            {
                "config_name": re.sub(r"(/\*)?\.\w+$", "", files).replace("/", "-"),
                "data_files": files,
            }
            for files in num_rows
        ],
    )
    rows = [[f"`{files}`", f"{count:,}"] for files, count in num_rows.items()]
    return (
        "\n\n".join(
            [
                f"---\n{metadata.to_yaml()}\n---",
                f"# Rollouts of {card.name}",
                f"What the policies of the run `{card.run_folder.name}` sampled before "
                f"[{card.repo_id}](https://huggingface.co/{card.repo_id}), with the rewards of "
                "each sample; written by models, judged by rules.",
                format_rows(["files", "rows"], rows),
                describe_sources(card),
            ]
        )
        + "\n"
    )


def format_rows(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    return draw_table([header, *([str(cell) for cell in row] for row in rows)])
