"""An engine of a fleet in its own process: a Sampler, asked from the trainer's process by calls."""

import os
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from r1pipe.config.base import Sampling
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.placement import BEAT_S, Answer
from r1pipe.rollout.weight_sync import Place, unpack_weights
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.phases import heartbeat, phase

MakeSource = Callable[[Sampler], Any]
"""Of what samples in the place of a Sampler, such as envs.driver.EpisodeSampler."""


class Part(NamedTuple):
    """What an engine has sampled since its last one."""

    rollouts: list[tuple[int, Rollout]]
    """Each with its group's index."""
    drafts: tuple[int, int]
    """Proposed and accepted."""


class State(NamedTuple):
    """What an engine confirms."""

    version: int
    """Number of the sync whose weights it has."""
    max_model_len: int
    process: int


class Request(NamedTuple):
    """A sample that an engine has been asked for."""

    task: "Task"
    group: SampleGroup
    number: int


@dataclass
class Task:
    """A call to sample, in the engine's process."""

    call: int
    sampling: Sampling
    num_missing: int
    ready: list[tuple[int, Rollout]] = field(default_factory=list)
    sent_at: float = field(default_factory=time.monotonic)


class EngineHost:
    """In an engine's process: its Sampler, and what the fleet asks of it, by calls in `inbox`.

    They are done one after another; but while samples are drawn, other calls to sample join, and
    weights are loaded, between two steps of the engine. `send`: for answers.
    """

    def __init__(self, number: int, send: Callable[[Answer], None]):
        self.number = number
        self.inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        """Number, method and arguments of each call."""
        self.send, self.version = send, 0
        self.is_busy = False
        self._held: tuple[Any, ...] | None = None
        """A call that waits for the end of the sampling, with all behind it."""
        self._tasks: dict[int, Task] = {}
        self._coming: deque[Request] = deque()
        self._is_sampling = False
        self._earlier: dict[int, list[tuple[int, int]]] = {}
        """Of a sequence that has seen a sync, by its request's index: how many of its tokens were
        there by then, and the version that had sampled the last of them."""

    def work(self) -> None:
        while True:
            self.is_busy = self._held is not None
            call = self._held or self.inbox.get()
            self._held, self.is_busy = None, True
            self._do(*call)

    def _do(self, call: int, method: str, *arguments: Any) -> None:
        """Answers the call: items of samples; then the end, else with the State, or what it
        raised."""
        heartbeat()
        try:
            if method == "sample":
                self._sample(call, *arguments)
            else:
                getattr(self, method)(*arguments)
                state = State(self.version, self.sampler.max_model_len, os.getpid())
                self.send(Answer("end", state, call))
        except Exception as error:
            told = error
            if not isinstance(error, UserError):
                what = first_line(error, with_type=True)
                told = RuntimeError(f"{what}\n{traceback.format_exc()}")
            failed = {call, *([] if self._is_sampling else self._tasks)}
            for number in failed:
                self.send(Answer("error", told, number))
            if not self._is_sampling:
                self._tasks.clear()
                self._coming.clear()

    def open(self, version: int, *arguments: Any) -> None:
        """`arguments`: Sampler's."""
        self.sampler, self.version = Sampler(*arguments), version

    def load_weights(self, version: int, places: list[Place], buffer: Any) -> None:
        self._note_sampled()
        with warnings.catch_warnings():
            # Ray's array is read-only: vLLM copies out of it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            buffer_N = torch.as_tensor(buffer)
        self.sampler.load_weights(unpack_weights(places, buffer_N))
        self.version = version

    def receive_weights(
        self, version: int, group: dict[str, Any] | None, places: list[Place]
    ) -> None:
        """From the trainer's broadcast; see weight_sync."""
        self._note_sampled()
        if group:
            place = self.number % (group["world_size"] - 1)  # in its process of the trainer
            group = group | {"rank_offset": 1 + place}
        update = {
            "names": [place.name for place in places],
            "dtype_names": [str(place.dtype).removeprefix("torch.") for place in places],
            "shapes": [list(place.shape) for place in places],
        }
        self.sampler.receive_weights(group, update)
        self.version = version

    def _note_sampled(self) -> None:
        for place, num_tokens in self.sampler.count_sampled().items():
            self._earlier.setdefault(place, []).append((num_tokens, self.version))

    def load_checkpoint(self, version: int, checkpoint: str) -> None:
        self.sampler.load_checkpoint(checkpoint)
        self.version = version

    def prepare_routes(self) -> None:
        self.sampler.prepare_routes()

    def _sample(
        self,
        call: int,
        version: int,
        groups: list[SampleGroup],
        sampling: Sampling,
        with_routes: bool,
        make_source: MakeSource | None,
    ) -> None:
        """What is missing in the groups, at first by the weights of this version."""
        if version != self.version:
            raise RuntimeError(f"has the weights of sync {self.version}, not of {version}")
        self.sampler.drafts.clear()
        task = Task(call, sampling, sum(len(group.missing) for group in groups))
        if with_routes or make_source:
            source = make_source(self.sampler) if make_source else self.sampler
            for group, rollout in source.sample(groups, sampling, with_routes):
                task.ready.append((group.index, rollout))
                if not (with_routes or group.missing):  # routes come with the last one
                    self._send(task)
            self._send(task)
            task.num_missing = 0
        if not task.num_missing:
            self.send(Answer("end", call=call))
            return
        self._tasks[call] = task
        self._coming += [
            Request(task, group, number) for group in groups for number in group.missing
        ]
        if not self._is_sampling:
            self._sample_all()

    def _sample_all(self) -> None:
        """Until nothing is left of the calls that are there or join."""
        asked: list[Request] = []

        def requests() -> Iterator[tuple[list[int], Any] | None]:
            while True:
                if not self._coming:
                    yield None
                    continue
                request = self._coming.popleft()
                asked.append(request)
                seed = request.group.seeds[request.number]
                parameters = self.sampler.parameters(request.task.sampling, seed, with_routes=False)
                yield request.group.prompt_ids, parameters

        self._is_sampling, self.sampler.between_steps = True, self._let_in
        try:
            with phase("sampling"):
                for place, result in self.sampler.run(requests(), len(self._coming)):
                    self._take(place, result, *asked[place])
        finally:
            self._is_sampling, self.sampler.between_steps = False, None
            self._earlier.clear()

    def _let_in(self) -> None:
        while self._held is None and not self.inbox.empty():
            call = self.inbox.get()
            _, method, *arguments = call
            loads = method in ("load_weights", "receive_weights")
            if loads or (method == "sample" and not any(arguments[-2:])):
                self._do(*call)
            else:
                self._held = call

    def _take(self, place: int, result: Any, task: Task, group: SampleGroup, number: int) -> None:
        rollout = group.samples[number] = self.sampler.read(result, group, number)
        rollout.versions = []
        end = (len(rollout.completion_ids), self.version)
        for num_tokens, version in (*self._earlier.pop(place, ()), end):
            rollout.versions += [version] * (num_tokens - len(rollout.versions))
        task.ready.append((group.index, rollout))
        task.num_missing -= 1
        if not group.missing or time.monotonic() - task.sent_at > BEAT_S:
            self._send(task)
        if not task.num_missing:
            del self._tasks[task.call]
            self.send(Answer("end", call=task.call))

    def _send(self, task: Task) -> None:
        drafts = self.sampler.drafts
        self.send(Answer("item", Part(task.ready, (drafts.proposed, drafts.accepted)), task.call))
        drafts.clear()
        task.ready, task.sent_at = [], time.monotonic()
