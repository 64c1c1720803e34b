"""Several vLLM engines in processes of their own, behind the interface of one `Sampler`.

The trainer's process plans groups, keeps the journal and hands out requests, the same ones to the
same engine each time: so a run repeats bit by bit. An engine that dies or hangs is replaced by one
with the same weights, which samples what it had left, by the same seeds.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine, SamplerPlace
from r1pipe.models.weights import list_weights
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import Sampled, SampleGroup
from r1pipe.rollout.placement import BEAT_S, Answer, Host, open_placement
from r1pipe.rollout.speculation import DraftCounts
from r1pipe.rollout.vllm_args import (
    check_engine,
    check_files,
    describe_kind,
    read_config,
    require_moe_layers,
)
from r1pipe.types import Problem, Rollout
from r1pipe.utils import timeline
from r1pipe.utils.errors import UserError
from r1pipe.utils.phases import heartbeat, phase
from r1pipe.utils.progress import log_line

MAX_LOSSES = 3
"""How often in a row an engine may be lost without having answered anything."""
ALIGNMENT = 64
"""Bytes: where each tensor begins in a sync's buffer."""


class Place(NamedTuple):
    """Where a weight is in a sync's buffer."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    """Bytes."""


def pack_weights(weights: Iterable[tuple[str, Tensor]]) -> tuple[list[Place], Tensor]:
    """All in one buffer of bytes, uint8 `[N]`."""
    places, tensors, end = [], [], 0
    for name, tensor in weights:
        places.append(Place(name, tensor.dtype, tensor.shape, end))
        tensors.append(tensor.detach())
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer_N = torch.empty(end, dtype=torch.uint8)
    for (_, tensor_N), tensor in zip(unpack_weights(places, buffer_N), tensors, strict=True):
        tensor_N.copy_(tensor)
    return places, buffer_N


def unpack_weights(places: list[Place], buffer_N: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and views of the buffer."""
    for name, dtype, shape, start in places:
        num_bytes = shape.numel() * dtype.itemsize
        yield name, buffer_N[start : start + num_bytes].view(dtype).view(shape)


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


class EngineHost:
    """In an engine's process: its Sampler, and what the fleet asks of it. Each method yields."""

    @property
    def state(self) -> State:
        return State(self.version, self.sampler.max_model_len, os.getpid())

    def open(self, version: int, *arguments: Any) -> Iterator[State]:
        """`arguments`: Sampler's."""
        self.sampler, self.version = Sampler(*arguments), version
        yield self.state

    def load_weights(self, version: int, places: list[Place], buffer: Any) -> Iterator[State]:
        with warnings.catch_warnings():
            # Ray's array is read-only: vLLM copies out of it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            buffer_N = torch.as_tensor(buffer)
        self.sampler.load_weights(unpack_weights(places, buffer_N))
        self.version = version
        yield self.state

    def load_checkpoint(self, version: int, checkpoint: str) -> Iterator[State]:
        self.sampler.load_checkpoint(checkpoint)
        self.version = version
        yield self.state

    def prepare_routes(self) -> Iterator[State]:
        self.sampler.prepare_routes()
        yield self.state

    def sample(
        self, version: int, groups: list[SampleGroup], sampling: Sampling, with_routes: bool
    ) -> Iterator[Part]:
        """What is missing in the groups, by the weights of this version."""
        if version != self.version:
            raise RuntimeError(f"has the weights of sync {self.version}, not of {version}")
        drafts = self.sampler.drafts
        drafts.clear()
        sampled = self.sampler.sample(groups, sampling, with_routes)
        if with_routes and self.sampler.capture:
            sampled = iter(list(sampled))  # routes come with the last one
        ready, sent = [], time.monotonic()
        for group, rollout in sampled:
            ready.append((group.index, rollout))
            if not group.missing or time.monotonic() - sent > BEAT_S:
                yield Part(ready, (drafts.proposed, drafts.accepted))
                drafts.clear()
                ready, sent = [], time.monotonic()
        yield Part(ready, (drafts.proposed, drafts.accepted))


class Call(NamedTuple):
    method: str
    arguments: Callable[[], tuple[Any, ...]]
    """Made when the call begins."""


class Member:
    """One of the fleet's engines: the process that runs it now, and what it has to do."""

    def __init__(self, number: int, host: Host):
        self.number, self.host = number, host
        self.calls: list[Call] = []
        """The first one is being done."""
        self.is_stopped = False
        """Nobody waits for what the first one still yields."""
        self.num_losses = 0
        """Since it last sampled something or did all that was asked."""
        self.process = 0
        """Its id on its machine."""
        self.worked_at = time.monotonic()
        self.span: int | None = None
        """Of the step's timeline: what it is doing."""

    def add(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        self.calls.append(Call(method, arguments))
        if len(self.calls) == 1:
            self.begin()

    def begin(self) -> None:
        self.end_span()
        if self.calls:
            what = "sampling" if self.calls[0].method == "sample" else "sync"
            self.span = timeline.begin(f"engine_{self.number}", what)
            self.worked_at = time.monotonic()
            self.host.begin(self.calls[0].method, self.calls[0].arguments())

    def end_span(self) -> None:
        if self.span is not None:
            timeline.end(self.span)
            self.span = None


class Fleet(Sampler):
    """A Sampler whose engines are elsewhere: `place.engines` of them, each with all weights.

    `hang_s`: seconds without a step after which an engine is replaced; None: never. Raises
    UserError if there is no room for them or one cannot be started.
    """

    def __init__(
        self,
        checkpoint: str,
        settings: Engine,
        dtype: str,
        device: torch.device,
        with_routes: bool = False,
        chat_template: str | None = None,
        *,
        place: SamplerPlace,
        hang_s: float | None = None,
    ):
        self.settings, self.dtype, self.device, self.place = settings, dtype, device, place
        self.chat_template, self.hang_s = chat_template, hang_s
        self.num_engines = place.engines
        self.lora_rank = self.sleep_level = 0
        self.can_sleep = self.asleep = False
        self.can_return_routes, self.capture = True, None
        self.moe_layers: list[int] = []
        self.drafts, self.trial = DraftCounts(), None
        self.with_routes, self.num_replaced = with_routes, 0
        check_files(checkpoint)
        self.open_tokenizer(checkpoint)
        self.config = config = read_config(checkpoint)
        self.kind = describe_kind(config, self.end_ids)
        check_engine(checkpoint, config, settings, device.type, num_processes=1)
        if with_routes:
            self.moe_layers = require_moe_layers(config)
        self.checkpoint, self.version = checkpoint, 0
        self._weights: tuple[list[Place], Any] | None = None
        """Of the last sync, if there was one since the checkpoint was loaded."""
        num_bytes = sum(file.stat().st_size for file in list_weights(Path(checkpoint)))
        self._placement = open_placement(place, device.type, num_bytes)
        self.members: list[Member] = []
        try:
            self.members = [Member(n, self._placement.start(n)) for n in range(place.engines)]
            states = self._ask_all("open", self._opening)
        except BaseException:
            self.close()
            raise
        self.max_model_len = states[0].max_model_len

    def _opening(self) -> tuple[Any, ...]:
        folder = Path(self.checkpoint)
        # Another process may have another working folder.
        name = str(folder.absolute()) if folder.is_dir() else self.checkpoint
        settings = (self.settings, self.dtype, self.device, self.with_routes, self.chat_template)
        return self.version, name, *settings

    def _last_weights(self) -> tuple[Any, ...]:
        return self.version, *self._weights

    def prepare_routes(self) -> None:
        self.moe_layers, self.with_routes = require_moe_layers(self.config), True
        self._ask_all("prepare_routes", tuple)

    @phase("sync")
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Into every engine, which confirms the version."""
        places, buffer_N = pack_weights(weights)
        self._weights = places, self._placement.share(buffer_N)
        self._sync("load_weights", self._last_weights)

    def load_checkpoint(self, checkpoint: str) -> None:
        self.open_tokenizer(checkpoint)
        self.checkpoint, self._weights = checkpoint, None
        self._sync("load_checkpoint", lambda: self._opening()[:2])

    def _sync(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        self.version += 1
        versions = [state.version for state in self._ask_all(method, arguments)]
        if versions != [self.version] * self.num_engines:
            raise RuntimeError(f"engines have the weights of {versions}, not of {self.version}")

    def load_adapter(self, folder: str) -> None:
        raise NotImplementedError("a fleet takes merged weights")

    def sleep(self) -> None:
        """Nothing to free: the trainer's memory is its own."""

    def sample(self, groups: list[SampleGroup], sampling: Sampling, with_routes: bool) -> Sampled:
        """As Sampler's. Group number i goes to engine i modulo their number, not to the one that is
        free first: log-probs follow in their last bits what is sampled beside them."""
        groups = [group for group in groups if group.missing]
        by_index = {group.index: group for group in groups}

        def describe(part: list[SampleGroup]) -> tuple[Any, ...]:
            missing = [describe_missing(group) for group in part if group.missing]
            return self.version, missing, sampling, with_routes

        for member in self.members:
            if part := groups[member.number :: self.num_engines]:
                member.add("sample", partial(describe, part))
        with phase("waiting for engines"):
            for _, answer in self._work():
                if not isinstance(answer, Part):  # that of an engine started meanwhile
                    continue
                self.drafts.proposed += answer.drafts[0]
                self.drafts.accepted += answer.drafts[1]
                for index, rollout in answer.rollouts:
                    group = by_index[index]
                    rollout.prompt_ids = group.prompt_ids
                    group.samples[rollout.sample] = rollout
                    yield group, rollout

    def _ask_all(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> list[State]:
        """The state of each engine behind it."""
        for member in self.members:
            member.add(method, arguments)
        states = {member.number: state for member, state in self._work()}
        return [states[member.number] for member in self.members]

    def _work(self) -> Iterator[tuple[Member, Any]]:
        """What the engines yield, until each has done all that it was asked for."""
        try:
            while busy := {member.host: member for member in self.members if member.calls}:
                silent = set(busy)
                for host, answer in self._placement.wait(busy, BEAT_S):
                    silent.discard(host)
                    item = self._take(busy[host], answer)
                    if item is not None:
                        yield busy[host], item
                for host in silent:
                    silent_s = time.monotonic() - busy[host].worked_at
                    if self.hang_s is not None and silent_s > self.hang_s:
                        self._replace(busy[host], f"no step for {silent_s:.0f} s")
        finally:
            for member in self.members:  # the next call must not get their results
                member.is_stopped = bool(member.calls)
                del member.calls[1:]

    def _take(self, member: Member, answer: Answer) -> Any:
        """The item, if it is one that somebody waits for."""
        now = time.monotonic()
        if answer.kind == "lost":
            self._replace(member, answer.value)
            return None
        if answer.kind == "beat":
            # A process that is hung says for ever longer that it has done nothing.
            worked_at = now - answer.value
            if worked_at > member.worked_at + BEAT_S / 2:
                heartbeat()
                member.worked_at = worked_at
            return None
        heartbeat()
        member.worked_at = now
        if answer.kind == "item":
            if isinstance(answer.value, State):
                member.process = answer.value.process
            elif answer.value.rollouts:
                member.num_losses = 0
            return None if member.is_stopped else answer.value
        was_stopped, member.is_stopped = member.is_stopped, False
        del member.calls[0]
        member.begin()
        if not member.calls:
            member.num_losses = 0
        if answer.kind == "error" and not was_stopped:
            raise answer.value
        return None

    def _replace(self, member: Member, how: str) -> None:
        """By a new process, which begins with the weights of the last sync and goes on with the
        groups that are not finished."""
        doing = member.calls[0].method
        lost = f"sampler: engine {member.number} was lost in {doing} ({how})"
        member.num_losses += 1
        if member.num_losses > MAX_LOSSES:
            raise UserError(f"{lost}, {member.num_losses} times in a row: is there memory for it?")
        log_line(f"{lost}: starting another")
        self.num_replaced += 1
        member.host.kill()
        member.host = self._placement.start(member.number)
        wanted = member.calls[1:] if member.is_stopped else member.calls
        member.calls = [
            Call("open", self._opening),
            *([Call("load_weights", self._last_weights)] if self._weights else []),
            *(call for call in wanted if call.method == "sample"),
        ]
        member.is_stopped = False
        member.begin()

    def close(self) -> None:
        """Also after an error: an engine has nothing to save."""
        for member in self.members:
            member.host.kill()
            member.end_span()
        self.members = []
        self._placement.close()


def describe_missing(group: SampleGroup) -> SampleGroup:
    """What an engine needs of a group: not the problem's tests, nor the samples that are there."""
    problem = Problem(group.problem.id, group.problem.kind, [])
    there = dict.fromkeys(group.samples)
    return SampleGroup(group.index, problem, group.seeds, group.prompt_ids, there)
