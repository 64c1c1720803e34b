"""Samples episodes of several turns in an environment.

When one turn ends, its environment is asked in an event loop beside the engine, and the next turn
joins the requests while others are still being sampled.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import Environment as Settings
from r1pipe.config.base import Sampling
from r1pipe.envs.base import check_environment
from r1pipe.envs.path import Path, join_routes
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.fleet import Fleet
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.scoring import start_event_loop
from r1pipe.rollout.speculation import DraftCounts
from r1pipe.rollout.tool_parser import ToolParser
from r1pipe.types import Problem, Rollout
from r1pipe.utils.errors import UserError
from r1pipe.utils.phases import phase

PATIENCE_S = {"cpu": 1.0}
"""How long the engine waits for environments just asked, by device. On a CPU, whose runs are to
be the same to the last bit, quick ones then join always at the same step; slow ones never hold up
the engine for longer."""


class EpisodeSampler:
    """A Sampler whose samples are episodes.

    Raises UserError if the first problem's environment cannot be made.
    """

    def __init__(self, sampler: Sampler, settings: Settings, problem: Problem):
        self.sampler, self.settings, self.problem = sampler, settings, problem
        if sampler.num_ranks > 1:
            raise UserError(
                "environment: needs engine.tensor_parallel_size 1 where several processes train: "
                "ranks of one engine would hear of an environment's answer at different steps"
            )
        check_environment(settings, problem)
        self.parser = (
            ToolParser(settings.tool_parser, sampler.tokenizer) if settings.tool_parser else None
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.sampler.tokenizer

    @property
    def drafts(self) -> DraftCounts:
        return self.sampler.drafts

    @property
    def num_engines(self) -> int:
        return self.sampler.num_engines

    @property
    def version(self) -> int:
        return self.sampler.version

    @property
    def asleep(self) -> bool:
        return self.sampler.asleep

    @property
    def sleep_level(self) -> int:
        return self.sampler.sleep_level

    @property
    def lora_rank(self) -> int:
        return self.sampler.lora_rank

    def sleep(self) -> None:
        self.sampler.sleep()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.sampler.load_weights(weights)

    def load_adapter(self, folder: str) -> None:
        self.sampler.load_adapter(folder)

    def share(self, items: list[Problem]) -> list[Problem]:
        return self.sampler.share(items)

    def generate_groups(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        *,
        with_routes: bool = False,
        journal: SampleJournal | None = None,
    ) -> Iterator[SampleGroup]:
        """As Sampler's."""
        return self.sampler.generate_groups(
            problems,
            num_samples,
            sampling,
            seed_parts,
            with_routes=with_routes,
            journal=journal,
            sample=self.sample,
        )

    def sample(
        self, groups: list[SampleGroup], sampling: Sampling, with_routes: bool
    ) -> Iterator[tuple[SampleGroup, Rollout]]:
        """Every missing sample as its episode ends, already in its group. A fleet's are played in
        the engines' processes."""
        if isinstance(self.sampler, Fleet):
            play = partial(EpisodeSampler, settings=self.settings, problem=self.problem)
            yield from self.sampler.sample(groups, sampling, with_routes, play)
            return
        paths = [
            Path(self.sampler, self.settings, self.parser, sampling, group, number, with_routes)
            for group in groups
            for number in group.missing
        ]
        turns = Turns(self, paths)
        capture = self.sampler.capture if with_routes else None
        with phase("sampling"), capture.recording() if capture else nullcontext():
            try:
                for place, result in self.sampler.run(turns.requests(), len(paths)):
                    turns.take(place, result)
                    yield from turns.pop_ended()
                yield from turns.pop_ended()
            finally:
                turns.cancel()
        if capture:
            routes = capture.collect(
                {name: length for path in paths for name, length in path.requests}
            )
            for path in paths:
                parts = [routes[name] for name, _ in path.requests]
                path.group.samples[path.number].routes = join_routes(parts)


Source = Sampler | EpisodeSampler


def choose_source(sampler: Sampler, settings: Settings | None, problems: list[Problem]) -> Source:
    """The sampler itself or, with settings of an environment, one of episodes."""
    return EpisodeSampler(sampler, settings, problems[0]) if settings else sampler


class Turns:
    """All paths of a call, each either waiting to begin, asked of its environment, ready for its
    next turn, being sampled, or ended."""

    def __init__(self, owner: EpisodeSampler, paths: list[Path]):
        self.waiting = deque(paths)
        self.asked: list[tuple[Path, Future[Any]]] = []
        self.just_asked: list[Future[Any]] = []
        self.ready: deque[Path] = deque()
        self.running: dict[int, Path] = {}
        self.ended: deque[Path] = deque()
        self.limit = owner.sampler.queue_size
        self.patience_s = PATIENCE_S.get(owner.sampler.device.type, 0.0)

    def requests(self) -> Iterator[tuple[list[int], Any] | None]:
        """For `Sampler.run`: None while nothing is ready and others are being sampled."""
        places = count()
        while True:
            while self.waiting and self.num_open < self.limit:
                path = self.waiting.popleft()
                self.ask(path, path.begin())
            self.hear()
            if self.ready:
                path = self.ready.popleft()
                self.running[next(places)] = path
                yield path.request()
            elif self.running:
                yield None
            elif self.asked:
                wait([answer for _, answer in self.asked], return_when=FIRST_COMPLETED)
            elif not self.waiting:
                return

    @property
    def num_open(self) -> int:
        return len(self.asked) + len(self.ready) + len(self.running)

    def ask(self, path: Path, question: Coroutine[Any, Any, Any]) -> None:
        answer = asyncio.run_coroutine_threadsafe(question, start_event_loop())
        self.asked.append((path, answer))
        self.just_asked.append(answer)

    def take(self, place: int, result: Any) -> None:
        path = self.running.pop(place)
        self.ask(path, path.step(path.take_sampled(place, result)))

    def hear(self) -> None:
        """Take the answers that are there, in the order of the questions."""
        wait(self.just_asked, self.patience_s)
        self.just_asked.clear()
        asked, self.asked = self.asked, []
        for path, answer in asked:
            if not answer.done():
                self.asked.append((path, answer))
                continue
            path.take_answer(answer)
            if path.must_be_told:
                self.ask(path, path.end())
            else:
                (self.ended if path.episode.ended else self.ready).append(path)

    def pop_ended(self) -> Iterator[tuple[SampleGroup, Rollout]]:
        while self.ended:
            path = self.ended.popleft()
            rollout = path.group.samples[path.number] = path.make_rollout()
            yield path.group, rollout

    def cancel(self) -> None:
        for _, answer in self.asked:
            answer.cancel()
