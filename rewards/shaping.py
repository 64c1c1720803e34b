"""Rewards for how a completion is written, not for whether it is right.

Each takes its settings as keyword arguments with defaults, so that it works by its dotted name
(``trl grpo --reward_funcs rewards.format``) and, with ``functools.partial``, in other settings.
All are bounded; their weights against correctness are the trainer's to choose.
"""

import math
import re
from collections.abc import Sequence

from rewards.math.verify import judge_math
from rewards.text.completions import (
    Completion,
    completion_text,
    split_thinking,
    strip_special_tokens,
)
from rewards.text.languages import language_share

_THINK_TAG = re.compile(r"<\s*/?\s*think\s*/?\s*>", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"</?answer>")  # an empty pair is no answer
_VISIBLE = re.compile(r"[^\s\x00-\x1f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+|[^\w\s]")


def format(completions: Sequence[Completion], **kwargs: object) -> list[float]:
    """Return 1.0 for exactly one ``<think>...</think>`` followed by an answer, else 0.0.

    The thinking comes first (white space may precede it), is not blank, and is followed by text
    that is not blank. The opening tag may be missing: many chat templates end the prompt with
    ``<think>`` and samplers return only what follows, so a completion with a single ``</think>``
    and no ``<think>`` counts as having begun inside the thinking. Tags in another spelling
    (``</Think>``, ``< think >``) are errors; special tokens such as ``<|im_end|>`` are no text.

    Source: the format reward of DeepSeek-R1 (arXiv:2501.12948, section 2.2.2). Range {0, 1}.
    """
    return [float(has_one_thought(completion_text(completion))) for completion in completions]


def has_one_thought(text: str) -> bool:
    """Say whether ``text`` is one thought and then an answer, as ``format`` defines it."""
    text = strip_special_tokens(text)
    tags = list(_THINK_TAG.finditer(text))
    names = [tag.group() for tag in tags]
    if names == ["<think>", "</think>"]:
        if text[: tags[0].start()].strip():
            return False
        start = tags[0].end()
    elif names == ["</think>"]:
        start = 0
    else:
        return False
    thinking, answer = text[start : tags[-1].start()], text[tags[-1].end() :]
    return all(_VISIBLE.search(_ANSWER_TAG.sub("", part)) for part in (thinking, answer))


def soft_overlong(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    max_completion_length: int = 20_480,
    soft_punish_cache: int = 4_096,
    **kwargs: object,
) -> list[float]:
    """Punish completions near the length limit: 0 up to ``max - cache`` tokens, -1 beyond ``max``.

    In between the punishment grows linearly: ``((max - cache) - length) / cache``. Lengths are
    counted in tokens, so ``completion_ids`` is needed. The defaults are the paper's; set
    ``max_completion_length`` to the limit that completions are really sampled with.

    Source: DAPO (arXiv:2503.14476), equation 13. Range [-1, 0]. Raises ``ValueError`` without
    ``completion_ids``, or unless 0 < cache <= max.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise ValueError(
            f"soft_punish_cache must be in 1..max_completion_length ({max_completion_length}), "
            f"not {soft_punish_cache}"
        )
    free = max_completion_length - soft_punish_cache
    lengths = _count_tokens(completions, completion_ids, "soft_overlong")
    return [-min(1.0, max(0.0, (length - free) / soft_punish_cache)) for length in lengths]


def repetition(
    completions: Sequence[Completion],
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    **kwargs: object,
) -> list[float]:
    """Punish repeated n-grams: ``max_penalty`` times the share of n-grams that occurred before.

    N-grams are of words without case, of single characters in Chinese, Japanese and Korean, and
    of punctuation marks; thinking counts too. A completion shorter than one n-gram gets 0.
    Ordinary prose repeats some trigrams (5-15%); larger ``ngram_size`` leaves it unpunished.

    Source: the repetition penalty of Yeo et al. 2025 (arXiv:2502.03373, appendix C.2), given once
    per completion as in open-r1. Range [max_penalty, 0]. Raises ``ValueError`` for a positive
    penalty or an empty n-gram.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(
            "repetition needs ngram_size >= 1 and max_penalty <= 0, "
            f"not {ngram_size} and {max_penalty}"
        )
    return [
        max_penalty * measure_repetition(completion_text(completion), ngram_size)
        for completion in completions
    ]


def measure_repetition(text: str, ngram_size: int) -> float:
    """Return the share of n-grams that are repetitions of an earlier one, in [0, 1)."""
    words = _TOKEN.findall(text.casefold())
    total = len(words) - ngram_size + 1
    if total < 1:
        return 0.0
    distinct = {tuple(words[start : start + ngram_size]) for start in range(total)}
    return 1.0 - len(distinct) / total


def cosine_length(
    completions: Sequence[Completion],
    answer: Sequence[str | None],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    max_completion_length: int = 16_384,
    correct_at_start: float = 1.0,
    correct_at_limit: float = 0.5,
    wrong_at_start: float = -1.0,
    wrong_at_limit: float = -0.5,
    exceeded: float = -1.0,
    **kwargs: object,
) -> list[float | None]:
    """Reward right answers more for being short, wrong ones more for having thought longer.

    With length t in tokens and limit T, the reward moves from ``start`` (t = 0) to ``limit``
    (t = T) along half a cosine: ``limit + (start - limit) * (1 + cos(pi t / T)) / 2``. At T or
    beyond it is ``exceeded``, right or wrong: such a completion was cut off. None where
    correctness cannot be judged (see ``math_correct``, which this calls on ``answer``).

    Source: the cosine reward of Yeo et al. 2025 (arXiv:2502.03373, section 4.2), in open-r1's
    range. Range: that of the five values. Raises ``ValueError`` without ``completion_ids``.
    """
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length must be positive, not {max_completion_length}")
    lengths = _count_tokens(completions, completion_ids, "cosine_length")
    scores = [verdict.score for verdict in judge_math(completions, answer)]
    ends = {1.0: (correct_at_start, correct_at_limit), 0.0: (wrong_at_start, wrong_at_limit)}
    rewards: list[float | None] = []
    for score, length in zip(scores, lengths, strict=True):
        if score is None:
            rewards.append(None)
        elif length >= max_completion_length:
            rewards.append(exceeded)
        else:
            start, limit = ends[score]
            share = (1 + math.cos(math.pi * length / max_completion_length)) / 2
            rewards.append(limit + (start - limit) * share)
    return rewards


def language_consistency(
    completions: Sequence[Completion], language: str | Sequence[str] = "en", **kwargs: object
) -> list[float]:
    """Return the share of the reasoning's words that are in the target language.

    ``language`` is a code (``en``, ``zh``, others of ``rewards.text.languages.LANGUAGES``) for
    all rows, or a dataset column with one for each. The reasoning is what ``<think>`` holds, or
    the whole completion if nothing is marked as thinking. Formulas, code, numbers and single
    letters are no words; two Han characters count as one. Without any words the share is 0.0:
    silence is not consistent.

    Source: the language consistency reward of DeepSeek-R1 (arXiv:2501.12948, section 2.3.2):
    "the proportion of target language words in the CoT". Range [0, 1]. Raises ``ValueError``
    naming the row for a language it does not know or a column of another length.
    """
    targets = [language] * len(completions) if isinstance(language, str) else list(language)
    if len(targets) != len(completions):
        raise ValueError(f"{len(completions)} completions but {len(targets)} languages")
    shares = []
    for row, (completion, target) in enumerate(zip(completions, targets, strict=True)):
        thinking, rest = split_thinking(completion_text(completion))
        try:
            shares.append(language_share(thinking if thinking.strip() else rest, target))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
    return shares


def _count_tokens(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None, name: str
) -> list[int]:
    if completion_ids is None:
        raise ValueError(f"{name} counts tokens: it needs completion_ids")
    if len(completion_ids) != len(completions):
        raise ValueError(f"{len(completions)} completions but {len(completion_ids)} completion_ids")
    return [len(ids) for ids in completion_ids]
