"""Samples episodes: several turns in an environment, token in, token out.

A turn's request is the path so far, as it was sampled, and what the chat template adds for the new
messages. When one turn ends, its environment is asked in an event loop beside the engine, and the
next turn joins the requests while others are still being sampled.
"""

import asyncio
import json
import math
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from itertools import count
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import Environment as Settings
from r1pipe.config.base import Sampling
from r1pipe.envs.base import Environment, Message, Turn, check_environment, make_environment
from r1pipe.models.tokenizer import encode_next_prompt, encode_prompt
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.route_capture import take_routes
from r1pipe.rollout.scoring import start_event_loop
from r1pipe.rollout.tool_parser import ToolParser
from r1pipe.types import Episode, Problem, Rollout
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.phases import phase
from r1pipe.utils.seeds import derive_seed

PATIENCE_S = {"cpu": 1.0}
"""How long the engine waits for environments just asked, by device. On a CPU, whose runs are to
be the same to the last bit, quick ones then join always at the same step; slow ones never hold up
the engine for longer."""


class EpisodeSampler:
    """A Sampler whose samples are episodes.

    Raises UserError if the first problem's environment cannot be made.
    """

    def __init__(self, sampler: Sampler, settings: Settings, problem: Problem):
        self.sampler, self.settings = sampler, settings
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
    def asleep(self) -> bool:
        return self.sampler.asleep

    @property
    def sleep_level(self) -> int:
        return self.sampler.sleep_level

    def sleep(self) -> None:
        self.sampler.sleep()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.sampler.load_weights(weights)

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
        """Every missing sample as its episode ends, already in its group."""
        paths = [
            Path(self, sampling, group, number, with_routes)
            for group in groups
            for number in group.missing
        ]
        turns = Turns(self, paths)
        capture = self.sampler.capture if with_routes else None
        with phase("sampling"), capture.recording() if capture else nullcontext():
            try:
                for place, result in self.sampler.run(turns.requests()):
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


class Path:
    """One episode on its way: its tokens, and what its environment knows."""

    def __init__(
        self,
        owner: EpisodeSampler,
        sampling: Sampling,
        group: SampleGroup,
        number: int,
        with_routes: bool,
    ):
        self.owner, self.sampling, self.group, self.number = owner, sampling, group, number
        self.with_routes = with_routes
        self.requests: list[tuple[str, int]] = []
        """Of each turn: the request's name, and the tokens that were read in it."""
        self.routes: list[np.ndarray] = []
        self.environment: Environment | None = None
        self.started = False
        self.was_told = False
        self.prompt: list[Message] = []
        self.prompt_ids = group.prompt_ids
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.texts: list[str] = []
        self.was_cut = False
        self.episode = Episode([], [], ended="")

    @property
    def problem(self) -> Problem:
        return self.group.problem

    @property
    def num_sampled(self) -> int:
        return len(self.ids) - sum(stop - start for start, stop in self.episode.given)

    @property
    def room(self) -> int:
        """Tokens that may still be sampled."""
        sampler = self.owner.sampler
        left = sampler.max_model_len - len(self.prompt_ids) - len(self.ids)
        return min(left, self.sampling.max_completion_length - self.num_sampled)

    # What is asked of the environment, within its time

    async def begin(self) -> list[Message]:
        self.environment = make_environment(self.owner.settings, self.problem)
        return await self.within_limit(self.environment.start())

    async def step(self, message: Message) -> Turn:
        assert self.environment
        return await self.within_limit(self.environment.step(message))

    async def end(self) -> float | None:
        self.was_told = True
        return await self.within_limit(self.environment.end(self.episode.ended))

    @property
    def must_be_told(self) -> bool:
        """Whether the episode has ended and its environment wants to know."""
        wants = hasattr(self.environment, "end") and not self.was_told
        return bool(self.episode.ended) and wants

    async def within_limit(self, answer: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wait_for(answer, self.owner.settings.max_tool_s)

    # What comes back

    def take_answer(self, answer: Future[Any]) -> None:
        """The environment's; `episode.ended` then says whether it was the last."""
        error = answer.exception()
        if isinstance(error, UserError):
            raise error
        if isinstance(error, TimeoutError):
            self.episode.ended = "tool_time"
        elif error is not None:
            self.fail(error)
        elif not self.started:
            self.started = True
            self.open(answer.result())
        else:
            try:
                if self.was_told:
                    self.add_reward(answer.result())
                else:
                    self.take_turn(answer.result())
            except UserError:
                raise
            except Exception as error:  # no Turn, or one that makes no sense
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.episode.ended, self.episode.reward = "error", None
        self.episode.error = first_line(error, with_type=True)

    def open(self, messages: list[Message]) -> None:
        """Raises UserError for a prompt that the chat template refuses."""
        assert self.environment
        sampler, name = self.owner.sampler, f'problem "{self.problem.id}"'
        tools = list(self.environment.tools)
        self.prompt = [dict(message) for message in messages]
        self.prompt_ids = encode_prompt(sampler.tokenizer, self.prompt, name, tools)
        if self.room < 1:
            self.episode.ended = "tokens"

    def add_reward(self, given: float | None) -> None:
        if given is None or self.episode.ended == "error":
            return
        reward = float(given)
        if not math.isfinite(reward):
            raise ValueError(f"the environment's reward is {reward}")
        self.episode.reward = (self.episode.reward or 0.0) + reward

    def take_turn(self, turn: Turn) -> None:
        assert self.environment
        episode = self.episode
        self.add_reward(turn.reward)
        added = json.loads(json.dumps([dict(message) for message in turn.messages]))
        episode.messages += added
        if turn.done:
            episode.ended = "done"
        elif self.was_cut:
            episode.ended = "tokens"
        elif episode.num_turns >= self.owner.settings.max_turns:
            episode.ended = "turns"
        elif not added:
            raise ValueError("the environment's turn has no message and is not the last")
        if episode.ended:
            return
        sampler, name = self.owner.sampler, f'problem "{self.problem.id}"'
        messages = [*self.prompt, *episode.messages]
        tools = list(self.environment.tools)
        given = encode_next_prompt(sampler.tokenizer, messages, sampler.end_ids, name, tools)
        if self.room <= len(given):
            episode.ended = "tokens"
            return
        episode.given.append([len(self.ids), len(self.ids) + len(given)])
        self.ids += given
        self.logprobs += [0.0] * len(given)

    def take_sampled(self, place: int, result: Any) -> Message:
        """What vLLM sampled, as the message that it says."""
        sampler, output = self.owner.sampler, result.outputs[0]
        tokens = list(output.token_ids)
        num_read = len(self.prompt_ids) + len(self.ids) + len(tokens) - 1
        self.requests.append((str(place), num_read))
        if self.with_routes and sampler.capture is None:
            self.routes.append(take_routes(result, sampler.moe_layers))
        text = sampler.decode([*self.prompt_ids, *self.ids], tokens)
        self.ids += tokens
        self.logprobs += output.logprobs.logprobs
        self.texts.append(text)
        self.was_cut = output.finish_reason == "length"
        message: Message = {"role": "assistant", "content": text}
        self.episode.messages.append(message)
        parser = self.owner.parser
        if parser and self.environment and self.environment.tools:
            message |= parser.parse(text, self.environment.tools)
            self.episode.num_tool_calls += len(message.get("tool_calls", ()))
            self.episode.num_malformed_calls += "tool_call_error" in message
        return message

    def request(self) -> tuple[list[int], Any]:
        """The next turn's. Its seed is its own."""
        seed, number = self.group.seeds[self.number], self.episode.num_turns
        sampling = self.sampling.model_copy(update={"max_completion_length": self.room})
        own = derive_seed(seed, "turn", number) if number else seed
        parameters = self.owner.sampler.parameters(sampling, own, self.with_routes)
        return [*self.prompt_ids, *self.ids], parameters

    def make_rollout(self) -> Rollout:
        return Rollout(
            problem_id=self.problem.id,
            sample=self.number,
            prompt_ids=self.prompt_ids,
            completion_ids=self.ids,
            logprobs=self.logprobs,
            completion="\n\n".join(self.texts),
            finish_reason="stop" if self.episode.ended in ("done", "error") else "length",
            routes=join_routes(self.routes),
            episode=self.episode,
        )


def join_routes(turns: list[np.ndarray]) -> np.ndarray | None:
    """Each token's as it was read first: in later turns' prompts it may be routed otherwise."""
    rows: list[np.ndarray] = []
    for routes in turns:
        rows.append(routes[sum(map(len, rows)) :])
    return np.concatenate(rows) if rows else None


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
