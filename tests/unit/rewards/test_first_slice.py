"""The reward contract: signatures, None, strings and messages."""

import pickle
import subprocess
import sys

import pytest

import rewards


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("$1,234$", "1234", True),
        ("\\frac{3}{4}", "0.75", True),
        ("−5", "-5", True),
        ("19", "18", False),
        ("", "18", False),
        ("18", "", None),
    ],
)
def test_grade_answer_judges_numbers(answer, gold, expected):
    assert rewards.grade_answer(answer, gold) is expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so \\boxed{3} and then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<think>\\boxed{3}</think> I do not know", None),
        ("\\boxed{3}</think> The answer is 4.", "4"),
        ("<answer> 12 </answer>", "12"),
        ("The answer is 3.5. I hope so.", "3.5"),
        ("we get 7 and 1,250", "1,250"),
        ("", None),
    ],
)
def test_extract_answer_follows_the_stated_order(completion, expected):
    assert rewards.extract_answer(completion) == expected


def test_math_correct_takes_strings_and_messages_and_ignores_other_columns():
    completions = ["\\boxed{4}", [{"role": "assistant", "content": "\\boxed{5}"}], "no"]
    scores = rewards.math_correct(
        prompts=["p"] * 3, completions=completions, completion_ids=[[1]] * 3, answer=["4"] * 3
    )
    assert scores == [1.0, 0.0, 0.0]
    assert rewards.math_correct(completions=["\\boxed{4}"], answer=[None]) == [None]


def test_math_correct_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="2 completions but 1 gold"):
        rewards.math_correct(completions=["1", "2"], answer=["1"])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think>b", 1.0),
        ("a</think>b", 1.0),  # the prompt ended with <think>
        ("<think>a</think>", 0.0),
        ("<think> </think>b", 0.0),
        ("x<think>a</think>b", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("b", 0.0),
    ],
)
def test_format(completion, expected):
    assert rewards.format(completions=[completion], prompts=["p"]) == [expected]


def test_rewards_pickle_and_import_nothing_heavy():
    assert pickle.loads(pickle.dumps(rewards.math_correct)) is rewards.math_correct
    heavy = "{'torch', 'vllm', 'r1pipe', 'sympy', 'math_verify', 'mpmath', 'numpy'}"
    code = f"import rewards, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
