"""The options of `rewards.judge`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rewards.judges.endpoint import check_url

NUMBERS = (
    "samples", "max_completion_tokens", "max_concurrency", "max_requests", "max_cost",
    "min_agreement", "tolerance", "temperature", "max_retries", "timeout_s",
)  # fmt: skip


class JudgeError(Exception):
    """Settings that cannot work, or a server that does not answer, in one line."""


class JudgeBudgetError(JudgeError):
    """The budget is used up. What was answered is kept."""


@dataclass(frozen=True)
class JudgeSettings:
    """The options of `judge`. Raises JudgeError."""

    base_url: str
    model: str
    rubric: str
    """A text, or the path of a .md or .txt file."""
    scale: Sequence[float] = (0, 10)
    """Lowest and highest grade; the reward is 0 for the one and 1 for the other."""
    api_key_env: str | None = None
    samples: int = 1
    """Requests for each answer; their mean counts."""
    tolerance: float | None = None
    """Grades of two samples further apart are doubt. Default: a fifth of the scale."""
    temperature: float | None = 0.0
    """None: the server's own."""
    max_completion_tokens: int = 2048
    only_without_gold: bool = False
    """Leave rows that have an `answer` or `tests` to the rules (None)."""
    max_requests: int | None = None
    max_cost: float | None = None
    """In the currency of the prices; never exceeded. Both hold for the `account`."""
    price_per_million: Mapping[str, float] | None = None
    """`input` and `output`: prices of a million tokens."""
    labelled: str | None = None
    """JSONL of graded rows: prompt, completion, score."""
    min_agreement: float | None = None
    """Least Spearman correlation with the labelled rows."""
    cache: str = "judge.sqlite"
    account: str = ""
    """Under which requests are booked in the file."""
    max_concurrency: int = 32
    max_retries: int = 8
    timeout_s: float = 600.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problem := self._find_problem():
            raise JudgeError(problem)

    def _find_problem(self) -> str:
        try:
            check_url(self.base_url)
        except ValueError as error:
            return f"base_url: {error}"
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            return f"scale: give the lowest and the highest grade, not {list(self.scale)}"
        if self.samples > 1 and self.temperature == 0:
            return "samples: they are all alike at temperature 0; set a temperature, such as 1"
        values = {name: getattr(self, name) for name in NUMBERS}
        if odd := [name for name in values if not isinstance(values[name], int | float | None)]:
            return f"{odd[0]}: {values[odd[0]]!r} is no number"
        counts = ("samples", "max_completion_tokens", "max_concurrency")
        if low := [name for name in counts if getattr(self, name) < 1]:
            return f"{low[0]}: give 1 or more"
        prices = self.price_per_million
        if prices is not None and set(prices) != {"input", "output"}:
            return "price_per_million: give input and output"
        if self.max_cost is not None and prices is None:
            return "max_cost: needs price_per_million, to know what a request costs"
        if self.min_agreement is not None and self.labelled is None:
            return "min_agreement: needs labelled, rows that people have graded"
        return ""

    @property
    def identity(self) -> str:
        """What the grade of an answer depends on, besides the answer."""
        parts = (self.model, self.temperature, self.max_completion_tokens, self.extra_body)
        return json.dumps([*parts, list(self.scale)], sort_keys=True)

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        prices = self.price_per_million or {"input": 0.0, "output": 0.0}
        return (prompt_tokens * prices["input"] + completion_tokens * prices["output"]) / 1e6


OPTIONS = tuple(option.name for option in fields(JudgeSettings))

LIMITS = (
    "base_url", "api_key_env", "max_requests", "max_cost", "price_per_million", "labelled",
    "min_agreement", "cache", "account", "max_concurrency", "max_retries", "timeout_s",
)  # fmt: skip
"""Options that change no grade: a run may be resumed with others."""
