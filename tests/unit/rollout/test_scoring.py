"""Rewards are called by TRL's contract, weighted, and counted where they cannot judge."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from r1pipe.config.base import Reward
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.scoring import Scorer, ScoringThread, reward_metrics
from r1pipe.sft.rejection import find_rejection
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils.errors import UserError

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


# What users write; each function is called with three rollouts.
MINE = """
import asyncio, functools, math, threading, time
import numpy, torch
def flat(completions, **columns): return 1.0
def nothing(completions, **columns): return None
def words(completions, **columns): return ["1.0", 1.0, None]
def few(completions, **columns): return [1.0]
def leaves(completions, **columns): raise SystemExit(7)
def fails(completions, **columns): raise RuntimeError("judge\\nis down")
def messages(completions, **columns): return [len(c[0]["content"]) for c in completions]
def wants_more(completions, rubric, **columns): return [1.0] * 3
async def fails_later(completions, **columns): return [1 / 0 for _ in completions]
def too_much(completions, log_extra, **columns): log_extra("note", ["a"]); return [1.0] * 3
def as_numpy(completions, **columns): return numpy.array([0, 0.5, 1], dtype=numpy.float32)
def as_tensor(completions, **columns): return torch.tensor([0, 0.5, 1])
def as_scalars(completions, **columns): return [torch.tensor(0), numpy.float64(0.5), True]
def unlike_trl(completions): return [0, 0.5, 1]
async def later(completions, id, **columns):
    await asyncio.sleep(0)
    return [int(i) / 2 for i in id]
class Judge:
    def __call__(self, completions, source, **columns): return [0, 0.5, float(source[0] == "set")]
judge, bound = Judge(), functools.partial(Judge(), source=["set"])
def by_column(category, kind, solution, **columns):
    assert (category[0], kind[0], solution[0], columns["source"][0]) == ("sum", "math", "s", "set")
    return [0, 0.5, 1]
def endless(completions, **columns):
    return [float("inf")] * len(completions)


def by_step(trainer_state, completions, **columns):
    return [0, 0.5, float((trainer_state.global_step, trainer_state.max_steps) == (3, 8))]
def vandal(prompts, completion_ids, **columns):
    for part in (*prompts, *completion_ids): part.clear()
    return [0, 0.5, 1]
def logs(completions, log_extra, log_metric, **columns):
    log_extra("note", ["a", None, numpy.float32(2)])
    log_metric("judge/seconds", numpy.float32(0.5))
    log_metric("judge/seconds", 1.5)
    return [0, 0.5, 1]
arrived, lock = [], threading.Lock()
async def meets_others(completions, id, **columns):
    arrived.append(id)
    for _ in range(3000):
        if len(arrived) == 3: return [float(i) for i in id]
        await asyncio.sleep(0.01)
    raise TimeoutError("nobody else came")
def alone(completions, **columns):
    is_alone = lock.acquire(blocking=False)
    time.sleep(0.02)
    if is_alone: lock.release()
    return [float(is_alone)] * len(completions)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("broken.py").write_text("import json\ndef f(completions, **columns)\n    return [1.0]\n")
    Path("needy.py").write_text("import nowhere_at_all\n")
    Path("script.py").write_text("import sys\nsys.exit(3)\n")
    yield
    for name in ("mine", "broken", "needy", "script"):
        sys.modules.pop(name, None)


def call(
    name: str, options: dict | None = None, **settings: object
) -> tuple[list[Score], list[Rollout]]:
    rows = {"answer": "1", "solution": "s", "category": "sum", "source": "set"}
    problems = [Problem(str(i), "math", [dict(PROMPT[0])], **rows) for i in range(3)]
    rollouts = [make_rollout("x") for _ in problems]
    scorer = Scorer([Reward(function=name, options=options or {}, **settings)])
    scores = scorer.score(problems, rollouts, {"global_step": 3, "max_steps": 8})
    assert all(problem.prompt == PROMPT for problem in problems)
    return scores, rollouts


GOOD_REWARDS = (
    "as_numpy", "as_tensor", "as_scalars", "unlike_trl", "later", "judge", "bound", "by_column",
    "by_step", "vandal", "logs",
)  # fmt: skip


@pytest.mark.parametrize("name", GOOD_REWARDS)
def test_whatever_trl_takes_is_a_reward(name: str, mine: None) -> None:
    scores, rollouts = call(f"mine.{name}")
    assert [score.total for score in scores] == [0.0, 0.5, 1.0]
    assert all(type(score.total) is float for score in scores)
    assert [r.completion_ids for r in rollouts] == [[2]] * 3


def test_completions_as_messages(mine: None) -> None:
    scores, _ = call("mine.messages", conversational=True)
    assert [score.total for score in scores] == [1.0] * 3
    plain = Reward(function="mine.messages").model_dump()
    assert "conversational" not in plain  # the settings of finished runs stay what they were


def test_what_rewards_log(mine: None) -> None:
    scores, _ = call("mine.logs")
    assert [score.extra for score in scores] == [{"note": "a"}, {"note": None}, {"note": 2.0}]
    assert reward_metrics(scores)["judge/seconds"] == 1.0
    json.dumps([asdict(score) for score in scores])


def test_one_function_twice_is_two_rewards() -> None:
    rewards = [
        Reward(function="rewards.repetition", options={"ngram_size": 2}),
        Reward(function="rewards.repetition", weight=5.0, options={"ngram_size": 1}),
    ]
    (both,) = score(rewards, ["a b a c"], ["1"])
    first, second = (score([reward], ["a b a c"], ["1"])[0].total for reward in rewards)
    assert first != second / 5
    assert both.rewards == {"rewards.repetition": first, "rewards.repetition#2": second / 5}
    assert both.total == pytest.approx(first + second)
    assert "rewards/rewards.repetition#2/mean" in reward_metrics([both])


# (name, options, words of the error)
BAD_REWARDS = [
    ("rewards.math_corect", {}, "did you mean rewards.math_correct"),
    ("math_correct", {}, "dotted name.*such as rewards.math_correct"),
    ("nowhere.at.all", {}, 'no module "nowhere", installed or in /'),
    ("rewards.format", {"strictly": True}, "strictly"),
    ("rewards.repetition", {"ngram": 1}, "did you mean ngram_size"),
    ("mine.py", {}, "such as mine.FUNCTION"),
    ("./mine.py", {}, "such as mine.FUNCTION"),
    ("/a/b/mine.py:flat", {}, "such as mine.flat"),
    ("..mine.flat", {}, "dotted name"),
    ("mine.flot", {}, "did you mean mine.flat"),
    ("broken.f", {}, r"SyntaxError: expected ':' \(.*broken.py:2\)"),
    ("needy.f", {}, r"No module named 'nowhere_at_all' \(.*needy.py:1\)"),
    ("script.f", {}, r"SystemExit: 3 \(.*script.py:2\)"),
    ("mine.flat", {}, "returned one value, 1.0"),
    ("mine.endless", {}, "returned inf as a value"),
    ("mine.nothing", {}, "returned None"),
    ("mine.words", {}, "'1.0' as a value"),
    ("mine.few", {}, "1 values for 3 completions"),
    ("mine.Judge", {}, "returned one value"),
    ("mine.leaves", {}, r"raised SystemExit: 7 \(.*mine.py:\d+\)"),
    ("mine.fails", {}, r"raised RuntimeError: judge is down \(.*mine.py:\d+\)"),
    ("mine.messages", {}, "completions are strings"),
    ("mine.wants_more", {}, "a reward is given prompts, .* category"),
    ("mine.fails_later", {}, "raised ZeroDivisionError"),
    ("mine.too_much", {}, "1 values for 3 completions"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD_REWARDS)
def test_bad_reward_is_named(name: str, options: dict, words: str, mine: None) -> None:
    with pytest.raises(UserError, match=words) as error:
        call(name, options)
    assert str(error.value).startswith(f'reward "{name}"')
    assert "\n" not in str(error.value)


def test_only_complete_samples_with_full_rewards_become_traces() -> None:
    full = Score({"a": 1.0, "b": 1.0}, 2.0)
    assert find_rejection(make_rollout("x"), full) is None
    assert find_rejection(make_rollout("x", "length"), full) == "truncated"
    assert find_rejection(make_rollout(""), full) == "empty"
    assert find_rejection(make_rollout("x"), Score({"a": 1.0, "b": 0.5}, 1.5)) == "wrong"
    assert find_rejection(make_rollout("x"), Score({"a": 1.0, "b": None}, 1.0)) == "unjudged"


def test_where_nothing_trains_a_function_may_divide_by_max_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schedule.py").write_text(
        "def share_of_steps(trainer_state, completions, **columns):\n"
        "    done = trainer_state.global_step / trainer_state.max_steps\n"
        "    return [done + trainer_state.epoch] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    problem = Problem("a", "math", [{"role": "user", "content": "?"}], answer="1")
    rollout = Rollout("a", 0, [], [], [], "1", "stop")
    (score,) = Scorer([Reward(function="schedule.share_of_steps")]).score([problem], [rollout])
    assert score.total == 0.0


def test_groups_wait_for_servers_side_by_side(mine: None) -> None:
    """But functions that are not async are called by one thread at a time."""
    scorer = Scorer([Reward(function="mine.meets_others"), Reward(function="mine.alone")])
    prompts = [Problem(str(n), "math", PROMPT) for n in range(3)]

    def judge(groups: list[SampleGroup]) -> list[list[Score]]:
        (group,) = groups
        return [scorer.score([group.problem], [make_rollout("x")])]

    with ScoringThread(judge, batched=False, num_threads=scorer.num_threads) as scoring:
        for index, problem in enumerate(prompts):
            scoring.add(SampleGroup(index, problem, [0]))
    rewards = {index: scores[0].rewards for index, scores in scoring.results.items()}
    assert rewards == {n: {"mine.meets_others": n, "mine.alone": 1} for n in range(3)}
    assert Scorer([Reward(function="mine.alone")]).num_threads == 1
