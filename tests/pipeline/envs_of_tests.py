"""Environments for the tests of episodes."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1pipe.envs.base import Turn
from r1pipe.types import Problem

AGAIN = {"role": "user", "content": "again"}


class Talk:
    """Asks `turns` times, first what the problem asks or `first`; its reward is the number of
    characters, given at each turn. Turn `fails_at` raises, and after `waits_at` the answer takes
    `wait_s`. The ids of problems that it was started for are lines of the file `log`."""

    tools: Sequence[dict[str, Any]] = ()

    def __init__(
        self,
        problem: Problem,
        turns: int = 3,
        fails_at: int = 0,
        waits_at: int = 0,
        wait_s: float = 0.0,
        first: str = "",
        log: str = "",
    ):
        self.problem, self.turns, self.turn = problem, turns, 0
        self.fails_at, self.waits_at, self.wait_s = fails_at, waits_at, wait_s
        self.first, self.log = first, log

    async def start(self) -> list[dict[str, Any]]:
        if self.log:
            with Path(self.log).open("a") as log:
                log.write(f"{self.problem.id}\n")
        question = self.first.format(question=self.problem.question)
        return [{"role": "user", "content": question}] if self.first else list(self.problem.prompt)

    async def step(self, message: dict[str, Any]) -> Turn:
        self.turn += 1
        if self.turn == self.waits_at:
            await asyncio.sleep(self.wait_s)
        if self.turn == self.fails_at:
            raise LookupError("no such place")
        return Turn([AGAIN], float(len(message["content"])), done=self.turn == self.turns)


class Listener(Talk):
    """Gives 1000 more at the end, whatever it is."""

    def __init__(self, problem: Problem, end_fails: bool = False, **options: Any):
        super().__init__(problem, **options)
        self.end_fails, self.ended = end_fails, ""

    async def end(self, ended: str) -> float:
        assert not self.ended, "asked twice"
        self.ended = ended
        HEARD.append((self.problem.id, ended))
        if self.end_fails:
            raise LookupError("no judge")
        return 1000.0


HEARD: list[tuple[str, str]] = []


class Guess:
    """For TRL's `environment_factory`: is 42 above the row's answer?"""

    def reset(self, answer: str, **row: object) -> str:
        self.number, self.num_calls = int(answer), 0
        return " Compare."

    def compare(self, number: int) -> str:
        """Compare a number with the answer.

        Args:
            number: Which.
        """
        self.num_calls += 1
        return "more" if number > self.number else "not more"

    def get_reward(self) -> float:
        return float(self.num_calls)
