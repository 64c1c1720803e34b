"""The eval stage: every checkpoint on the same held-out problems.

Run it with `r1pipe eval configs/demo.yaml`.
"""

import json
import time
from dataclasses import asdict
from itertools import starmap
from pathlib import Path
from typing import Any

from r1pipe.config.base import ENVIRONMENT, Reward
from r1pipe.config.evals import Eval, EvalSet
from r1pipe.context import StageContext
from r1pipe.data.decontamination import OverlapIndex
from r1pipe.envs.driver import choose_source
from r1pipe.evals.metrics import (
    ProblemResult,
    compare_paired,
    default_num_samples,
    find_right,
    hash_question,
    measure,
    sum_up_problems,
)
from r1pipe.evals.plots import plot_curves, plot_expert_load
from r1pipe.evals.tables import describe_lengths, format_report, format_table
from r1pipe.rollout.sampling import (
    SampleSource,
    SamplingJob,
    identify_weights,
    read_samples,
    sample_and_score,
)
from r1pipe.runs.folder import JOURNAL
from r1pipe.types import Problem, Rollout, Score, describe_rollout
from r1pipe.utils.distributed import is_first
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json, read_jsonl, write_jsonl, write_text
from r1pipe.utils.progress import log_line


def run(stage: Eval, context: StageContext) -> dict[str, Any]:
    """Write summary.json (one object per set and checkpoint), summary.md, results.jsonl (one row
    per problem of these), samples and curves; print the table."""
    sets = [HeldOut(source, context) for source in stage.data]
    refuse_overlap(stage, sets)
    results: dict[tuple[str, str], list[ProblemResult]] = {}
    summary = []
    # Consecutive checkpoints of one architecture share an engine.
    for name in stage.checkpoints:
        for heldout in sets:
            number = len(results) + 1
            entry, found = evaluate(stage, heldout, name, context, number)
            summary.append(entry)
            results[heldout.label, name] = found
    summary = order_by_set(summary)
    compare_in_order(summary, results)
    write_results(stage, context, summary, results)
    everything = [result for found in results.values() for result in found]
    return {
        "checkpoints": len(stage.checkpoints),
        "problems": sum(len(heldout.problems) for heldout in sets),
        "tokens_sampled": round(sum(r.mean_tokens * r.num_samples for r in everything)),
    }


class HeldOut:
    """One problem set of the stage, and which training data overlaps with it."""

    def __init__(self, source: EvalSet, context: StageContext):
        self.source, self.label = source, source.label
        self.problems = context.load_problems(source)
        if repeated := len(self.problems) - len(set(map(hash_question, self.problems))):
            log_line(
                f"{context.stage_name}: {repeated} of the {len(self.problems)} problems of "
                f"{self.label} are repeats: the intervals count each text once"
            )
        self.overlap = TrainingOverlap(context, self.problems)


def refuse_overlap(stage: Eval, sets: list[HeldOut]) -> None:
    """Raises UserError if a checkpoint was trained on too much of a set."""
    for heldout in sets:
        for name in stage.checkpoints:
            share = heldout.overlap.share(name)
            if share is not None and share > stage.max_overlap:
                raise UserError(
                    f'stage "{stage.name}": "{name}" was trained on rows that overlap with '
                    f"{share:.1%} of {heldout.label} (max_overlap {stage.max_overlap:.1%}): train "
                    "it again, which leaves them out (--redo), or take another set"
                )


def evaluate(
    stage: Eval, heldout: HeldOut, name: str, context: StageContext, number: int
) -> tuple[dict[str, Any], list[ProblemResult]]:
    """One checkpoint on one set: the summary's entry, and results by problem."""
    started = time.monotonic()
    problems = heldout.problems
    checkpoint = context.checkpoint(name)
    reward = heldout.source.reward or stage.reward
    num_samples = (
        heldout.source.num_samples or stage.num_samples or default_num_samples(len(problems))
    )
    job = SamplingJob(
        problems=problems,
        num_samples=num_samples,
        sampling=stage.sampling,
        # Common random numbers: the seeds depend on neither checkpoint nor stage.
        seed_parts=(context.recipe.seed, stage.kind),
        rewards=[Reward(function=f) for f in (reward, stage.format_reward) if f != ENVIRONMENT],
        origin=identify_weights(checkpoint, context.recipe.dtype),
        folder=context.shared_folder / JOURNAL / str(number),
        label=f"{stage.name}: {name}" + (f" on {heldout.label}" if len(stage.data) > 1 else ""),
        environment=stage.environment,
    )
    k = min(stage.k or num_samples, num_samples)

    def keep(
        problem: Problem, rollouts: list[Rollout], scores: list[Score]
    ) -> tuple[ProblemResult, list[Rollout], list[Score]]:
        """Figures only; the texts stay in the journal."""
        (result,) = sum_up_problems([problem], rollouts, find_right(scores, reward), k)
        for rollout in rollouts:
            rollout.empty()
        return result, rollouts, scores

    def open_source() -> SampleSource:
        return choose_source(context.engines.open(checkpoint), stage.environment, problems)

    groups = sample_and_score(job, open_source, keep)
    results = [result for result, _, _ in groups]
    rollouts = [rollout for _, some, _ in groups for rollout in some]
    scores = [score for _, _, some in groups for score in some]
    samples = f"samples_{number}.jsonl"
    if is_first():
        rows = starmap(describe_rollout, read_samples(job))
        write_jsonl(context.folder / samples, rows)
    record = context.run.read_record(name) if context.recipe.stage(name) else None
    entry = {
        "stage": name,
        "checkpoint": checkpoint,
        "dataset": heldout.label,
        **measure(results, rollouts, scores, stage.sampling, k, reward, stage.format_reward),
        "overlap": heldout.overlap.share(name),
        "overlap_dropped": heldout.overlap.num_dropped(name),
        # Time of the stage that made the checkpoint, if any; its evaluation took eval_s.
        "wall_s": record["wall_s"] if record else None,
        "eval_s": round(time.monotonic() - started, 1),
        **({"environment": stage.environment.name} if stage.environment else {}),
        "samples": samples,
    }
    return entry, results


def order_by_set(summary: list[dict]) -> list[dict]:
    labels = list(dict.fromkeys(entry["dataset"] for entry in summary))
    return sorted(summary, key=lambda entry: labels.index(entry["dataset"]))


def compare_in_order(
    summary: list[dict], results: dict[tuple[str, str], list[ProblemResult]]
) -> None:
    """Add to each entry its difference to the one before it on the same set."""
    for before, entry in zip([None, *summary], summary):
        entry["compared_with"] = None
        if before is not None and before["dataset"] == entry["dataset"]:
            pair = (results[entry["dataset"], e["stage"]] for e in (before, entry))
            entry["compared_with"] = {"stage": before["stage"], **compare_paired(*pair)}


def join_evaluations(folders: dict[str, Path]) -> str:
    """One table of the checkpoints in finished eval stages of these folders, evaluated by the same
    protocol."""
    summary, results = [], {}
    for name, folder in folders.items():
        entries = read_json(folder / "summary.json")
        summary += [entry for entry in entries if entry["stage"] == name]
        for _, row in read_jsonl(folder / "results.jsonl"):
            key = row.pop("dataset"), row.pop("stage")
            if key[1] == name:
                results.setdefault(key, []).append(ProblemResult(**row))
    summary = order_by_set(summary)
    compare_in_order(summary, results)
    return format_table(summary)


def write_results(
    stage: Eval,
    context: StageContext,
    summary: list[dict],
    results: dict[tuple[str, str], list[ProblemResult]],
) -> None:
    lengths = describe_lengths(context.run)
    texts = {
        "summary.json": json.dumps(summary, indent=2) + "\n",
        "summary.md": format_report(summary, lengths),
    }
    write_jsonl(
        context.folder / "results.jsonl",
        (
            {"stage": name, "dataset": label, **asdict(result)}
            for (label, name), found in results.items()
            for result in found
        ),
    )
    for file, text in texts.items():
        write_text(context.folder / file, text)
    if not is_first():
        return
    if stage.summarizes:
        print(format_table(summary))
        for file, text in texts.items():
            write_text(context.run.path / file, text)
        plot_curves(context.run, summary, context.run.path / "curves.png")
        plot_expert_load(context.run, context.run.path / "experts.png")
        for line in lengths:
            log_line(line)
        log_line(f"written: {context.run.path}/summary.json, summary.md, curves.png")


class TrainingOverlap:
    """Overlap between held-out problems and a checkpoint's training data."""

    def __init__(self, context: StageContext, problems: list[Problem]):
        self._context = context
        self._num_problems = len(problems)
        self._index = OverlapIndex(problems, context.recipe.ngram)
        self._ids_of_stage: dict[str, set[str]] = {}

    def share(self, checkpoint: str) -> float | None:
        """Share of the problems that overlap with the training data of the checkpoint and its
        ancestors; None if one of them is a model from elsewhere, whose data is unknown."""
        names = self._list_ancestors(checkpoint)
        if any(self._context.recipe.stage(name) is None for name in names):
            return None
        overlapping = set().union(*map(self._find, names))
        return round(len(overlapping) / self._num_problems, 4)

    def num_dropped(self, checkpoint: str) -> int:
        """Rows dropped from its and its ancestors' training for overlap with held-out sets."""
        records = map(self._context.run.read_record, self._list_ancestors(checkpoint))
        return sum(record.get("overlap_dropped", 0) for record in records if record)

    def _list_ancestors(self, checkpoint: str) -> list[str]:
        """The checkpoint and all stages, folders and hub ids that it comes from, once each."""
        names = [checkpoint]
        for name in names:
            stage = self._context.recipe.stage(name)
            names += [n for n in (stage.parents() if stage else ()) if n not in names]
        return names

    def _find(self, stage_name: str) -> set[str]:
        """Ids of the held-out problems that overlap with one stage's training problems, or with the
        traces that it sampled."""
        if stage_name not in self._ids_of_stage:
            folder = self._context.run.stage_dir(stage_name)
            paths = [folder / "problems.jsonl"]
            if self._context.recipe.stage(stage_name).makes_checkpoint:
                paths.append(folder / "traces.jsonl")  # else a later stage chooses what to train on
            rows = [
                Problem(**row) for path in paths for _, row in read_jsonl(path, missing_ok=True)
            ]
            self._ids_of_stage[stage_name] = set().union(*self._index.find_rows(rows))
        return self._ids_of_stage[stage_name]
