"""Pass rates, and the problems that are chosen by them."""

from types import SimpleNamespace

import pytest

from r1pipe.config.base import Reward
from r1pipe.config.rl import Difficulty
from r1pipe.rl.curriculum import choose_problems, compute_pass_rate, find_reward
from r1pipe.rl.difficulty import check_choice
from r1pipe.types import Problem, Score
from r1pipe.utils.errors import UserError

REWARD = Reward(function="f")
# values of the reward, pass rate
RATES = [
    ([1.0, 1.0, 0.0, 0.0], 0.5),
    ([1.0, None, None, 0.0], 0.5),
    ([0.99, 1.5], 0.5),
    ([None, None], None),
    ([0.0], 0.0),
]


@pytest.mark.parametrize(("values", "expected"), RATES)
def test_pass_rate(values: list, expected: float | None) -> None:
    scores = [Score(rewards={"f": value, "g": 1.0}) for value in values]
    assert compute_pass_rate(scores, REWARD) == expected


def test_reward_that_decides() -> None:
    rewards = [REWARD, Reward(function="g")]
    assert find_reward(Difficulty(), rewards).function == "f"
    assert find_reward(Difficulty(reward="g"), rewards).function == "g"
    with pytest.raises(UserError, match=r'difficulty\.reward "h" is none of the stage\'s: f, g'):
        find_reward(Difficulty(reward="h"), rewards)


def test_nothing_within_the_limits_is_an_error() -> None:
    problems = [Problem(str(i), "math", [{"role": "user", "content": "?"}], "1") for i in range(4)]
    rates = {"0": 0.0, "1": 1.0, "2": 1.0, "3": None}
    context = SimpleNamespace(stage_name="grpo", facts={}, record_left=lambda *_: None)
    settings = Difficulty(min_pass_rate=0.1, max_pass_rate=0.9)
    assert choose_problems(problems, rates, settings) == []
    with pytest.raises(UserError, match=r"from 0\.1 to 0\.9 \(1 below, 2 above\)"):
        check_choice(context, settings, rates, 0)
    assert len(choose_problems(problems, rates, Difficulty())) == 3
