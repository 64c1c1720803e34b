"""The environment `tools`: the policy calls functions until it answers without a call."""

import asyncio
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers.utils import get_json_schema

from r1pipe.envs.base import Message, Turn, queue
from r1pipe.envs.calculator import calculator
from r1pipe.envs.python_tool import PythonSession
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.imports import import_named
from rewards import SandboxError
from rewards.workers.pool import WorkerError

TOOLS: dict[str, Callable[[], Callable[..., Any]]] = {
    "calculator": lambda: calculator,
    "python": lambda: PythonSession().python,
}
"""By name; called for each episode."""

MAX_RESULT_CHARS = 4000
"""Of a result that the policy reads; the rest is cut."""


class ToolEnvironment:
    """`tools` of the options are names in TOOLS or dotted names of functions, async ones too, whose
    annotations and docstring make their JSON schema. Gives no reward: functions of the stage judge
    the last answer.

    What a call gets wrong, and what a function raises, is an error message to the policy.
    """

    def __init__(self, problem: Problem, tools: Sequence[str] = ("calculator",)):
        self.problem = problem
        self.take_functions(map(find_tool, tools))

    def take_functions(self, functions: Iterable[Callable[..., Any]]) -> None:
        self.functions = {function.__name__: function for function in functions}
        self.tools = [describe_tool(function) for function in self.functions.values()]

    async def start(self) -> list[Message]:
        return list(self.problem.prompt)

    async def step(self, message: Message) -> Turn:
        if error := message.get("tool_call_error"):
            return Turn([{"role": "tool", "content": f"error: {error}"}])
        calls = [call["function"] for call in message.get("tool_calls", ())]
        results = [
            {"role": "tool", "name": call["name"], "content": await self.call(**call)}
            for call in calls
        ]
        return Turn(results, done=not results)

    async def call(self, name: str, arguments: str) -> str:
        try:
            result = await self.compute(name, arguments)
        except (SandboxError, WorkerError):
            raise
        except Exception as error:  # the policy's: it may do better at the next turn
            return self.write_error(error)[:MAX_RESULT_CHARS]
        return self.write(result)[:MAX_RESULT_CHARS]

    def write(self, result: Any) -> str:
        return result if isinstance(result, str) else json.dumps(result)

    def write_error(self, error: Exception) -> str:
        return f"error: {first_line(error)}"

    async def compute(self, name: str, arguments: str) -> Any:
        if name not in self.functions:
            raise ValueError(f"no tool {name}; there are {', '.join(self.functions)}")
        given = json.loads(arguments)
        if not isinstance(given, dict):
            raise ValueError("arguments are a JSON object")
        function = self.functions[name]
        inspect.signature(function).bind(**given)  # says what is missing or unknown
        return await run_function(function, **given)


NUM_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""As asyncio.to_thread has."""


@functools.cache
def find_threads(loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return asyncio.Semaphore(NUM_THREADS)


async def run_function(function: Callable[..., Any], **given: Any) -> Any:
    """In a thread of its own, unless it is async. Hundreds of episodes may call at the same time:
    waiting for a thread is not the function's time."""
    if inspect.iscoroutinefunction(function):
        return await function(**given)
    async with queue(find_threads(asyncio.get_running_loop())):
        return await asyncio.to_thread(function, **given)


def find_tool(name: str) -> Callable[..., Any]:
    if name not in TOOLS and "." not in name:
        raise UserError(f'tool "{name}": there are {", ".join(TOOLS)}; or give a dotted name')
    return TOOLS[name]() if name in TOOLS else import_named("tool", name)


def describe_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """Its JSON schema. Raises UserError for a function without annotations or docstring."""
    try:
        return get_json_schema(function)
    except Exception as error:  # transformers' own kinds
        raise UserError(
            f'tool "{function.__name__}": {first_line(error)}; annotations and a docstring '
            "with Args are its schema"
        ) from error
