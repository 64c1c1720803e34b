"""The samples of one problem on their way through a sampler."""

from collections import Counter
from dataclasses import dataclass, field

from r1pipe.types import Problem, Rollout
from r1pipe.utils.seeds import derive_seed


@dataclass(eq=False)
class SampleGroup:
    """All samples of one problem, finished or not."""

    index: int
    """Of the problem among those asked for."""
    problem: Problem
    seeds: list[int]
    rollouts: list[Rollout | None]
    """By the sample's number; None while it is missing."""
    prompt_ids: list[int] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        """Numbers of the samples that are not finished."""
        return [number for number, rollout in enumerate(self.rollouts) if rollout is None]


def plan_groups(
    problems: list[Problem], num_samples: int, seed_parts: tuple[object, ...]
) -> list[SampleGroup]:
    """A group per problem. Each sample has a seed of its own, from `seed_parts`, the problem's id
    and the sample's number: it does not depend on what else is in the batch or came before. A
    problem that comes twice gets other samples the second time."""
    groups = []
    times: Counter[str] = Counter()
    for index, problem in enumerate(problems):
        again = (times[problem.id],) if times[problem.id] else ()
        times[problem.id] += 1
        seeds = [derive_seed(*seed_parts, *again, problem.id, n) for n in range(num_samples)]
        groups.append(SampleGroup(index, problem, seeds, [None] * num_samples))
    return groups
