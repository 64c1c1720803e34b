"""The contract that trainers rely on: signatures, None, messages, pickling, cheap import."""

import inspect
import pickle
import subprocess
import sys

import pytest

import rewards

REWARDS = [
    rewards.code_passes,
    rewards.cosine_length,
    rewards.format,
    rewards.language_consistency,
    rewards.math_correct,
    rewards.repetition,
    rewards.soft_overlong,
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_rewards_are_called_by_keyword_and_ignore_what_they_do_not_know(reward):
    completions = ["<think>We add.</think>\\boxed{4}", [{"role": "assistant", "content": "5"}]]
    scores = reward(
        prompts=["2+2"] * 2,
        completions=completions,
        completion_ids=[[1, 2], [3]],
        answer=["4", "4"],
        tests=[{"inputs": [""], "outputs": ["4"]}, None],
        trainer_state=object(),
        unknown_column=[None, None],
    )
    assert len(scores) == 2
    assert all(score is None or isinstance(score, float) for score in scores)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_rewards_are_documented_picklable_and_found_by_their_dotted_name(reward):
    assert pickle.loads(pickle.dumps(reward)) is reward
    assert getattr(rewards, reward.__name__) is reward
    assert reward.__name__ in rewards.__all__
    assert inspect.getdoc(reward)


def test_math_correct_scores_right_wrong_and_unjudgeable():
    completions = ["\\boxed{4}", "\\boxed{5}", "I do not know", "\\boxed{4}", "\\boxed{4}"]
    golds = ["4", "4", "4", None, " "]
    assert rewards.math_correct(completions=completions, answer=golds) == [
        1.0,
        0.0,
        0.0,
        None,
        None,
    ]


def test_numeric_gold_columns_are_taken_as_text():
    assert rewards.math_correct(completions=["\\boxed{4}", "\\boxed{0.5}"], answer=[4, 0.5]) == [
        1,
        1,
    ]


def test_only_the_assistants_messages_count():
    messages = [
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "\\boxed{4}"},
        {"role": "assistant", "content": [{"type": "text", "text": "\\boxed{5}"}]},
    ]
    assert rewards.math_correct(completions=[messages, messages], answer=["4", "5"]) == [0.0, 1.0]


def test_errors_name_the_row():
    with pytest.raises(ValueError, match="2 completions but 1 gold"):
        rewards.math_correct(completions=["1", "2"], answer=["1"])
    with pytest.raises(TypeError, match="row 1: a gold answer is a string, not list"):
        rewards.math_correct(completions=["1", "2"], answer=["1", ["2"]])
    with pytest.raises(TypeError, match="row 1: a completion is a string or a message list"):
        rewards.math_correct(completions=["1", 2], answer=["1", "2"])
    with pytest.raises(TypeError, match="gold must be a string"):
        rewards.grade_answer("1", 1)


def test_verdicts_are_counted_by_status():
    completions = ["\\boxed{1}", "\\boxed{2}", "nothing", "\\boxed{1}"]
    verdicts = rewards.judge_math(completions, ["1", "1", "1", ""])
    assert [v.status for v in verdicts] == ["right", "wrong", "unparseable", "bad_gold"]
    assert [v.answer for v in verdicts] == ["1", "2", None, "1"]
    counts = rewards.count_verdicts(verdicts)
    assert (counts["right"], counts["wrong"], counts["unparseable"]) == (1, 1, 1)
    assert (counts["timed_out"], counts["bad_gold"], counts["failed"]) == (0, 1, 0)


def test_importing_is_cheap_and_pulls_in_nothing_heavy():
    """In calls of functions, which no other process changes: 320,000, most of them for regular
    expressions."""
    heavy = "{'torch', 'vllm', 'r1pipe', 'sympy', 'math_verify', 'mpmath', 'numpy', 'trl'}"
    code = (
        "import itertools, sys; calls = itertools.count(); "
        "sys.setprofile(lambda *_: next(calls)); import rewards; sys.setprofile(None); "
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules); "
        "print(next(calls))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert int(done.stdout) < 1_000_000


def test_judging_one_batch_judges_each_pair_once(monkeypatch):
    judged = []

    def judge_and_note(pairs):
        judged.extend(pairs)
        return rewards.judge_pairs(pairs)

    monkeypatch.setattr("rewards.math.verify.judge_pairs", judge_and_note)
    completions = ["\\boxed{(x+1)^2}"] * 2_000
    assert set(rewards.math_correct(completions=completions, answer=["x^2+2x+1"] * 2_000)) == {1.0}
    assert judged == [("(x+1)^2", "x^2+2x+1")]
