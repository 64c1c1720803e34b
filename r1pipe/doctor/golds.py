"""A dataset's gold answers, scored by its rewards as if a policy had written them.

A gold below the full reward means that dataset and reward disagree on how answers are written, or
that the row is broken: training on it would punish right answers. The doctor rejects such data.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from r1pipe.config.base import Reward
from r1pipe.rollout.scoring import Scorer
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils.imports import find_reward

GOLD_COLUMNS = ("answer", "tests")
"""A reward that takes one of these compares with the gold; the others judge the form only."""


@dataclass(frozen=True)
class GoldTrial:
    """Number of golds tried, and the problems whose gold did not score 1."""

    num_tried: int
    refused: list[tuple[Problem, Score]]

    @property
    def share(self) -> float:
        """Share of golds that score 1; NaN if none was tried."""
        return 1 - len(self.refused) / self.num_tried if self.num_tried else float("nan")


def pick_judging(rewards: Sequence[Reward]) -> list[Reward]:
    """The rewards that compare with the gold."""
    return [
        reward
        for reward in rewards
        if not reward.is_judge
        and set(GOLD_COLUMNS) & set(inspect.signature(find_reward(reward.function)).parameters)
    ]


def try_rewards(rewards: Sequence[Reward], problems: Sequence[Problem]) -> None:
    """Call every reward once, but for judges, on a gold and a non-answer of each problem. Raises
    UserError for a reward that fails or returns no rewards."""
    tried = [
        (problem, as_rollout(problem, text))
        for problem in problems
        for text in (*list_golds(problem)[:1], "I do not know.")
    ]
    called = [reward for reward in rewards if not reward.is_judge]
    Scorer(called).score(*map(list, zip(*tried)))


def try_golds(rewards: Sequence[Reward], problems: Sequence[Problem]) -> GoldTrial:
    """Score each problem's gold: its `answer` in R1's format, or else its `solution`, the only gold
    of a program. Problems with neither are skipped.

    A gold is right if at least one reward gives 1 and none gives less: in a mixture of math and
    code each row has rewards that cannot judge it.
    """
    scorer = Scorer(list(rewards))
    tried = [problem for problem in problems if list_golds(problem)]
    left = list(enumerate(tried))
    scores: dict[int, Score] = {}
    for attempt in range(2):
        left = [(i, problem) for i, problem in left if len(list_golds(problem)) > attempt]
        if not left:
            break
        rollouts = [as_rollout(problem, list_golds(problem)[attempt]) for _, problem in left]
        found = scorer.score([problem for _, problem in left], rollouts)
        scores |= {i: score for (i, _), score in zip(left, found, strict=True)}
        left = [(i, problem) for i, problem in left if not is_full(scores[i])]
    refused = [(tried[i], score) for i, score in sorted(scores.items()) if not is_full(score)]
    return GoldTrial(len(tried), refused)


def list_golds(problem: Problem) -> list[str]:
    golds = []
    if problem.answer:
        golds.append(f"<think>\nThe answer is known.\n</think>\n\\boxed{{{problem.answer}}}")
    if problem.solution:
        golds.append(problem.trace_text)
    return golds


def as_rollout(problem: Problem, completion: str) -> Rollout:
    return Rollout(problem.id, 0, [], [], [], completion, "stop")


def is_full(score: Score) -> bool:
    values = [value for value in score.rewards.values() if value is not None]
    return bool(values) and min(values) >= 1.0


def spread(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """At most `limit` problems, evenly spaced."""
    if limit is None or len(problems) <= limit:
        return list(problems)
    return [problems[i * len(problems) // limit] for i in range(limit)]
