"""What an environment is: two methods, made for one sample of one problem and used once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from r1pipe.config.base import Environment as Settings
from r1pipe.rollout.scoring import start_event_loop
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from r1pipe.utils.imports import describe_failure, import_named

T = TypeVar("T")

Message = dict[str, Any]
"""As in a chat template: `role`, `content` and, of an assistant that calls tools, `tool_calls`."""

STARTED_AT_ONCE = 32
"""Environments that are only asked for their first prompt."""

ENVIRONMENTS = {
    "tools": "r1pipe.envs.tools.ToolEnvironment",
    "trl": "r1pipe.envs.trl.TrlEnvironment",
    "verifiers": "r1pipe.envs.verifiers.VerifiersEnvironment",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """An environment's answer: messages for the policy to read, and a reward, None if there is none
    yet. `done`: it was the last; otherwise there must be a message."""

    messages: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False


class Environment(Protocol):
    """One episode. Its methods run in the event loop that all episodes share: what takes long must
    be awaited, in a thread if need be (`asyncio.to_thread`).

    If it has a method `async end(ended) -> float | None`, that is called once when the episode is
    over, with what ended it (`types.Episode.ended`), a limit or an error as well: to clean up, and
    for a reward of the whole episode.
    """

    tools: Sequence[dict[str, Any]] = ()
    """JSON schemas that the chat template writes into the prompt."""

    async def start(self) -> list[Message]:
        """The first prompt."""

    async def step(self, message: Message) -> Turn:
        """Answer the policy's message. With `tools` it may have `tool_calls`, as in OpenAI's API
        (arguments are JSON text), or `tool_call_error`: why what looks like a call is none."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The environment of a row."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def choose_environment(settings: Settings, problem: Problem) -> Choice:
    """The row's own, else the stage's. Raises UserError for a column that is neither a name nor
    `{name, options}`."""
    own = (problem.extra or {}).get("environment")
    if own is None:
        return Choice(settings.name, settings.options)
    try:
        return Choice(own) if isinstance(own, str) else Choice(**own)
    except TypeError as error:
        raise UserError(
            f'problem "{problem.id}": its column environment is a name or {{name, options}}'
        ) from error


def make_environment(settings: Settings, problem: Problem) -> Environment:
    """Raises UserError if it cannot be made."""
    choice = choose_environment(settings, problem)
    make = import_named("environment", ENVIRONMENTS.get(choice.name, choice.name))
    try:
        return make(problem, **choice.options)
    except UserError:
        raise
    except Exception as error:  # the user's own
        what = describe_failure(error)
        raise UserError(
            f'environment "{choice.name}": problem "{problem.id}": {what}; it is called with the '
            "problem and its options"
        ) from error


_clock: ContextVar[asyncio.Timeout | None] = ContextVar("clock", default=None)


async def run_within(seconds: float, answer: Awaitable[T]) -> T:
    """Raises TimeoutError."""
    async with asyncio.timeout(seconds) as clock:
        _clock.set(clock)
        return await answer


@asynccontextmanager
async def queue(slots: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the slots. While an episode waits for it, its `max_tool_s` stands still."""
    clock, now = _clock.get(), asyncio.get_running_loop().time
    end = clock.when() if clock else None
    if clock is None or end is None:
        async with slots:
            yield
        return
    left = end - now()
    clock.reschedule(None)
    async with slots:
        clock.reschedule(now() + left)
        yield


def read_first_prompts(
    settings: Settings | None, problems: Sequence[Problem]
) -> list[tuple[list[Message], list[dict[str, Any]]]]:
    """Messages and tools' schemas that each problem's samples begin with. In an environment: of one
    that is made for it, started, and thrown away.

    Raises UserError if one cannot be made or started."""
    if settings is None:
        return [(problem.prompt, []) for problem in problems]
    slots = asyncio.Semaphore(STARTED_AT_ONCE)

    async def begin(problem: Problem) -> tuple[list[Message], list[dict[str, Any]]]:
        async with slots:
            environment = make_environment(settings, problem)
            try:
                messages = await run_within(settings.max_tool_s, environment.start())
                if hasattr(environment, "end"):  # to clean up; no reward is asked for
                    await run_within(settings.max_tool_s, environment.end("error"))
            except UserError:
                raise
            except Exception as error:  # the user's own
                name, what = choose_environment(settings, problem).name, describe_failure(error)
                line = f'environment "{name}": problem "{problem.id}": it cannot start: {what}'
                raise UserError(line) from error
            return [dict(message) for message in messages], list(environment.tools)

    async def begin_all() -> list[tuple[list[Message], list[dict[str, Any]]]]:
        return await asyncio.gather(*map(begin, problems))

    return asyncio.run_coroutine_threadsafe(begin_all(), start_event_loop()).result()


def check_environment(settings: Settings, problem: Problem) -> None:
    """Raises UserError if the problem's environment cannot be made, or needs a parser of tools."""
    if make_environment(settings, problem).tools and settings.tool_parser is None:
        raise UserError(
            "environment.tool_parser: which of vLLM's parsers reads this model's tool calls? "
            "hermes, llama3_json, deepseek_v3, ..."
        )
