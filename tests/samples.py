"""All samples of a job in memory, for tests that check each."""

from collections.abc import Callable

from r1pipe.rollout.sampling import SampleSource, SamplingJob, sample_and_score
from r1pipe.types import Rollout, Score


def sample_all(
    job: SamplingJob, open_source: Callable[[], SampleSource]
) -> tuple[list[Rollout], list[Score]]:
    """Samples of one problem are adjacent."""
    groups = sample_and_score(job, open_source, lambda problem, *group: group)
    return [r for rollouts, _ in groups for r in rollouts], [s for _, ss in groups for s in ss]
