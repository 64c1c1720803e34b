"""Batches in order, the next ones sampled while one trains."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from r1pipe.config.rl import OnPolicy
from r1pipe.rl.batch import Batch
from r1pipe.types import Problem
from r1pipe.utils import distributed

T = TypeVar("T")


class Collects(Protocol):
    """Samples a batch: rl.collect.Collector."""

    def draw(self, policy_step: int) -> list[Problem]: ...

    def collect(self, step: int, policy_step: int, problems: list[Problem]) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Ahead(NamedTuple):
    """A batch that is being sampled, or waits to be trained on."""

    batch: Future[Batch]
    before: dict[str, Any]
    """The collector's state before its prompts were drawn."""

    @property
    def is_finished(self) -> bool:
        return self.batch.done() and not self.batch.exception()


class Prefetcher:
    """Batches in order, up to `max_staleness` of them sampled ahead while the caller trains.

    A batch is begun by a policy at most so many steps before the one that trains on it: no token
    can be older, so none is dropped, and the sampler never runs further ahead. A step takes its own
    batch, not the one that is finished first, which would be that of short samples.

    Each batch ahead has a thread: `in_flight`, while the last long samples of one are drawn, those
    of the next begin. Ranks may finish them in different orders: each has a lane of its own. With
    more than one thread for arithmetic, float sums may come out in another order.
    """

    def __init__(self, collector: Collects, stage: OnPolicy):
        self._collector, self._stage = collector, stage
        self._threads = ThreadPoolExecutor(max(1, stage.max_staleness), "sampler")
        self._ahead: deque[Ahead] = deque()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of `step`; starts sampling those that may follow, with the sampler's present
        weights."""
        if self._ahead:
            batch = self._ahead.popleft().batch.result()
        else:
            batch = self._collector.collect(step, step, self._collector.draw(step))
        if self._stage.in_flight:
            batch.num_waiting = sum(ahead.is_finished for ahead in self._ahead)
        last = min(step + self._stage.max_staleness, self._stage.max_steps)
        for later in range(step + 1 + len(self._ahead), last + 1):
            before = self._collector.state_dict()
            prompts = self._collector.draw(step)
            collect = partial(self._collector.collect, later, step, prompts)
            lane = 1 + later % self._stage.max_staleness
            batch_ahead = self._threads.submit(run_at, find_place(), lane, collect)
            self._ahead.append(Ahead(batch_ahead, before))
        return batch

    @property
    def ahead(self) -> Batch | None:
        """The batch that is sampled ahead, once it is finished; not `in_flight`."""
        self.wait()
        if self._stage.in_flight or not self._ahead or not self._ahead[0].is_finished:
            return None
        return self._ahead[0].batch.result()

    def wait(self) -> None:
        """Return when weights may change: at once `in_flight`, else when nothing is sampled."""
        if not self._stage.in_flight:
            for ahead in self._ahead:
                ahead.batch.exception()

    def state_dict(self) -> dict[str, Any]:
        """The batches that every rank has finished, whose policies no longer exist. The first that
        is not, and those behind it, are sampled again by the policy that resumes: the same prompts
        and seeds."""
        finished = list(takewhile(lambda ahead: ahead.is_finished, self._ahead))
        finished = finished[: min(distributed.gather(len(finished)))]
        rest = list(self._ahead)[len(finished) :]
        return {
            "ahead": [ahead.batch.result().state_dict() for ahead in finished],
            "collector": rest[0].before if rest else self._collector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait()
        self._collector.load_state_dict(state["collector"])
        self._ahead.clear()
        for values in state["ahead"]:
            batch: Future[Batch] = Future()
            batch.set_result(Batch.from_state(values))
            self._ahead.append(Ahead(batch, {}))


def find_place() -> tuple[int, Any] | None:
    """This thread's GPU and stream; both are per thread."""
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device(), torch.cuda.current_stream()


def run_at(place: tuple[int, Any] | None, lane: int, function: Callable[[], T]) -> T:
    """Call `function` in this lane, on the GPU and stream of `place`. vLLM's graphs and copies
    belong to the stream on which the engine was first used; another would read them half-written.
    """
    if place is not None:
        device, stream = place
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)
    with distributed.lane(lane):
        return function()
