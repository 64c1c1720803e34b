"""Filters of traces: what makes one flawed, and which of several correct ones to keep."""

import re

from r1pipe.config.sft import TraceFilters
from r1pipe.types import Rollout
from rewards import format as check_format
from rewards.text.completions import split_thinking
from rewards.text.languages import LANGUAGES, language_share

FLAWS = ("no_format", "mixed_language", "long_paragraph", "code_block")
"""What `find_flaw` finds."""
SHINGLE = 3
"""Words in a row that two traces are compared by."""


def find_flaw(completion: str, filters: TraceFilters) -> str | None:
    """Which filter a trace fails, most by its chain of thought (all of it if nothing is marked as
    thinking)."""
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
    """Whether too few of the words are in the one language. A text without words is not mixed."""
    shares = {language: language_share(text, language) for language in LANGUAGES}
    most = max(shares.values())
    share = most if filters.language is None else shares[filters.language]
    return most > 0 and share < filters.min_language_share


def choose_first(rollouts: list[Rollout], count: int) -> list[Rollout]:
    return rollouts[:count]


def choose_diverse(rollouts: list[Rollout], count: int) -> list[Rollout]:
    """The first, then again and again the one that is least like those chosen already: farthest
    point first, by the overlap (Jaccard) of their runs of words."""
    shingles = [list_shingles(rollout.completion) for rollout in rollouts]
    nearest = [0.0] * len(rollouts)
    chosen: list[int] = []
    while len(chosen) < min(count, len(rollouts)):
        rest = [i for i in range(len(rollouts)) if i not in chosen]
        new = min(rest, key=nearest.__getitem__)  # the first, and shorter, of equals
        chosen.append(new)
        for i in rest:
            both = len(shingles[i] & shingles[new])
            either = len(shingles[i] | shingles[new])
            nearest[i] = max(nearest[i], both / either if either else 1.0)
    return [rollouts[i] for i in chosen]


def list_shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
