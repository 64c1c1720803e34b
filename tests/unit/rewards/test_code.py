"""Programs are judged by what they do: forms of tests, extraction, statuses, errors."""

import json

import pytest

import rewards

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
BAD = "```python\ndef add(a, b):\n    return a - b\n```"
HUMANEVAL = {
    "entry_point": "add",
    "prompt": 'def add(a, b):\n    """Return the sum."""\n',
    "code": "def check(candidate):\n    for n in 1, 2:\n        assert candidate(n, 1) == n + 1",
}
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(5, 5) == 10"]}
STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}


@pytest.mark.parametrize("tests", [HUMANEVAL, MBPP, json.dumps(MBPP)])
def test_functions_are_judged(tests):
    assert rewards.code_passes([ADD, BAD, "I do not know"], [tests] * 3) == [1.0, 0.0, 0.0]


def test_programs_are_judged():
    good = "```python\nprint(sum(map(int, input().split())))\n```"
    assert rewards.code_passes([good, "```python\nprint(3)\n```"], [STDIN] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("tests", [None, 5, "no JSON", "[1]", {}, {"code": "x ="}])
def test_unusable_tests_give_none(tests):
    assert rewards.code_passes([ADD], [tests]) == [None]


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="1 completions but 2 tests"):
        rewards.code_passes([ADD], [MBPP, MBPP])
