"""Shaping rewards, against numbers worked out by hand."""

import functools
import math
import pickle

import pytest

import rewards
from rewards.text.languages import LANGUAGES


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think>b", 1.0),
        (" \n<think>a</think>\nb", 1.0),
        ("a</think>b", 1.0),  # the prompt ended with <think>
        ("<think>a</think>", 0.0),
        ("<think>a</think>  ", 0.0),
        ("<think> </think>b", 0.0),
        ("</think>b", 0.0),
        ("x<think>a</think>b", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think>a</think>b<think>c</think>d", 0.0),
        ("</think>a<think>b", 0.0),
        ("<think>a", 0.0),
        # other spellings of the tags are errors, special tokens and invisible characters no text
        ("<think>a</think>b</think >", 0.0),
        ("<think>a</think>b< /Think>", 0.0),
        ("a</think>\n<|eot_id|>", 0.0),
        ("<think><|im_end|></think>b", 0.0),
        ("<think>a</think>\u200b", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<|im_start|><think>a</think>b</s>", 1.0),
        ("b", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, expected):
    assert rewards.format(completions=[completion]) == [expected]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0), (60, 0), (61, -0.025), (80, -0.5), (100, -1), (101, -1), (999, -1)],
)
def test_soft_overlong_follows_dapo(length, expected):
    (reward,) = rewards.soft_overlong(
        completions=[""],
        completion_ids=[[0] * length],
        max_completion_length=100,
        soft_punish_cache=40,
    )
    assert reward == pytest.approx(expected)


def test_soft_overlong_needs_tokens_and_sound_limits():
    with pytest.raises(ValueError, match="completion_ids"):
        rewards.soft_overlong(completions=["a"])
    with pytest.raises(ValueError, match="soft_punish_cache"):
        rewards.soft_overlong(
            completions=["a"], completion_ids=[[1]], max_completion_length=10, soft_punish_cache=11
        )
    with pytest.raises(ValueError, match="2 completions but 1 completion_ids"):
        rewards.soft_overlong(completions=["a", "b"], completion_ids=[[1]])


def test_settings_can_be_bound_and_pickled():
    short = functools.partial(rewards.soft_overlong, max_completion_length=10, soft_punish_cache=5)
    short = pickle.loads(pickle.dumps(short))
    assert short(completions=["", ""], completion_ids=[[1] * 10, [1]]) == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e", 0.0),
        ("a b a b a b", -2 / 4),  # aba bab aba bab
        ("a a a a a", -2 / 3),
        ("A a, A a,", -1 / 4),  # a a , a a ,
        ("a b", 0.0),
        ("", 0.0),
        ("重复重复重复", -2 / 4),
    ],
)
def test_repetition_is_the_share_of_repeated_trigrams(text, expected):
    assert rewards.repetition(completions=[text]) == [pytest.approx(expected)]


def test_repetition_checks_its_settings():
    with pytest.raises(ValueError, match="max_penalty <= 0"):
        rewards.repetition(completions=["a"], max_penalty=1.0)
    with pytest.raises(ValueError, match="ngram_size >= 1"):
        rewards.repetition(completions=["a"], ngram_size=0)


def test_cosine_length_by_hand():
    def reward(answer, length):
        return rewards.cosine_length(
            completions=[f"\\boxed{{{answer}}}"],
            answer=["4"],
            completion_ids=[[0] * length],
            max_completion_length=100,
        )[0]

    assert reward("4", 0) == pytest.approx(1.0)
    assert reward("4", 50) == pytest.approx(0.75)
    assert reward("4", 25) == pytest.approx(0.5 + 0.5 * (1 + math.sqrt(0.5)) / 2)
    assert reward("5", 0) == pytest.approx(-1.0)
    assert reward("5", 50) == pytest.approx(-0.75)
    assert reward("4", 100) == -1.0
    assert reward("5", 100) == -1.0


def test_cosine_length_does_not_judge_without_a_gold():
    assert rewards.cosine_length(["\\boxed{4}"], [None], completion_ids=[[1]]) == [None]


ENGLISH = "Okay, let me think. We have $x + 1 = 2$, so the value of x is 1."
CHINESE = "首先，我们设 $x = 1$，然后代入方程。所以答案是一。"
FRENCH = "D'abord, nous avons une équation, et la somme est donc égale à 3."
GERMAN = "Zuerst haben wir die Gleichung, und das Ergebnis ist also nicht 3."
RUSSIAN = "Сначала решим уравнение, тогда ответ равен трём."
JAPANESE = "まず、方程式を解きます。答えは三です。"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        (FRENCH, "fr"),
        (GERMAN, "de"),
        (RUSSIAN, "ru"),
        (JAPANESE, "ja"),
    ],
)
def test_language_consistency_of_one_language_is_one(text, language):
    for target in LANGUAGES:
        (share,) = rewards.language_consistency([f"<think>{text}</think>ok"], target)
        assert share == (1.0 if target == language else pytest.approx(0.0, abs=0.35))


def test_language_consistency_of_a_mixture_is_its_share():
    text = "one two three four\n一二三四"  # four words, and four characters that make two
    assert rewards.language_consistency([text], "en") == [pytest.approx(4 / 6)]
    assert rewards.language_consistency([text], "zh") == [pytest.approx(2 / 6)]


def test_language_consistency_looks_at_the_reasoning_only():
    completion = f"<think>{ENGLISH}</think>{CHINESE}"
    assert rewards.language_consistency([completion], "en") == [1.0]


def test_language_consistency_gives_nothing_for_silence():
    texts = [
        "",
        "<think></think>",
        "<think>$x=1$ 2 + 2 = 4</think>",
        "<think>```\ncode\n```</think>",
    ]
    assert rewards.language_consistency(texts, "en") == [0.0] * 4


def test_language_consistency_takes_a_column_and_names_a_bad_row():
    assert rewards.language_consistency([ENGLISH, CHINESE], ["en", "zh"]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="row 1: unknown language 'xx'"):
        rewards.language_consistency([ENGLISH, CHINESE], ["en", "xx"])
    with pytest.raises(ValueError, match="2 completions but 1 languages"):
        rewards.language_consistency([ENGLISH, CHINESE], ["en"])
