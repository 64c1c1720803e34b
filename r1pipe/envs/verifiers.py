"""The environment `verifiers`: those of PrimeIntellect's package of that name, the classic ones,
up to its release 0.3 (`SingleTurnEnv`, `MultiTurnEnv`, `ToolEnv` and what is made of them).

`MultiTurnEnv.rollout` is taken apart: where it would call a client, our sampler answers. So prompts
and answers are tokens of one path, and only grow.
"""

import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, wraps
from importlib.metadata import version
from inspect import isawaitable
from types import SimpleNamespace
from typing import Any

from r1pipe.envs.base import Message, Turn
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.imports import describe_failure, import_named

NEEDED = "verifiers>=0.1.14,<0.4"
STOPS = {
    "turns": "max_turns_reached",
    "tokens": "max_total_completion_tokens_reached",
    "tool_time": "timeout_reached",
}
"""What ended an episode, in verifiers' words."""

FAILURES: ContextVar[list[Exception]] = ContextVar("failures")
"""Of the reward functions, while an episode is scored."""


class VerifiersEnvironment:
    """`env` is the name of an installed environment, as `verifiers.load_environment` takes it, or
    the dotted name of a function or class that makes one; `args` are its arguments. The problem is
    a row of its dataset, from `data: {recipe: verifiers}`.

    Its rewards are its rubric's. A function that raises leaves the episode without a reward;
    verifiers would count 0.
    """

    def __init__(self, problem: Problem, env: str, args: Mapping[str, Any] | None = None):
        if not isinstance(problem.tests, Mapping) or "example_id" not in problem.tests:
            raise UserError(
                f'environment "verifiers": problem "{problem.id}" is none of {env}: rows come from '
                f"its dataset, data: {{recipe: verifiers, options: {{env: {env}}}}}"
            )
        self.row = {**problem.tests, "prompt": [dict(message) for message in problem.prompt]}
        self.env = open_environment(env, json.dumps(args or {}, sort_keys=True))
        while hasattr(self.env, "_route_child_input"):  # a group: the row says which
            name, self.row, _ = self.env._route_child_input(self.row)
            self.env = self.env.get_env_for_name(name)
        info = self.row.get("info") or {}
        info = json.loads(info) if isinstance(info, str) else info
        self.tools = list(map(describe_tool, info.get("tool_defs") or self.env.tool_defs or ()))
        self.state: Any = None
        self.prompt: list[Any] = []
        self.num_calls = 0

    async def start(self) -> list[Message]:
        self.state = await self.env.init_state(self.row, make_client(), "policy", None)
        self.state["timing"].generation.start = time.time()
        self.state = await self.env.setup_state(self.state) or self.state
        self.prompt = await self.ask()
        if not self.prompt:
            raise ValueError("the environment is completed before the first turn")
        return write_messages(self.prompt)

    async def step(self, message: Message) -> Turn:
        await self.env.add_model_response(self.state, self.prompt, self.make_response(message))
        said = [*self.prompt, *self.state["trajectory"][-1]["completion"]]
        self.prompt = await self.ask()
        if not self.prompt:
            return Turn(write_messages(normalize(self.state.get("final_env_response"))), done=True)
        if write_messages(self.prompt[: len(said)]) != write_messages(said):
            raise ValueError("the environment changes what was said: a path of tokens only grows")
        return Turn(write_messages(self.prompt[len(said) :]))

    async def end(self, ended: str) -> float | None:
        if self.state is None:
            return None
        if ended in STOPS:
            self.state["is_completed"] = self.state["is_truncated"] = True
            self.state["stop_condition"] = STOPS[ended]
        await self.env.cleanup(self.state)
        try:
            return None if ended == "error" else await self.score()
        finally:
            await self.env.rubric.cleanup(self.state)

    async def ask(self) -> list[Any]:
        """All messages up to where the policy speaks; none if the episode is over."""
        prompt: list[Any] = []
        if not await self.env.is_completed(self.state):
            prompt = normalize(await self.env.get_prompt_messages(self.state))
            if self.state.get("final_env_response") is not None:
                await self.env.is_completed(self.state)
                prompt = []
        if error := self.state.get("error"):
            raise error
        return prompt

    async def score(self) -> float | None:
        failures: list[Exception] = []
        FAILURES.set(failures)
        await self.env.rubric.score_rollout(self.state)
        if failures:
            raise failures[0]
        return self.state["reward"]

    def make_response(self, message: Message) -> Any:
        from verifiers.types import Response, ResponseMessage, ToolCall

        calls = []
        for call in message.get("tool_calls", ()):
            calls.append(ToolCall(id=f"call_{self.num_calls}", **call["function"]))
            self.num_calls += 1
        answer = ResponseMessage(
            content=message["content"],
            tool_calls=calls or None,
            finish_reason="tool_calls" if calls else "stop",
            is_truncated=False,
        )
        return Response(id="", created=0, model="policy", message=answer)


@cache
def open_environment(env: str, args: str) -> Any:
    """The environment that all its episodes share; `args` is JSON.

    Raises UserError if the package is missing or too new, if there is no such environment, if it
    does not take the arguments, and for one that cannot be asked turn by turn.
    """
    import_classic()
    module = env.split("/")[-1].replace("-", "_")
    name = env if "." in env else f"{module}.load_environment"
    make, given = import_named("environment", name), json.loads(args)
    try:
        made = make(**given)
    except Exception as error:  # the environment's own
        raise UserError(f'environment "{env}": {describe_failure(error)}; args: {args}') from error
    for each in list_members(made):
        if why := find_obstacle(each):
            raise UserError(f'environment "{env}": {type(each).__name__} {why}')
        guard_rewards(each.rubric)
    made.env_id, made.env_args = made.env_id or env, made.env_args or given
    return made


def import_classic() -> None:
    try:
        from verifiers.envs import environment
    except ImportError as error:
        what = first_line(error)
        if error.name == "verifiers":
            what = "the package is missing"
        elif str(error.name).startswith("verifiers."):
            what = f"verifiers {version('verifiers')} has no classic environments"
        raise UserError(f'environment "verifiers": {what}: pip install "{NEEDED}"') from error
    # Each environment takes SIGINT and SIGTERM, by which a run here ends its step and saves; and
    # outside the main thread signal.signal raises.
    environment.signal = SimpleNamespace(**{**vars(signal), "signal": lambda *given: None})


def list_members(env: Any) -> Iterator[Any]:
    """Of a group, nested ones too; or the environment itself."""
    if hasattr(env, "env_map"):
        for member in env.envs:
            yield from list_members(member)
    else:
        yield env


def find_obstacle(env: Any) -> str | None:
    """Why it cannot be asked turn by turn."""
    from verifiers.envs.environment import Environment
    from verifiers.envs.multiturn_env import MultiTurnEnv

    if not isinstance(env, Environment):
        return "is no environment of verifiers"
    if not isinstance(env, MultiTurnEnv):
        return "has a rollout of its own: only MultiTurnEnv and what is made of it can be played"
    if type(env).get_model_response is not Environment.get_model_response:
        return "calls the model itself: that cannot be played"
    if env.rubric.has_group_rewards:
        return "rewards whole groups: each episode is judged alone here"
    return None


def guard_rewards(rubric: Any) -> None:
    """Note what a reward function raises: verifiers counts 0, which is no verdict."""
    for member in getattr(rubric, "rubrics", ()):
        guard_rewards(member)
    rubric.funcs = [
        guard(function) if weight else function
        for function, weight in zip(rubric.funcs, rubric.weights, strict=True)
    ]


def guard(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def guarded(**columns: Any) -> float:
        try:
            value = function(**columns)
            return float(await value if isawaitable(value) else value)
        except Exception as error:
            FAILURES.get([]).append(error)
            return 0.0

    return guarded


@cache
def make_client() -> Any:
    """In the place of the one that verifiers would call."""
    from verifiers.clients import Client

    class NoClient(Client):
        async def get_response(self, *given: Any, **more: Any) -> Any:
            raise NotImplementedError("the environment calls the model itself")

    NoClient.__abstractmethods__ = frozenset()
    return NoClient(None)


def normalize(messages: Any) -> list[Any]:
    from verifiers.utils.message_utils import normalize_messages

    return normalize_messages(messages or [])


def write_messages(messages: Iterable[Any]) -> list[Message]:
    """As in a chat template. Raises ValueError for content other than text."""
    written = []
    for message in messages:
        content = message.content or ""
        if not isinstance(content, str):
            parts = [part if isinstance(part, dict) else part.model_dump() for part in content]
            if any(part["type"] != "text" for part in parts):
                raise ValueError("only text is supported")
            content = "".join(part["text"] for part in parts)
        plain: Message = {"role": message.role, "content": content}
        if calls := getattr(message, "tool_calls", None):
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        if answers := getattr(message, "tool_call_id", None):
            plain["tool_call_id"] = answers
        written.append(plain)
    return written


def describe_tool(tool: Any) -> dict[str, Any]:
    given = tool if isinstance(tool, dict) else tool.model_dump()
    schema = {key: given[key] for key in ("name", "description", "parameters")}
    return {"type": "function", "function": schema}
