"""Environments for the tests of episodes."""

import asyncio
from collections.abc import Sequence
from typing import Any

from r1pipe.envs.base import Turn
from r1pipe.types import Problem

AGAIN = {"role": "user", "content": "again"}


class Talk:
    """Asks `turns` times; its reward is the number of characters, given at each turn. Turn
    `fails_at` raises, and after `waits_at` the answer takes `wait_s`."""

    tools: Sequence[dict[str, Any]] = ()

    def __init__(
        self,
        problem: Problem,
        turns: int = 3,
        fails_at: int = 0,
        waits_at: int = 0,
        wait_s: float = 0.0,
    ):
        self.problem, self.turns, self.turn = problem, turns, 0
        self.fails_at, self.waits_at, self.wait_s = fails_at, waits_at, wait_s

    async def start(self) -> list[dict[str, Any]]:
        return list(self.problem.prompt)

    async def step(self, message: dict[str, Any]) -> Turn:
        self.turn += 1
        if self.turn == self.waits_at:
            await asyncio.sleep(self.wait_s)
        if self.turn == self.fails_at:
            raise LookupError("no such place")
        return Turn([AGAIN], float(len(message["content"])), done=self.turn == self.turns)
