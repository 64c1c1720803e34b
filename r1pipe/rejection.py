"""Rejection sampling: a policy's own right answers become traces. Shared by reject and distill."""

from dataclasses import replace
from functools import partial

from r1pipe.config import Traces
from r1pipe.records import Problem, Rollout, Score
from r1pipe.runs import JOURNAL
from r1pipe.sampling import SamplingJob, identify_weights, sample_and_score
from r1pipe.stage import StageContext


def collect_traces(
    context: StageContext, checkpoint: str, problems: list[Problem], settings: Traces, label: str
) -> tuple[list[Problem], dict[str, float]]:
    """Problems whose `solution` is a sample that every reward accepts, and how many there were."""
    job = SamplingJob(
        problems=problems,
        num_samples=settings.num_generations,
        sampling=settings.sampling,
        seed_parts=(context.recipe.seed, context.stage_name),
        rewards=settings.rewards,
        origin=identify_weights(checkpoint),
        folder=context.folder / JOURNAL,
        label=label,
    )
    rollouts, scores = sample_and_score(job, partial(context.engines.open, checkpoint))
    accepted = [is_accepted(r, s) for r, s in zip(rollouts, scores, strict=True)]
    traces = []
    for i, problem in enumerate(problems):
        samples = range(i * settings.num_generations, (i + 1) * settings.num_generations)
        kept = [rollouts[j] for j in samples if accepted[j]]
        kept.sort(key=lambda rollout: len(rollout.completion_ids))
        traces += [
            replace(problem, id=f"{problem.id}#{rollout.sample}", solution=rollout.completion)
            for rollout in kept[: settings.max_per_problem]
        ]
    return traces, {
        "samples": len(rollouts),
        "samples_accepted": sum(accepted),
        "traces": len(traces),
    }


def is_accepted(rollout: Rollout, score: Score) -> bool:
    """Complete, and given the full reward by every function. None is not a yes."""
    full = all(value is not None and value >= 1.0 for value in score.rewards.values())
    return full and not rollout.truncated
