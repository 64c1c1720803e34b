"""A discrete-event simulation of sampling and training beside each other. Imports no torch.

An engine's step costs `step_s`, and `sequence_s` for each sequence that runs, up to `max_num_seqs`;
reading tokens, of prompts or again after a sync, holds up all of them. Between two events the
number of running sequences does not change, so no step is looked at by itself.

As in `r1pipe.rl.prefetch` and `r1pipe.rollout.fleet`: group i goes to engine i modulo their number,
and a step trains on its own batch, in order. When it takes that, as many batches as the bound says
may have begun beyond it: so no token is older, and none is dropped. Then the weights travel. In
flight that interrupts the engines, and sequences go on, read again by the new weights; otherwise
everything that has begun is finished first.

Left out: scoring, which sampling hides; failures; prompts that dynamic sampling drops.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean

Lengths = list[int]
"""Completion tokens of a group's samples."""


@dataclass(frozen=True)
class Rates:
    """Seconds."""

    step_s: float
    sequence_s: float
    read_s: float
    """For a token of a prompt, or of a sequence that is read again."""
    token_s: float
    """Of the trainer, for each token of a completion or prompt: all its devices together."""
    update_s: float
    """Of the trainer, for each step, whatever is trained."""
    sync_s: float
    max_num_seqs: int = 256
    prompt_tokens: int = 0
    cores: int | None = None
    """Shared by engines, a core each, and trainer: None: each has devices of its own."""
    trainer_threads: int = 1


@dataclass(frozen=True)
class Plan:
    engines: int
    groups: int
    """Of a step."""
    staleness: int = 0
    in_flight: bool = False


@dataclass(frozen=True)
class Outcome:
    """Means over the steps after the first ones, in which the queue fills."""

    step_s: float
    trainer_idle: float
    engine_idle: float
    """Shares of the time: the engines' mean."""
    staleness: float
    max_staleness: int
    """Steps that a group's first token is behind the policy that trains on it."""


@dataclass
class Group:
    missing: int
    """Samples that have not ended."""
    tokens: int
    version: int | None = None
    """Of the weights by which its first sample began; None before."""


class Engine:
    """Up to `at`, it has made `step` steps; a fraction of one is progress."""

    def __init__(self, rates: Rates):
        self.rates = rates
        self.running: list[tuple[float, int, int, Group]] = []
        """A heap: the step in which each ends, the order in which they began, and their length."""
        self.order = count()
        self.waiting: deque[tuple[Group, int]] = deque()
        self.at = self.step = self.owed_s = self.busy_s = 0.0
        self.paused = False

    @property
    def is_busy(self) -> bool:
        return bool(self.running) and not self.paused

    @property
    def pace(self) -> float:
        return self.rates.step_s + self.rates.sequence_s * len(self.running)

    def advance(self, now: float, speed: float) -> None:
        elapsed, self.at = now - self.at, now
        if self.is_busy:
            self.busy_s += elapsed
            read_s = min(self.owed_s, elapsed * speed)
            self.owed_s -= read_s
            self.step += (elapsed * speed - read_s) / self.pace

    def find_next(self, speed: float) -> float:
        """When the next sequence ends."""
        if not self.is_busy:
            return math.inf
        left = max(0.0, self.running[0][0] - self.step)
        return self.at + (self.owed_s + left * self.pace) / speed

    def begin(self, version: int) -> None:
        """As many sequences as there is room for."""
        while self.waiting and len(self.running) < self.rates.max_num_seqs:
            group, length = self.waiting.popleft()
            group.version = version if group.version is None else group.version
            self.owed_s += self.rates.read_s * self.rates.prompt_tokens
            heapq.heappush(self.running, (self.step + length, next(self.order), length, group))

    def read_again(self) -> None:
        """What runs, by new weights."""
        sampled = sum(length - (end - self.step) for end, _, length, _ in self.running)
        tokens = sampled + self.rates.prompt_tokens * len(self.running)
        self.owed_s += self.rates.read_s * tokens

    def end(self) -> Iterator[Group]:
        """The groups of the sequences that have ended, one for each."""
        while self.running and self.running[0][0] <= self.step + 1e-6:
            yield heapq.heappop(self.running)[-1]


@dataclass
class Counts:
    """At the end of a step."""

    at: float
    trainer_busy_s: float
    engine_busy_s: float
    staleness: list[int] = field(default_factory=list)
    """Of the groups that it trained on."""


class Simulation:
    def __init__(self, rates: Rates, plan: Plan, lengths: Iterable[Lengths]):
        self.rates, self.plan, self.lengths = rates, plan, iter(lengths)
        self.engines = [Engine(rates) for _ in range(plan.engines)]
        self.next_ends = [math.inf] * plan.engines
        self.now, self.speed, self.version = 0.0, 1.0, 0
        self.doing = "waits"
        """The trainer: waits, trains, drains, syncs."""
        self.left_s = self.trainer_busy_s = 0.0
        """Of what the trainer does; of what it has trained."""
        self.batches: list[list[Group]] = []
        """Of all steps so far; the last one may lack groups that have not begun."""
        self.taken = self.unfinished = 0
        """Batches that the trainer has taken; groups that have begun."""
        self.steps = [Counts(0.0, 0.0, 0.0)]

    def run(self, num_steps: int) -> "Simulation":
        while len(self.steps) <= num_steps:
            self._begin()
            speed = self.speed if self.doing == "trains" else 1.0
            works = self.doing in ("trains", "syncs")
            first = min(self.next_ends)
            end = self.now + self.left_s / speed if works else math.inf
            assert min(first, end) < math.inf, "nothing more can happen"
            elapsed, self.now = min(first, end) - self.now, min(first, end)
            if works:
                self.left_s -= elapsed * speed
                self.trainer_busy_s += elapsed * (self.doing == "trains")
            if end <= self.now:
                self._end_work()
            else:
                self._end_sequences(self.next_ends.index(first))
        return self

    def _begin(self) -> None:
        """Whatever can begin now."""
        if self.doing == "waits" and self._is_ready():
            batch = self.batches[self.taken]
            tokens = sum(group.tokens for group in batch)
            self.left_s = self.rates.update_s + tokens * self.rates.token_s
            self.doing, self.taken = "trains", self.taken + 1
        ahead = self.plan.staleness
        if self.doing == "waits":
            ahead = max(1, ahead)
        while len(self.batches) < self.taken + ahead:
            self._submit()
        if self.doing == "drains" and not self.unfinished:
            self._sync()
        if self.rates.cores:  # more threads than cores: all are as much slower
            threads = sum(engine.is_busy for engine in self.engines)
            threads += self.rates.trainer_threads * (self.doing == "trains")
            speed = min(1.0, self.rates.cores / max(1, threads))
            if speed != self.speed:
                self._look_at_all(speed=speed)

    def _is_ready(self) -> bool:
        batch = self.batches[self.taken] if self.taken < len(self.batches) else []
        return bool(batch) and not any(group.missing for group in batch)

    def _submit(self) -> None:
        """A batch."""
        batch = []
        for number in range(self.plan.groups):
            lengths = next(self.lengths)
            tokens = sum(lengths) + self.rates.prompt_tokens * len(lengths)
            group = Group(len(lengths), tokens)
            engine = self.engines[number % self.plan.engines]
            engine.waiting.extend((group, length) for length in lengths)
            batch.append(group)
        self.batches.append(batch)
        self.unfinished += len(batch)
        for number in range(self.plan.engines):
            self._look_at(number)

    def _look_at(self, number: int) -> None:
        engine = self.engines[number]
        engine.advance(self.now, self.speed)
        if not engine.paused:
            engine.begin(self.version)
        self.next_ends[number] = engine.find_next(self.speed)

    def _look_at_all(self, paused: bool | None = None, speed: float | None = None) -> None:
        for engine in self.engines:
            engine.advance(self.now, self.speed)
            engine.paused = engine.paused if paused is None else paused
        self.speed = speed or self.speed
        for number in range(len(self.engines)):
            self._look_at(number)

    def _end_sequences(self, number: int) -> None:
        self.engines[number].advance(self.now, self.speed)
        for group in self.engines[number].end():
            group.missing -= 1
            self.unfinished -= not group.missing
        self._look_at(number)

    def _end_work(self) -> None:
        if self.doing == "trains":
            self.doing = "drains"
            if self.plan.in_flight:
                self._sync()
            return
        staleness = [self.version - group.version for group in self.batches[self.taken - 1]]
        self.version += 1
        self.doing = "waits"
        for engine in self.engines:
            engine.read_again()
        self._look_at_all(paused=False)
        busy_s = fmean(engine.busy_s for engine in self.engines)
        self.steps.append(Counts(self.now, self.trainer_busy_s, busy_s, staleness))

    def _sync(self) -> None:
        self.doing, self.left_s = "syncs", self.rates.sync_s
        self._look_at_all(paused=True)

    def describe(self, first: int) -> Outcome:
        """Of the steps from number `first` on, counted from 0."""
        begin, end = self.steps[first], self.steps[-1]
        elapsed = end.at - begin.at
        staleness = [value for step in self.steps[first + 1 :] for value in step.staleness]
        return Outcome(
            elapsed / (len(self.steps) - 1 - first),
            1 - (end.trainer_busy_s - begin.trainer_busy_s) / elapsed,
            1 - (end.engine_busy_s - begin.engine_busy_s) / elapsed,
            fmean(staleness),
            max(staleness),
        )


def simulate(rates: Rates, plan: Plan, lengths: Iterable[Lengths], num_steps: int = 4) -> Outcome:
    """Of `num_steps`, after those in which the queue fills."""
    first = 0 if plan.staleness == 0 else plan.staleness + 2
    return Simulation(rates, plan, lengths).run(first + num_steps).describe(first)


# --- Lengths --------------------------------------------------------------------------------------


def draw_lognormal(
    mean: float, sigma: float, longest: int, group_size: int, seed: int = 0
) -> Iterator[Lengths]:
    """`mean` and `sigma` (of the logarithm) before completions are cut at `longest`."""
    rng = random.Random(seed)
    mu = math.log(mean) - sigma * sigma / 2
    while True:
        drawn = (math.ceil(rng.lognormvariate(mu, sigma)) for _ in range(group_size))
        yield [min(longest, length) for length in drawn]


def draw_again(groups: list[Lengths], scale: float = 1.0, seed: int = 0) -> Iterator[Lengths]:
    """Whole groups of those that were sampled, at random."""
    rng = random.Random(seed)
    while True:
        yield [max(1, round(scale * length)) for length in rng.choice(groups)]
