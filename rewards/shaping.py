"""Rewards for how a completion is written, not for whether it is right. All are bounded."""

import re
from collections.abc import Sequence

from rewards.completions import Completion, completion_text, split_thinking

_THINK_TAG = re.compile(r"</?think>")


def format(completions: Sequence[Completion], **kwargs) -> list[float]:
    """Return 1.0 for exactly one ``<think>...</think>`` followed by an answer, else 0.0.

    The thinking comes first (white space may precede it), is not blank, and is followed by text
    that is not blank. The opening tag may be missing: many chat templates end the prompt with
    ``<think>`` and samplers return only what follows, so a completion with a single ``</think>``
    and no ``<think>`` counts as having begun inside the thinking.

    Source: the format reward of DeepSeek-R1 (arXiv:2501.12948, section 2.2.2). Range {0, 1}.
    """
    return [float(has_one_thought(completion_text(completion))) for completion in completions]


def has_one_thought(text: str) -> bool:
    """Say whether ``text`` is one thought and then an answer, as ``format`` defines it."""
    tags = [match.group() for match in _THINK_TAG.finditer(text)]
    if tags == ["<think>", "</think>"]:
        if not text.lstrip().startswith("<think>"):
            return False
    elif tags != ["</think>"]:
        return False
    thinking, answer = split_thinking(text)
    return bool(thinking.strip()) and bool(answer.strip())
