"""Batches in order, the next one sampled while one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from r1pipe.rl.batch import Batch

T = TypeVar("T")


class Prefetcher:
    """Batches in order. With `async_steps` 1 the next one is sampled while the caller trains.

    Sampling then runs in a thread of its own, and float sums may come out in another order where
    arithmetic has more than one thread.
    """

    def __init__(self, collect: Callable[[int, int], Batch], num_steps: int, async_steps: int):
        self._collect, self._num_steps, self._async_steps = collect, num_steps, async_steps
        self._thread = ThreadPoolExecutor(1, "sampler")
        self._next: Future[Batch] | None = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of `step`; begins with the one after it, on the sampler's present weights."""
        batch = self._next.result() if self._next else self._collect(step, step)
        self._next = None
        if self._async_steps and step < self._num_steps:
            self._next = self._thread.submit(run_at, find_place(), self._collect, step + 1, step)
        return batch

    @property
    def ahead(self) -> Batch | None:
        """What was sampled ahead, once it is there."""
        self.wait()
        return self._next.result() if self._next and not self._next.exception() else None

    def wait(self) -> None:
        """Until nothing is being sampled: weights must not change meanwhile."""
        if self._next:
            self._next.exception()

    def state_dict(self) -> dict[str, Any]:
        """The batch that was sampled ahead: the policy that sampled it is gone by now."""
        return {"ahead": self._next.result().state_dict() if self._next else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait()
        self._next = None
        if state["ahead"]:
            self._next = Future()
            self._next.set_result(Batch.from_state(state["ahead"]))


def find_place() -> tuple[int, Any] | None:
    """The GPU and the stream that this thread works on: both are a thread's own."""
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device(), torch.cuda.current_stream()


def run_at(place: tuple[int, Any] | None, function: Callable[..., T], *arguments: Any) -> T:
    """Call it from another thread as from the one of that place. vLLM's graphs and copies belong to
    the stream that the engine was first used on; on another they would be read half-written."""
    if place is not None:
        device, stream = place
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)
    return function(*arguments)
