"""Which prompts a step gets: epochs over the problems, selected and ordered by difficulty."""

import random
from collections.abc import Sequence
from typing import Any

from r1pipe.config.base import ENVIRONMENT
from r1pipe.config.rl import Difficulty, Grpo
from r1pipe.types import Problem, Score
from r1pipe.utils.errors import UserError

PassRates = dict[str, float | None]
"""By the problem's id."""


class Prompts:
    """Endless epochs. Each one's order depends only on the seed and on the pass rates at its start.

    `note` adds rates for the next epoch, `refresh` starts one.
    """

    def __init__(
        self,
        problems: list[Problem],
        seed: int,
        difficulty: Difficulty | None = None,
        pass_rates: PassRates | None = None,
    ):
        self.problems, self.seed, self._difficulty = problems, seed, difficulty
        self._epoch, self._place = 0, 0
        self._rates: PassRates = dict(pass_rates or {})
        """At the start of the epoch."""
        self.noted: PassRates = {}
        """Measured since the last refresh."""
        self._order = self._make_order()

    @property
    def num_chosen(self) -> int:
        return len(self._order)

    def draw(self, count: int) -> list[Problem]:
        drawn: list[Problem] = []
        while len(drawn) < count:
            if self._place == len(self._order):
                self._begin_epoch()
            drawn.append(self._order[self._place])
            self._place += 1
        return drawn

    def note(self, rates: PassRates) -> None:
        self.noted |= rates

    def refresh(self, rates: PassRates) -> None:
        """Start an epoch with these rates of all problems."""
        self.noted |= rates
        self._begin_epoch()
        self.noted = {}

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._place = 0
        self._rates |= self.noted
        self._order = self._make_order()

    def _make_order(self) -> list[Problem]:
        """All problems if none is within the limits any more: the policy may be too good for
        them."""
        order = list(self.problems)
        if self._difficulty:
            order = choose_problems(order, self._rates, self._difficulty) or order
        random.Random(f"{self.seed}/prompts/{self._epoch}").shuffle(order)
        if self._difficulty and self._difficulty.order == "easy_first":
            order.sort(key=lambda problem: -(self._rates.get(problem.id) or 0.0))
        return order

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "place": self._place,
            "rates": dict(self._rates),
            "noted": dict(self.noted),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._place = state["epoch"], state["place"]
        self._rates, self.noted = dict(state["rates"]), dict(state["noted"])
        self._order = self._make_order()


def find_passing(settings: Difficulty, stage: Grpo) -> str:
    """The name of the stage's reward that decides what passes. Raises UserError."""
    names = [reward.function for reward in stage.rewards]
    if stage.environment:
        names.append(ENVIRONMENT)
    name = settings.reward or names[0]
    if name not in names:
        raise UserError(f'difficulty.reward "{name}" is none of the stage\'s: {", ".join(names)}')
    return name


def compute_pass_rate(scores: Sequence[Score], reward: str) -> float | None:
    """Share of the judged samples with the full reward of this name; None if none could be
    judged."""
    judged = [v for score in scores if (v := score.rewards[reward]) is not None]
    return sum(value >= 1.0 for value in judged) / len(judged) if judged else None


def choose_problems(
    problems: list[Problem], rates: PassRates, settings: Difficulty
) -> list[Problem]:
    """Problems whose rate is within the limits, in the same order."""
    low, high = settings.min_pass_rate, settings.max_pass_rate
    return [p for p in problems if (r := rates.get(p.id)) is not None and low <= r <= high]
