"""Filters of traces: flaws, and which of several correct ones to keep."""

import re

from r1pipe.config.sft import TraceFilters
from r1pipe.types import Rollout
from rewards import format as check_format
from rewards.text.completions import split_thinking
from rewards.text.languages import LANGUAGES, language_share

FLAWS = ("no_format", "mixed_language", "long_paragraph", "code_block")
"""Results of `find_flaw`."""
SHINGLE = 3
"""Two traces are compared by their runs of so many words."""


def find_flaw(completion: str, filters: TraceFilters) -> str | None:
    """The first filter that a trace fails; None if none. All but the format are about the chain of
    thought (the whole text if no part is marked as thinking)."""
    if filters.require_format and check_format([completion]) != [1.0]:
        return "no_format"
    thinking, answer = split_thinking(completion)
    chain = thinking if thinking.strip() else answer
    if filters.min_language_share and is_mixed(chain, filters):
        return "mixed_language"
    longest = filters.max_paragraph_length
    if longest is not None and any(len(p) > longest for p in re.split(r"\n\s*\n", chain)):
        return "long_paragraph"
    if filters.drop_code_blocks and "```" in chain:
        return "code_block"
    return None


def is_mixed(text: str, filters: TraceFilters) -> bool:
    """Whether too few words are in one language. A text without words is not mixed."""
    shares = {language: language_share(text, language) for language in LANGUAGES}
    most = max(shares.values())
    share = most if filters.language is None else shares[filters.language]
    return most > 0 and share < filters.min_language_share


def choose_first(rollouts: list[Rollout], count: int) -> list[Rollout]:
    return rollouts[:count]


def choose_diverse(rollouts: list[Rollout], count: int) -> list[Rollout]:
    """Farthest-point selection: the first, then each time the one least like those chosen, by the
    Jaccard overlap of their runs of words."""
    shingles = [list_shingles(rollout.completion) for rollout in rollouts]
    nearest = [0.0] * len(rollouts)
    chosen: list[int] = []
    while len(chosen) < min(count, len(rollouts)):
        rest = [i for i in range(len(rollouts)) if i not in chosen]
        new = min(rest, key=nearest.__getitem__)  # of equals the first, which is the shortest
        chosen.append(new)
        for i in rest:
            both = len(shingles[i] & shingles[new])
            either = len(shingles[i] | shingles[new])
            nearest[i] = max(nearest[i], both / either if either else 1.0)
    return [rollouts[i] for i in chosen]


def list_shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
