"""Several vLLM engines in processes of their own, behind the interface of one `Sampler`.

The trainer's process plans groups, keeps the journal and hands out requests, the same ones to the
same engine each time: so a run repeats bit by bit. Of several processes each does so for its share
of the problems, with as many engines as the others. An engine that dies or hangs is replaced by one
with the same weights, which samples what it had left, by the same seeds.

Several threads may sample, and load weights, at the same time. Weights that come while an engine
samples are loaded between two of its steps ("in flight", PipelineRL, arXiv:2509.19128); sequences
go on, read again by the new weights, as in AReaL (arXiv:2505.24298), where PipelineRL keeps the old
keys and values.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine, SamplerPlace
from r1pipe.models.weights import list_weights
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.engine_host import MakeSource, State
from r1pipe.rollout.groups import Sampled, SampleGroup
from r1pipe.rollout.placement import BEAT_S, Answer, Host, open_placement
from r1pipe.rollout.speculation import DraftCounts
from r1pipe.rollout.vllm_args import (
    check_engine,
    check_files,
    describe_kind,
    read_config,
    require_moe_layers,
    set_environment,
)
from r1pipe.rollout.weight_sync import Place, copy_weights, make_buffer, pack_weights
from r1pipe.rollout.weight_transfer import Broadcast, choose_backend
from r1pipe.types import Problem
from r1pipe.utils import distributed, timeline
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.phases import heartbeat, phase
from r1pipe.utils.progress import log_line

MAX_LOSSES = 3
"""How often in a row an engine may be lost without having answered anything."""
POLL_S = 0.05
"""How often a thread looks for what others have heard for it."""


class Job:
    """What a thread of the trainer waits for: calls of engines."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        """Calls that are not done."""
        self.items: deque[Any] = deque()
        """Parts and States that they have yielded, until somebody takes them."""
        self.heard: set[tuple[int, int]] = set()
        """Samples in the parts: group's index and number."""
        self.error: Exception | None = None
        self.is_wanted = True
        """Whether somebody still waits."""


class Call(NamedTuple):
    job: Job
    method: str
    arguments: Callable[[], tuple[Any, ...]]
    """Made when the call begins, which it may do again in another process."""


class Member:
    """One of the fleet's engines: the process that runs it now, and what it has to do."""

    def __init__(self, number: int, host: Host):
        self.number, self.host = number, host
        self.calls: dict[int, Call] = {}
        """Those that are not done, by number, in order."""
        self.num_losses = 0
        """Since it last sampled something or did all that was asked."""
        self.process = 0
        """Its id on its machine."""
        self.worked_at = time.monotonic()
        self.spans: dict[int, int] = {}
        """Of the step's timeline, by the number of the call that is done in it."""

    @property
    def is_opening(self) -> bool:
        """Then the other calls wait."""
        return bool(self.calls) and next(iter(self.calls.values())).method == "open"

    @property
    def is_receiving(self) -> bool:
        """Then it waits for all others of the fleet."""
        return any(call.method == "receive_weights" for call in self.calls.values())

    def add(self, number: int, call: Call) -> None:
        waits = self.is_opening
        if not self.calls:
            self.worked_at = time.monotonic()
        self.calls[number] = call
        if not waits:
            self.begin(number)

    def begin(self, number: int) -> None:
        call = self.calls[number]
        what = "sampling" if call.method == "sample" else "sync"
        self.spans[number] = timeline.begin(f"engine_{self.number}", what)
        self.host.begin(number, call.method, call.arguments())

    def end(self, number: int) -> None:
        del self.calls[number]
        timeline.end(self.spans.pop(number))

    def forget(self) -> None:
        """All calls: the process is gone."""
        for span in self.spans.values():
            timeline.end(span)
        self.calls, self.spans = {}, {}


class Fleet(Sampler):
    """A Sampler whose engines are elsewhere: this rank's share of `place.engines`, each with all
    weights. Their numbers count through all ranks.

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
        self.num_engines = place.engines // distributed.world_size()
        self.lora_rank = self.sleep_level = 0
        self.can_sleep = self.asleep = False
        self.can_return_routes, self.capture = with_routes or device.type == "cpu", None
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
        self._weights: tuple[list[Place], Callable[[], Any]] | None = None
        """Of the last sync, if there was one since the checkpoint was loaded: what its placement
        has made of them."""
        num_bytes = sum(file.stat().st_size for file in list_weights(Path(checkpoint)))
        self._placement = open_placement(place, device.type, num_bytes)
        self._numbers = count()
        self._changing = threading.RLock()
        """Held while calls begin or end, and a version with them."""
        self._listening = threading.Lock()
        """Held by the thread that hears the engines, for itself and others."""
        self.members: list[Member] = []
        self._transfer = choose_backend(device.type, settings, config)
        self._broadcast: Broadcast | None = None
        try:
            set_environment(config, device, dtype, with_routes)  # what engines begin with
            if self._transfer:
                address = self._placement.address
                self._broadcast = Broadcast(device, self.num_engines, address)
            first = distributed.rank() * self.num_engines
            numbers = range(first, first + self.num_engines)
            self.members = [Member(n, self._placement.start(n)) for n in numbers]
            states = self._ask_all("open", self._opening)
        except BaseException:
            self.close()
            raise
        self.max_model_len = states[0].max_model_len

    def _opening(self) -> tuple[Any, ...]:
        folder = Path(self.checkpoint)
        # Another process may have another working folder.
        name = str(folder.absolute()) if folder.is_dir() else self.checkpoint
        device = torch.device(self.device.type)  # the only one that it sees
        settings = (self.settings, self.dtype, device, self.with_routes, self.chat_template)
        return self.version, name, *settings, 0, self._transfer

    def _last_weights(self) -> tuple[Any, ...]:
        places, share = self._weights
        return self.version, places, share()

    def prepare_routes(self) -> None:
        self.moe_layers, self.with_routes = require_moe_layers(self.config), True
        self._ask_all("prepare_routes", tuple)

    @phase("sync")
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Into every engine, which confirms the version; also while it samples."""
        if self._broadcast and self._listening.acquire(blocking=False):
            try:
                self._listen(0.0)  # an engine may have died since
            finally:
                self._listening.release()
        with self._changing:
            job = self._begin_broadcast(weights)
        if job is None:
            places, buffer_N = pack_weights(weights)
            shared = self._placement.share(buffer_N)
            with self._changing:
                self._weights = places, lambda: shared
                job = self._begin_sync("load_weights", self._last_weights)
        try:
            self._require_version(job)
        except BaseException:
            if self._broadcast:
                self._broadcast.stop()
            raise
        if self._broadcast:
            self._broadcast.end()

    def _begin_broadcast(self, weights: Iterable[tuple[str, Tensor]]) -> Job | None:
        """By vLLM's weight transfer, with a copy in this process for engines that will be lost.
        None: it has to go without, as names and shapes are not known before the first sync, and all
        would wait for an engine that is not open yet."""
        if not (self._broadcast and self._weights) or any(m.is_opening for m in self.members):
            return None
        places, _ = self._weights
        copy_N, job = make_buffer(places), Job()

        def take() -> Iterator[tuple[str, Tensor]]:
            try:
                yield from copy_weights(weights, places, copy_N)
            except Exception as error:
                job.error = error
                raise

        self._weights = places, cache(partial(self._placement.share, copy_N))
        group = self._broadcast.begin(take())
        return self._begin_sync("receive_weights", lambda: (self.version, group, places), job)

    def load_checkpoint(self, checkpoint: str) -> None:
        self.open_tokenizer(checkpoint)
        with self._changing:
            self.checkpoint, self._weights = checkpoint, None
            job = self._begin_sync("load_checkpoint", lambda: self._opening()[:2])
        self._require_version(job)

    def _begin_sync(
        self, method: str, arguments: Callable[[], tuple[Any, ...]], job: Job | None = None
    ) -> Job:
        self.version += 1
        return self._begin_all(method, arguments, job)

    def _require_version(self, job: Job) -> None:
        versions = [state.version for state in self._hear(job)]
        if versions != [self.version] * self.num_engines:
            raise RuntimeError(f"engines have the weights of {versions}, not of {self.version}")

    def load_adapter(self, folder: str) -> None:
        raise NotImplementedError("a fleet takes merged weights")

    def sleep(self) -> None:
        """Nothing to free: the trainer's memory is its own."""

    def sample(
        self,
        groups: list[SampleGroup],
        sampling: Sampling,
        with_routes: bool,
        make_source: MakeSource | None = None,
    ) -> Sampled:
        """As Sampler's, or as that of what `make_source` makes of it in each engine's process.
        Group number i goes to engine i modulo their number, not to the one that is
        free first: log-probs follow in their last bits what is sampled beside them."""
        groups = [group for group in groups if group.missing]
        by_index = {group.index: group for group in groups}

        job = Job()

        def describe(part: list[SampleGroup]) -> tuple[Any, ...]:
            whole = make_source is not None
            described = (describe_missing(group, job.heard, whole) for group in part)
            missing = [group for group in described if group.missing]
            return self.version, missing, sampling, with_routes, make_source

        with self._changing:
            for place, member in enumerate(self.members):
                if part := groups[place :: self.num_engines]:
                    self._begin(job, member, "sample", partial(describe, part))
        with phase("waiting for engines"):
            for part in self._hear(job):
                self.drafts.proposed += part.drafts[0]
                self.drafts.accepted += part.drafts[1]
                for index, rollout in part.rollouts:
                    group = by_index[index]
                    rollout.prompt_ids = group.prompt_ids or rollout.prompt_ids
                    group.samples[rollout.sample] = rollout
                    yield group, rollout

    def _begin(
        self, job: Job, member: Member, method: str, arguments: Callable[[], tuple[Any, ...]]
    ) -> None:
        number = next(self._numbers)
        job.open.add(number)
        member.add(number, Call(job, method, arguments))

    def _begin_all(
        self, method: str, arguments: Callable[[], tuple[Any, ...]], job: Job | None = None
    ) -> Job:
        job = job or Job()
        with self._changing:
            for member in self.members:
                self._begin(job, member, method, arguments)
        return job

    def _ask_all(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> list[State]:
        """The state of each engine behind it."""
        return list(self._hear(self._begin_all(method, arguments)))

    def _hear(self, job: Job) -> Iterator[Any]:
        """What the job's calls yield, until they are done. One of the threads that wait hears the
        engines, for all."""
        try:
            while True:
                is_done = not job.open
                while job.items:
                    yield job.items.popleft()
                if job.error:
                    raise job.error
                if is_done:
                    return
                if self._listening.acquire(timeout=POLL_S):
                    try:
                        if job.open and not job.items:
                            self._listen()
                    finally:
                        self._listening.release()
        finally:
            job.is_wanted = False

    def _listen(self, timeout_s: float = BEAT_S) -> None:
        """To what engines say next."""
        by_host = {member.host: member for member in self.members}
        silent = {member for member in self.members if member.calls}
        for host, answer in self._placement.wait(by_host, timeout_s):
            silent.discard(by_host[host])
            with self._changing:
                if by_host[host].host is host:  # not replaced beside another
                    self._take(by_host[host], answer)
        if self._broadcast and self._broadcast.failure:
            with self._changing:
                for member in [member for member in self.members if member.is_receiving][:1]:
                    self._replace(member, self._broadcast.failure)
        for member in silent:
            silent_s = time.monotonic() - member.worked_at
            if member.calls and self.hang_s is not None and silent_s > self.hang_s:
                with self._changing:
                    self._replace(member, f"no step for {silent_s:.0f} s")

    def _take(self, member: Member, answer: Answer) -> None:
        now = time.monotonic()
        if answer.kind == "lost":
            self._replace(member, answer.value)
            return
        if answer.kind == "beat":
            # A process that is hung says for ever longer that it has done nothing.
            worked_at = now - answer.value
            if worked_at > member.worked_at + BEAT_S / 2:
                heartbeat()
                member.worked_at = worked_at
            return
        heartbeat()
        member.worked_at = now
        call = member.calls[answer.call]
        job = call.job
        failed = answer.kind == "error" and not isinstance(answer.value, UserError)
        if failed and call.method == "receive_weights":  # for another that was lost; half of them
            self._replace(member, first_line(answer.value))
            return
        if answer.kind == "item" and answer.value.rollouts:
            member.num_losses = 0
            job.heard |= {(index, rollout.sample) for index, rollout in answer.value.rollouts}
        if isinstance(answer.value, State):
            member.process = answer.value.process
        if answer.kind == "error":
            # What waits for an engine that does not open waits for ever.
            failed = member.calls.values() if call.method == "open" else [call]
            for each in failed:
                each.job.error = answer.value
        elif answer.value is not None and job.is_wanted:
            job.items.append(answer.value)
        if answer.kind == "item":
            return
        member.end(answer.call)
        if call.method == "open":
            for number in member.calls:
                member.begin(number)
        if not member.calls:
            member.num_losses = 0
        job.open.discard(answer.call)

    def _replace(self, member: Member, how: str) -> None:
        """By a new process, which begins with the weights of the last sync and goes on with the
        groups that are not finished; with it those that wait for it to receive weights."""
        doing = next((call.method for call in member.calls.values()), "idle")
        lost = f"sampler: engine {member.number} was lost in {doing} ({how})"
        member.num_losses += 1
        if member.num_losses > MAX_LOSSES:
            raise UserError(f"{lost}, {member.num_losses} times in a row: is there memory for it?")
        together = [other for other in self.members if other is member or other.is_receiving]
        others = ", ".join(str(other.number) for other in together if other is not member)
        beside = f", and {others}, which waited for it" if others else ""
        log_line(f"{lost}: starting another{beside}", from_any_rank=True)
        if self._broadcast:
            self._broadcast.stop()
        for each in together:
            self._restart(each)

    def _restart(self, member: Member) -> None:
        calls = [(number, call) for number, call in member.calls.items() if call.job.is_wanted]
        self.num_replaced += 1
        member.host.kill()
        member.host = self._placement.start(member.number)
        member.forget()
        if not (calls and calls[0][1].method == "open"):
            self._begin(Job(), member, "open", self._opening)
            if self._weights:
                self._begin(Job(), member, "load_weights", self._last_weights)
        for number, call in calls:
            if call.method == "receive_weights":
                call = Call(call.job, "load_weights", self._last_weights)
            member.add(number, call)

    def close(self) -> None:
        """Also after an error: an engine has nothing to save."""
        for member in self.members:
            member.host.kill()
            member.forget()
        self.members = []
        if self._broadcast:
            self._broadcast.stop()
        self._placement.close()


def describe_missing(
    group: SampleGroup, heard: set[tuple[int, int]], whole: bool = False
) -> SampleGroup:
    """What an engine needs of a group: not the samples that are there, nor, without the `whole`
    problem, its tests."""
    problem = group.problem if whole else Problem(group.problem.id, group.problem.kind, [])
    numbers = (number for number in range(len(group.seeds)) if (group.index, number) in heard)
    there: dict[int, Any] = dict.fromkeys((*group.samples, *numbers))
    return SampleGroup(group.index, problem, group.seeds, group.prompt_ids, there)
