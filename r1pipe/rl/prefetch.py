"""Batches in order, the next one sampled while one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from r1pipe.rl.batch import Batch

T = TypeVar("T")


class Prefetcher:
    """Batches in order. With `max_staleness` 1 the next one is sampled while the caller trains.

    Sampling then runs in its own thread. With more than one thread for arithmetic, float sums may
    come out in another order.
    """

    def __init__(self, collect: Callable[[int, int], Batch], num_steps: int, max_staleness: int):
        self._collect, self._num_steps, self._max_staleness = collect, num_steps, max_staleness
        self._thread = ThreadPoolExecutor(1, "sampler")
        self._next: Future[Batch] | None = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of `step`; starts sampling the one after it, with the sampler's present
        weights."""
        batch = self._next.result() if self._next else self._collect(step, step)
        self._next = None
        if self._max_staleness and step < self._num_steps:
            self._next = self._thread.submit(run_at, find_place(), self._collect, step + 1, step)
        return batch

    @property
    def ahead(self) -> Batch | None:
        """The batch that is sampled ahead, once it is finished."""
        self.wait()
        return self._next.result() if self._next and not self._next.exception() else None

    def wait(self) -> None:
        """Return when nothing is being sampled: weights must not change meanwhile."""
        if self._next:
            self._next.exception()

    def state_dict(self) -> dict[str, Any]:
        """The batch that was sampled ahead: its policy no longer exists."""
        return {"ahead": self._next.result().state_dict() if self._next else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait()
        self._next = None
        if state["ahead"]:
            self._next = Future()
            self._next.set_result(Batch.from_state(state["ahead"]))


def find_place() -> tuple[int, Any] | None:
    """This thread's GPU and stream; both are per thread."""
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device(), torch.cuda.current_stream()


def run_at(place: tuple[int, Any] | None, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` on the GPU and stream of `place`. vLLM's graphs and copies belong to the
    stream on which the engine was first used; another would read them half-written."""
    if place is not None:
        device, stream = place
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)
    return function(*arguments)
