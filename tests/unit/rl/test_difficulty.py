"""Pass rates, and the problems that are chosen by them."""

from types import SimpleNamespace

import pytest
from grpo_settings import make_grpo

from r1pipe.config.rl import Difficulty
from r1pipe.rl.curriculum import choose_problems, compute_pass_rate, find_passing
from r1pipe.rl.difficulty import check_choice
from r1pipe.types import Problem, Score
from r1pipe.utils.errors import UserError

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
    assert compute_pass_rate(scores, "f") == expected


def test_reward_that_decides() -> None:
    functions: dict = {"rewards": [{"function": "f"}, {"function": "g"}]}
    stage = make_grpo(**functions)
    assert find_passing(Difficulty(), stage) == "f"
    assert find_passing(Difficulty(reward="g"), stage) == "g"
    for wrong in ("h", "environment"):
        with pytest.raises(UserError, match=f'reward "{wrong}" is none of the stage\'s: f, g$'):
            find_passing(Difficulty(reward=wrong), stage)
    environment = {"environment": {"name": "x.Y"}}
    assert find_passing(Difficulty(), make_grpo(**functions, **environment)) == "f"
    settings = Difficulty(reward="environment")
    assert find_passing(settings, make_grpo(**functions, **environment)) == "environment"
    assert find_passing(Difficulty(), make_grpo(rewards=[], **environment)) == "environment"


def test_nothing_within_the_limits_is_an_error() -> None:
    problems = [Problem(str(i), "math", [{"role": "user", "content": "?"}], "1") for i in range(4)]
    rates = {"0": 0.0, "1": 1.0, "2": 1.0, "3": None}
    context = SimpleNamespace(stage_name="grpo", facts={}, record_left=lambda *_: None)
    settings = Difficulty(min_pass_rate=0.1, max_pass_rate=0.9)
    assert choose_problems(problems, rates, settings) == []
    with pytest.raises(UserError, match=r"from 0\.1 to 0\.9 \(1 below, 2 above\)"):
        check_choice(context, settings, rates, 0)
    assert len(choose_problems(problems, rates, Difficulty())) == 3
