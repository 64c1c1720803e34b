"""reasoning-gym's tasks: its own golds score 1, others do not, and none runs as a program."""

import json

import pytest

import rewards
from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from rewards.sandbox.inside.gym_scorer import is_plain
from rewards.tasks.reasoning_gym import find_tagged_answer

factory = pytest.importorskip("reasoning_gym.factory")

WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks that many answers solve: they give none."""


def load(task: str, split: str = "train", **options: object) -> list[Problem]:
    options = {"size": 1, "task": task, **options}
    return load_problems(ProblemSet(recipe="reasoning_gym", split=split, options=options))


def score(problems: list[Problem], answers: list[str]) -> list[float | None]:
    completions = [f"<think>Hm.</think>\n<answer>{answer}</answer>" for answer in answers]
    tests = [json.dumps(problem.tests) for problem in problems]
    return rewards.reasoning_gym_score(completions=completions, tests=tests)


@pytest.mark.slow
def test_every_task_s_gold_scores_1() -> None:
    tasks = sorted(set(factory.DATASETS) - {"composite"})
    assert len(tasks) > 100
    problems = [problem for task in tasks for problem in load(task)]
    without = {problem.tests["task"] for problem in problems if problem.answer is None}
    assert without == WITHOUT_GOLD
    golds = [problem for problem in problems if problem.answer is not None]
    scores = score(golds, [problem.answer for problem in golds])
    assert {p.id: s for p, s in zip(golds, scores) if s != 1.0} == {}
    # Of game_of_life_halting whatever is not True is False.
    some = [p for p in golds if p.tests["task"] != "game_of_life_halting"][::4]
    wrong = score(some, ["no idea"] * len(some))
    assert {p.id: s for p, s in zip(some, wrong) if s is None or s >= 1.0} == {}


def test_the_last_answer_of_an_episode_counts() -> None:
    """Of several turns with tools, as messages and as their joined text."""
    (problem,) = load("chain_sum")
    asks = "<think>Is <answer>1</answer> right?</think>\n<tool_call>{}</tool_call>"
    says = f"<think>So not <answer>1</answer>.</think>\n<answer>{problem.answer}</answer>"
    tool = {"role": "tool", "content": "<answer>1</answer>"}
    messages = [{"role": "assistant", "content": asks}, tool]
    messages.append({"role": "assistant", "content": says})
    completions = [messages, f"{asks}\n\n{says}", asks, f"{says}\n\n{asks}"]
    got = rewards.reasoning_gym_score(completions=completions, tests=[problem.tests] * 4)
    assert got[:3] == [1.0, 1.0, 0.0]


def test_several_answers_may_be_right() -> None:
    (problem,) = load("countdown", seed=5)
    reversed_sum = f"0 + ({problem.answer})"  # another number is used
    assert score([problem, problem], [f"({problem.answer})", reversed_sum]) == [1.0, 0.05]


# task, answer that its eval would run
PROGRAMS = [
    ("n_queens", "[__import__('os').getcwd()]"),
    ("spiral_matrix", "().__class__.__base__.__subclasses__()"),
    ("string_insertion", "[c for c in 'abc']"),
    ("binary_matrix", "(lambda: 1)()"),
    ("countdown", "__import__('os').system('true')"),
    ("countdown", "exec"),
    ("puzzle24", "print(24)"),
    ("simple_integration", "x.__class__"),
    ("intermediate_integration", "x . diff"),
    ("polynomial_multiplication", "'x'"),
    ("countdown", "1" * 30_000),
]
# task, answer that is one
ANSWERS = [
    ("n_queens", "_ _ Q _\nQ _ _ _"),
    ("spiral_matrix", "[1, -2, 3]"),
    ("string_insertion", "['A', 'B']"),
    ("string_insertion", "EACADDD"),
    ("binary_matrix", "[[0, 1], [1, 0]]"),
    ("countdown", "(3 + 4.5)*2/1"),
    ("simple_integration", "-34*x**8/15 - 5*sin(x)/4 + C"),
    ("spell_backward", "__import__"),
]


@pytest.mark.parametrize(("task", "answer"), PROGRAMS)
def test_program_is_no_answer(task: str, answer: str) -> None:
    assert not is_plain(task, answer)


@pytest.mark.parametrize(("task", "answer"), ANSWERS)
def test_answer_is_no_program(task: str, answer: str) -> None:
    assert is_plain(task, answer)


def test_endless_answers_are_stopped() -> None:
    (problem,) = load("countdown")
    rewards.configure_workers(limit_s=2)
    try:
        assert score([problem, problem], ["9**9**9**9**9", problem.answer]) == [0.0, 1.0]
    finally:
        rewards.configure_workers(limit_s=5)


# completion, its answer
COMPLETIONS = [
    ("<think><answer>1</answer></think><answer>\n2\n3\n</answer>", "2\n3"),
    ("<think>a</think><answer>1</answer> no, <answer>2</answer>", "2"),
    ("<think>a</think><answer>2", "2"),
    ("<think>a</think>\\boxed{2}", "2"),
    ("<think>a</think>2", None),
    ("<think><answer>1</answer>", None),
    ("<answer></answer>", None),
]


@pytest.mark.parametrize(("completion", "expected"), COMPLETIONS)
def test_where_the_answer_is(completion: str, expected: str | None) -> None:
    assert find_tagged_answer(completion) == expected


@pytest.mark.parametrize("tests", [None, "", "no JSON", {"task": "gcd"}, [1]])
def test_unusable_tests_are_not_judged(tests: object) -> None:
    completions = ["<answer>1</answer>"]
    assert rewards.reasoning_gym_score(completions=completions, tests=[tests]) == [None]


def test_recipe_s_splits_and_errors() -> None:
    def questions(split: str) -> set[str]:
        problems = load("basic_arithmetic", split, size=200, config={"min_terms": 4})
        return {problem.question for problem in problems}

    assert not questions("train") & questions("test")
    assert questions("train") == questions("train")
    with pytest.raises(UserError, match='no task "sudokku"; did you mean sudoku'):
        load("sudokku")
    with pytest.raises(UserError, match=r"options\.config of gcd: .*min_numers"):
        load("gcd", config={"min_numers": 1})
