"""Samples of many problems, scored: what evaluation and rejection sampling have in common."""

from r1pipe import distributed
from r1pipe.config import Sampling
from r1pipe.progress import StageProgress
from r1pipe.records import Problem, Rollout, Score
from r1pipe.rollout import Sampler
from r1pipe.scoring import Scorer


def sample_and_score(
    sampler: Sampler,
    scorer: Scorer,
    problems: list[Problem],
    num_samples: int,
    sampling: Sampling,
    seed_parts: tuple[object, ...],
    label: str,
) -> tuple[list[Rollout], list[Score]]:
    """`num_samples` scored rollouts per problem, those of one problem next to each other.

    Of several ranks each samples and scores its share, and gets everything.
    """
    part = sampler.own_part(len(problems))
    problems_here = problems[part]
    with StageProgress(label, len(problems_here) * num_samples) as progress:
        rollouts = sampler.generate(
            problems,
            num_samples,
            sampling,
            seed_parts,
            on_group=lambda _, group: progress.advance(len(group)),
            part=part,
        )
    kept = sampler.kept_part(len(problems_here))
    owners = [problem for problem in problems_here[kept] for _ in range(num_samples)]
    rollouts = rollouts[kept.start * num_samples : kept.stop * num_samples]
    scores = scorer.score(owners, rollouts) if rollouts else []
    by_rank = distributed.gather((rollouts, scores))
    everything = zip(*((r, s) for part in by_rank for r, s in zip(*part, strict=True)))
    all_rollouts, all_scores = map(list, everything)
    return all_rollouts, all_scores
