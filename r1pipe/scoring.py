"""Calls reward functions on rollouts, weights them, and counts what none could judge."""

import importlib
import inspect
from collections.abc import Callable

from r1pipe.config import Distill, Eval, OnPolicy, Reject, Reward, Stage
from r1pipe.errors import UserError
from r1pipe.phases import phase
from r1pipe.records import Problem, Rollout, Score

RewardFunction = Callable[..., list[float | None]]
"""TRL's contract: fn(prompts=, completions=, completion_ids=, **columns) -> list[float | None]."""


def find_reward(name: str) -> RewardFunction:
    """The function behind a dotted name."""
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise UserError(f'reward "{name}": give a dotted name, such as rewards.math_correct')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f'reward "{name}": {error}') from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f'reward "{name}": {module_name} has no function "{attribute}"')
    return function


def list_rewards(stage: Stage) -> list[Reward]:
    """The rewards that a stage calls."""
    if isinstance(stage, OnPolicy):
        return stage.rewards
    if isinstance(stage, Reject | Distill):
        return stage.traces.rewards
    if isinstance(stage, Eval):
        own = [problems.reward for problems in stage.data if problems.reward]
        return [Reward(function=name) for name in (stage.reward, stage.format_reward, *own)]
    return []


class Scorer:
    """The reward functions of a stage, looked up once.

    Raises UserError for a function that does not exist or does not take its `options`.
    """

    def __init__(self, rewards: list[Reward]):
        self.rewards = [(reward, find_reward(reward.function)) for reward in rewards]
        for reward, function in self.rewards:
            parameters = inspect.signature(function).parameters
            for option in reward.options:
                if option not in parameters:
                    raise UserError(f'reward "{reward.function}": no option "{option}"')

    @phase("scoring")
    def score(self, problems: list[Problem], rollouts: list[Rollout]) -> list[Score]:
        """One Score per rollout; `problems[i]` is the problem of `rollouts[i]`."""
        columns = {
            "prompts": [p.prompt for p in problems],
            "completions": [r.completion for r in rollouts],
            "completion_ids": [r.completion_ids for r in rollouts],
            "answer": [p.answer for p in problems],
            "tests": [p.tests for p in problems],
        }
        scores = [Score() for _ in rollouts]
        for reward, function in self.rewards:
            values = function(**columns, **reward.options)
            if len(values) != len(rollouts):
                raise UserError(
                    f'reward "{reward.function}": {len(values)} values for {len(rollouts)} rollouts'
                )
            for score, value in zip(scores, values, strict=True):
                score.rewards[reward.function] = value
                if value is not None:
                    score.total = (score.total or 0.0) + reward.weight * value
        return scores


def reward_metrics(scores: list[Score]) -> dict[str, float]:
    """Means over the judged rollouts and the share that could not be judged, per function."""
    metrics = {}
    for name in scores[0].rewards if scores else ():
        judged = [s.rewards[name] for s in scores if s.rewards[name] is not None]
        metrics[f"rewards/{name}/mean"] = mean(judged)
        metrics[f"rewards/{name}/unjudged"] = 1 - len(judged) / len(scores)
    totals = [s.total for s in scores if s.total is not None]
    metrics["reward"] = mean(totals)
    metrics["reward_unjudged"] = 1 - len(totals) / max(1, len(scores))
    return metrics


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
