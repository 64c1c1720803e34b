"""Evaluation: every checkpoint on the same held-out problems.

Run it with `r1pipe eval configs/demo.yaml`.
"""

import json
import time
from typing import Any

from r1pipe.config import Eval, Reward
from r1pipe.distributed import is_first
from r1pipe.problems import OverlapIndex
from r1pipe.progress import say
from r1pipe.records import (
    Problem,
    Rollout,
    Score,
    describe_rollout,
    read_jsonl,
    write_jsonl,
    write_text,
)
from r1pipe.rollout import Sampler
from r1pipe.sampling import sample_and_score
from r1pipe.scoring import Scorer, mean
from r1pipe.stage import StageContext
from r1pipe.statistics import clustered_interval, estimate_pass_at_k, vote
from r1pipe.summary import format_table, plot_curves, plot_expert_load
from rewards import extract_answer


def run(stage: Eval, context: StageContext) -> dict[str, Any]:
    """Write summary.json (one object per checkpoint), samples, and the curves; print the table."""
    problems = context.load(stage.data)
    scorer = Scorer([Reward(function=stage.reward), Reward(function=stage.format_reward)])
    overlap = TrainingOverlap(context, problems)
    summary = []
    # One engine after another: checkpoints of one architecture next to each other share one.
    for name in stage.checkpoints:
        started = time.monotonic()
        checkpoint = context.checkpoint(name)
        sampler = context.engines.open(checkpoint)
        label = f"{stage.name}: {name}"
        rollouts, scores = sample_checkpoint(
            stage, sampler, scorer, problems, context.recipe.seed, label
        )
        record = context.run.read_record(name) if context.recipe.stage(name) else None
        summary.append(
            {
                "stage": name,
                "checkpoint": checkpoint,
                "dataset": f"{stage.data.recipe}/{stage.data.split}",
                **measure(stage, problems, rollouts, scores),
                "overlap": overlap.share(name),
                # Of the stage that made the checkpoint; its evaluation took eval_s.
                "wall_s": record["wall_s"] if record else 0.0,
                "eval_s": round(time.monotonic() - started, 1),
            }
        )
        write_jsonl(
            context.folder / f"samples_{len(summary)}.jsonl",
            map(describe_rollout, repeat_each(problems, stage), rollouts, scores),
        )
    text = json.dumps(summary, indent=2) + "\n"
    write_text(context.folder / "summary.json", text)
    if is_first():
        write_text(context.run.path / "summary.json", text)
        plot_curves(context.run, summary, context.run.path / "curves.png")
        plot_expert_load(context.run, context.run.path / "experts.png")
        print(format_table(summary))
    say(f"written: {context.run.path}/summary.json, {context.run.path}/curves.png")
    return {"checkpoints": len(summary), "problems": len(problems)}


def repeat_each(problems: list[Problem], stage: Eval) -> list[Problem]:
    return [problem for problem in problems for _ in range(stage.num_samples)]


def sample_checkpoint(
    stage: Eval, sampler: Sampler, scorer: Scorer, problems: list[Problem], seed: int, label: str
) -> tuple[list[Rollout], list[Score]]:
    """`num_samples` scored rollouts per problem. The seeds do not depend on the checkpoint, so
    that checkpoints are compared on common random numbers."""
    return sample_and_score(
        sampler, scorer, problems, stage.num_samples, stage.sampling, (seed, stage.name), label
    )


def measure(
    stage: Eval, problems: list[Problem], rollouts: list[Rollout], scores: list[Score]
) -> dict[str, Any]:
    """The figures of one checkpoint, with their protocol. What cannot be judged counts as wrong,
    and is counted."""
    k = min(stage.k or stage.num_samples, stage.num_samples)
    right = [(score.rewards[stage.reward] or 0.0) >= 1.0 for score in scores]
    pass_rates, pass_at_k, majority = [], [], []
    for i in range(len(problems)):
        samples = slice(i * stage.num_samples, (i + 1) * stage.num_samples)
        num_right = sum(right[samples])
        pass_rates.append(num_right / stage.num_samples)
        pass_at_k.append(estimate_pass_at_k(stage.num_samples, num_right, k))
        majority.append(is_majority_right(rollouts[samples][:k], right[samples][:k]))
    ci_low, ci_high = clustered_interval(pass_rates)
    judged_format = [(score.rewards[stage.format_reward] or 0.0) >= 1.0 for score in scores]
    return {
        "num_problems": len(problems),
        "num_samples": stage.num_samples,
        "temperature": stage.sampling.temperature,
        "top_p": stage.sampling.top_p,
        "max_completion_length": stage.sampling.max_completion_length,
        "pass_at_1": round(mean(pass_rates), 4),
        "ci_low": round(ci_low, 4),
        "ci_high": round(ci_high, 4),
        "k": k,
        "pass_at_k": round(mean(pass_at_k), 4),
        "maj_at_k": round(mean(majority), 4),
        "format_rate": round(mean(judged_format), 4),
        "mean_tokens": round(mean([len(r.completion_ids) for r in rollouts]), 1),
        "truncated": round(mean([r.truncated for r in rollouts]), 4),
        "unjudged": round(mean([s.rewards[stage.reward] is None for s in scores]), 4),
    }


def is_majority_right(rollouts: list[Rollout], right: list[bool]) -> bool:
    answers = [extract_answer(rollout.completion) for rollout in rollouts]
    winner = vote(answers)
    return winner is not None and right[answers.index(winner)]


class TrainingOverlap:
    """How much of the held-out problems a checkpoint may have seen in training."""

    def __init__(self, context: StageContext, problems: list[Problem]):
        self._context = context
        self._num_problems = len(problems)
        self._index = OverlapIndex(problems, context.recipe.ngram)
        self._ids_of_stage: dict[str, set[str]] = {}

    def share(self, checkpoint: str) -> float | None:
        """Share of the problems that overlap with what the checkpoint, and all it comes from, was
        trained on; None if part of that is a model from elsewhere, whose data nobody here knows."""
        overlapping: set[str] = set()
        names, seen = [checkpoint], set()
        while names:
            name = names.pop()
            stage = self._context.recipe.stage(name)
            if stage is None:
                return None
            if name not in seen:
                seen.add(name)
                names += stage.parents()
                overlapping |= self._find(name)
        return round(len(overlapping) / self._num_problems, 4)

    def _find(self, stage_name: str) -> set[str]:
        """Ids of the held-out problems that overlap with one stage's training problems."""
        if stage_name not in self._ids_of_stage:
            path = self._context.run.stage_dir(stage_name) / "problems.jsonl"
            rows = read_jsonl(path) if path.exists() else ()
            found = (self._index.find(Problem(**row)) for _, row in rows)
            self._ids_of_stage[stage_name] = set().union(*found)
        return self._ids_of_stage[stage_name]
