"""The samples of one problem on their way through a sampler."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

from r1pipe.config.base import Sampling
from r1pipe.types import Problem, Rollout
from r1pipe.utils.seeds import derive_seed


@dataclass(eq=False)
class SampleGroup:
    """All samples of one problem, finished or not."""

    index: int
    """Of the problem among those asked for."""
    problem: Problem
    seeds: list[int]
    prompt_ids: list[int] = field(default_factory=list)
    samples: dict[int, Rollout] = field(default_factory=dict)
    """Finished ones, by number."""

    @property
    def missing(self) -> list[int]:
        return [number for number in range(len(self.seeds)) if number not in self.samples]

    @property
    def rollouts(self) -> list[Rollout]:
        """All samples of a finished group, in order."""
        return [self.samples[number] for number in range(len(self.seeds))]


Sampled = Iterator[tuple[SampleGroup, Rollout]]
SampleFunction = Callable[[list[SampleGroup], Sampling, bool], Sampled]
"""Samples what is missing in these groups, with routes or without: each sample as it is finished,
already in its group."""


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
        groups.append(SampleGroup(index, problem, seeds))
    return groups


def cover_engines(problems: list[Problem], num_engines: int) -> list[Problem]:
    """The problems, repeated until each of a sampler's engines has one: number i is asked of engine
    i modulo their number."""
    return list(islice(cycle(problems), max(len(problems), num_engines)))
