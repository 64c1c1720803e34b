"""One episode on its way: a path of turns, token in, token out.

A turn's request is the path so far, as it was sampled, and what the chat template adds for the new
messages.
"""

import json
import math
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import numpy as np

from r1pipe.config.base import Environment as Settings
from r1pipe.config.base import Sampling
from r1pipe.envs.base import Environment, Message, Turn, make_environment, run_within
from r1pipe.models.tokenizer import encode_next_prompt, encode_prompt
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.route_capture import take_routes
from r1pipe.rollout.tool_parser import ToolParser
from r1pipe.types import Episode, Problem, Rollout
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.seeds import derive_seed


class Path:
    """One episode on its way: its tokens, and what its environment knows."""

    def __init__(
        self,
        sampler: Sampler,
        settings: Settings,
        parser: ToolParser | None,
        sampling: Sampling,
        group: SampleGroup,
        number: int,
        with_routes: bool,
    ):
        self.sampler, self.settings, self.parser = sampler, settings, parser
        self.sampling, self.group, self.number = sampling, group, number
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
        sampler = self.sampler
        left = sampler.max_model_len - len(self.prompt_ids) - len(self.ids)
        return min(left, self.sampling.max_completion_length - self.num_sampled)

    # What is asked of the environment, within its time

    async def begin(self) -> list[Message]:
        self.environment = make_environment(self.settings, self.problem)
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
        return await run_within(self.settings.max_tool_s, answer)

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
        self.episode.error = self.episode.error or first_line(error, with_type=True)

    def open(self, messages: list[Message]) -> None:
        """Raises UserError for a prompt that the chat template refuses."""
        assert self.environment
        sampler, name = self.sampler, f'problem "{self.problem.id}"'
        tools = list(self.environment.tools)
        self.prompt = [dict(message) for message in messages]
        if self.prompt != self.problem.prompt:
            self.episode.prompt = self.prompt
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
        elif episode.num_turns >= self.settings.max_turns:
            episode.ended = "turns"
        elif not added:
            raise ValueError("the environment's turn has no message and is not the last")
        if episode.ended:
            return
        sampler, name = self.sampler, f'problem "{self.problem.id}"'
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
        sampler, output = self.sampler, result.outputs[0]
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
        if self.parser and self.environment and self.environment.tools:
            message |= self.parser.parse(text, self.environment.tools)
            self.episode.num_tool_calls += len(message.get("tool_calls", ()))
            self.episode.num_malformed_calls += "tool_call_error" in message
        return message

    def request(self) -> tuple[list[int], Any]:
        """The next turn's. Its seed is its own."""
        seed, number = self.group.seeds[self.number], self.episode.num_turns
        sampling = self.sampling.model_copy(update={"max_completion_length": self.room})
        own = derive_seed(seed, "turn", number) if number else seed
        parameters = self.sampler.parameters(sampling, own, self.with_routes)
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
