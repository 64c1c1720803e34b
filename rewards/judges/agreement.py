"""How far a judge agrees with people: on rows that they have graded."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_ROWS = 4
"""Fisher's interval divides by the root of n - 3."""


@dataclass(frozen=True)
class Agreement:
    """`correlation`: Spearman's, over the rows that the judge has graded; NaN where there are fewer
    than MIN_ROWS or all grades of one side are equal. `within`: those at most `tolerance` apart."""

    num_rows: int
    num_judged: int
    within: int
    tolerance: float
    correlation: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        share = self.within / self.num_judged if self.num_judged else math.nan
        return (
            f"{self.num_judged} of {self.num_rows} labelled rows judged: Spearman "
            f"{self.correlation:.2f} (95% {low:.2f} to {high:.2f}), {share:.0%} within "
            f"{self.tolerance:g} of the label"
        )


def compare_grades(
    labels: Sequence[float], grades: Sequence[float | None], tolerance: float
) -> Agreement:
    pairs = [(a, b) for a, b in zip(labels, grades, strict=True) if b is not None]
    within = sum(abs(a - b) <= tolerance for a, b in pairs)
    rho = correlate_ranks(pairs) if len(pairs) >= MIN_ROWS else math.nan
    return Agreement(
        len(labels), len(pairs), within, tolerance, rho, find_interval(rho, len(pairs))
    )


def correlate_ranks(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's correlation, equal values sharing their mean rank."""
    xs, ys = (rank([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) - 1) / 2
    over = sum((x - middle) * (y - middle) for x, y in zip(xs, ys, strict=True))
    under = math.prod(sum((z - middle) ** 2 for z in zs) for zs in (xs, ys))
    return over / math.sqrt(under) if under else math.nan


def rank(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in values}
    count = {value: ordered.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]


def find_interval(rho: float, count: int) -> tuple[float, float]:
    """95%, by Fisher's transformation, with the standard error that Bonett and Wright (2000) give
    for Spearman's correlation."""
    if math.isnan(rho):
        return math.nan, math.nan
    if abs(rho) >= 1 - 1e-12:
        return rho, rho
    reach = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)


def read_labelled(path: Path, low: float, high: float) -> list[dict[str, Any]]:
    """Rows of `prompt`, `completion` and `score`. Raises ValueError with the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"labelled: {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fits = low <= row["score"] <= high and {"prompt", "completion"} <= row.keys()
        except (ValueError, TypeError, KeyError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(
                f"labelled: {path}:{number}: a row is an object with prompt, completion and a "
                f"score from {low:g} to {high:g}"
            )
        rows.append(row)
    if len(rows) < MIN_ROWS:
        raise ValueError(f"labelled: {path}: {len(rows)} rows; give at least {MIN_ROWS}")
    return rows
