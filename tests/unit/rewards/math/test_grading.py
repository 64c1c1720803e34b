"""The grader, by tables of (gold, answer): what is equal, and what only looks so."""

import pytest
from grading_tables import DIFFERENT, EQUAL, UNJUDGEABLE

from rewards.math.grading import judge_answer


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    assert judge_answer(answer, gold) == "right"


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert judge_answer(answer, gold) in ("wrong", "unparseable")


@pytest.mark.parametrize(("gold", "answer"), UNJUDGEABLE)
def test_a_gold_that_cannot_be_read_makes_no_answer_wrong(gold, answer):
    assert judge_answer(answer, gold) in ("bad_gold", "unread_gold")
