"""Rewards are called by TRL's contract, weighted, and counted where they cannot judge."""

import math

import pytest

from r1pipe.config import Reward
from r1pipe.errors import UserError
from r1pipe.records import Problem, Rollout, Score
from r1pipe.rejection import find_end
from r1pipe.scoring import Scorer, reward_metrics

PROMPT = [{"role": "user", "content": "1+1?"}]


def make_rollout(completion: str, finish_reason: str = "stop") -> Rollout:
    return Rollout("p", 0, [1], [2], [-0.1], completion, finish_reason)


def score(rewards: list[Reward], completions: list[str], answers: list[str]) -> list[Score]:
    problems = [Problem(id="p", kind="math", prompt=PROMPT, answer=a) for a in answers]
    return Scorer(rewards).score(problems, [make_rollout(c) for c in completions])


def test_weighted_sum_of_real_rewards() -> None:
    rewards = [
        Reward(function="rewards.math_correct"),
        Reward(function="rewards.format", weight=0.2),
    ]
    right, no_thinking, wrong = score(
        rewards,
        ["<think>\n1+1=2\n</think>\n\\boxed{2}", "\\boxed{2}", "<think>\n1\n</think>\n\\boxed{3}"],
        ["2", "2", "2"],
    )
    assert right.total == pytest.approx(1.2)
    assert no_thinking.total == pytest.approx(1.0)
    assert wrong.total == pytest.approx(0.2)
    metrics = reward_metrics([right, no_thinking, wrong])
    assert metrics["rewards/rewards.math_correct/mean"] == pytest.approx(2 / 3)
    assert metrics["reward_unjudged"] == 0


def test_what_no_reward_can_judge_is_none_not_zero() -> None:
    first, second = score([Reward(function="rewards.math_correct")], ["\\boxed{2}"] * 2, ["2", ""])
    assert first.total == 1.0
    assert second.total is None
    metrics = reward_metrics([first, second])
    assert metrics["rewards/rewards.math_correct/mean"] == 1.0
    assert metrics["rewards/rewards.math_correct/unjudged"] == 0.5
    assert metrics["reward_unjudged"] == 0.5
    assert math.isnan(reward_metrics([second])["reward"])


# (name, options, words of the error)
BAD_REWARDS = [
    ("rewards.math_corect", {}, "math_corect"),
    ("math_correct", {}, "dotted name"),
    ("nowhere.at.all", {}, "nowhere"),
    ("rewards.format", {"strictly": True}, "strictly"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD_REWARDS)
def test_bad_reward_is_named(name: str, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Scorer([Reward(function=name, options=options)])


def test_only_complete_samples_with_full_rewards_become_traces() -> None:
    full = Score({"a": 1.0, "b": 1.0}, 2.0)
    assert find_end(make_rollout("x"), full) is None
    assert find_end(make_rollout("x", "length"), full) == "truncated"
    assert find_end(make_rollout("x"), Score({"a": 1.0, "b": 0.5}, 1.5)) == "wrong"
    assert find_end(make_rollout("x"), Score({"a": 1.0, "b": None}, 1.0)) == "unjudged"
