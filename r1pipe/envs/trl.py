"""The environment `trl`: classes and functions written for TRL's GRPOTrainer, its arguments
`environment_factory` and `tools` (TRL 1.16), without TRL."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from r1pipe.data.problems import COLUMNS
from r1pipe.envs.base import Message
from r1pipe.envs.tools import ToolEnvironment, run_function
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from r1pipe.utils.imports import import_named


class TrlEnvironment(ToolEnvironment):
    """`factory` and `tools` are dotted names. The factory is called without arguments for each
    episode; the object's public methods are tools, `reset(**row)` may return what is appended to
    the prompt, and `get_reward()`, if there is one, gives the reward of the whole episode. Results
    and errors are written as TRL writes them. Unlike there, no object is used again, and a
    malformed call is an error message.
    """

    def __init__(self, problem: Problem, factory: str | None = None, tools: Sequence[str] = ()):
        if not factory and not tools:
            raise UserError('environment "trl": its options are factory, tools or both')
        self.problem = problem
        self.inner = import_named("factory", factory)() if factory else None
        if factory and not callable(getattr(self.inner, "reset", None)):
            raise UserError(f'environment "trl": what {factory} makes has no method reset')
        functions = [import_named("tool", name) for name in tools]
        self.take_functions([*functions, *find_methods(self.inner)])

    async def start(self) -> list[Message]:
        prompt: list[Message] = [dict(message) for message in self.problem.prompt]
        if self.inner is None:
            return prompt
        row = {name: getattr(self.problem, name) for name in COLUMNS} | (self.problem.extra or {})
        row.pop("environment", None)
        added = await run_function(self.inner.reset, **row)
        if not isinstance(added, str | None):
            raise TypeError(f"reset returned {type(added).__name__}: only text is supported")
        prompt[-1]["content"] += added or ""
        return prompt

    async def end(self, ended: str) -> float | None:
        if ended == "error" or not hasattr(self.inner, "get_reward"):
            return None
        return await run_function(self.inner.get_reward)

    def write(self, result: Any) -> str:
        return str(result)

    def write_error(self, error: Exception) -> str:
        return str({"error": str(error)})


def find_methods(instance: object) -> Iterator[Callable[..., Any]]:
    """Those that the policy may call."""
    for name, _ in inspect.getmembers(type(instance), inspect.isfunction):
        if name not in ("reset", "get_reward") and not name.startswith("_"):
            yield getattr(instance, name)
