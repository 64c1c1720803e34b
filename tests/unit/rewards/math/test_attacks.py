"""Hostile answers and completions: contained, never rewarded, and the process lives on."""

import time

import pytest
from hostile import HACKING_COMPLETIONS, HOSTILE_ANSWERS

import rewards

OWN_SECONDS = 10.0
"""Processor time that this process may take, its workers' left out: they have a limit of their own.
The worst text takes 0.6 s; what is quadratic in a megabyte takes hours."""


def test_the_attack_tables_are_as_long_as_promised():
    assert len(HOSTILE_ANSWERS) >= 40


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
@pytest.mark.parametrize("gold", ["42", "x^2 + 1"])
def test_no_hostile_answer_is_rewarded(name, gold):
    start = time.process_time()
    (status,) = rewards.judge_pairs([(HOSTILE_ANSWERS[name], gold)])
    assert status in ("wrong", "unparseable", "timed_out")
    assert time.process_time() - start < OWN_SECONDS


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
def test_no_hostile_answer_is_rewarded_inside_a_box(name):
    completion = f"So the answer is \\boxed{{{HOSTILE_ANSWERS[name]}}}"
    (verdict,) = rewards.judge_math([completion], ["42"])
    # "41 = \\boxed{42" and the like, where breaking the box leaves a plain 42 behind, are honest.
    assert verdict.status in ("wrong", "unparseable", "timed_out") or verdict.answer == "42"


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
def test_a_hostile_gold_makes_no_answer_right(name):
    start = time.process_time()
    (status,) = rewards.judge_pairs([("42", HOSTILE_ANSWERS[name])])
    assert status != "right"
    assert status != "failed"
    assert time.process_time() - start < OWN_SECONDS


@pytest.mark.parametrize("name", HACKING_COMPLETIONS)
def test_no_hacking_completion_is_rewarded(name):
    (verdict,) = rewards.judge_math([HACKING_COMPLETIONS[name]], ["42"])
    assert verdict.score == 0.0
    assert verdict.status in ("wrong", "unparseable")


@pytest.mark.parametrize("name", HACKING_COMPLETIONS)
def test_shaping_stays_within_its_bounds(name):
    text = HACKING_COMPLETIONS[name]
    assert rewards.format([text])[0] in (0.0, 1.0)
    assert -1.0 <= rewards.repetition([text])[0] <= 0.0
    assert 0.0 <= rewards.language_consistency([text])[0] <= 1.0


@pytest.mark.parametrize("text", HOSTILE_ANSWERS.values(), ids=list(HOSTILE_ANSWERS))
def test_shaping_is_quick_on_hostile_texts(text):
    start = time.process_time()
    for reward in (rewards.format, rewards.repetition, rewards.language_consistency):
        reward([text])
    rewards.extract_answer(text)
    assert time.process_time() - start < OWN_SECONDS


def test_the_grader_still_works_afterwards():
    assert rewards.grade_answer("\\frac{84}{2}", "42") is True
