"""Estimates from k samples of n problems: pass@k, maj@k, and the interval of a mean."""

import math
from collections import Counter
from collections.abc import Sequence

Z_95 = 1.959964


def estimate_pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: Chen et al. 2021, arXiv:2107.03374, eq. 1."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the earliest of equals; samples without an answer do not vote.

    Majority voting: Wang et al. 2023, arXiv:2203.11171; "cons@k" in the R1 paper.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__) if counts else None


def clustered_interval(
    per_problem: Sequence[float], texts: Sequence[str] | None = None
) -> tuple[float, float]:
    """95% interval of a mean over problems, each the mean of its samples. Problems of equal
    `texts` are one problem that was asked several times; default: all differ.

    Samples of one problem are not independent, so the problem is the unit (Miller 2024,
    arXiv:2411.00640, section 2.2). The standard error over problems gives the effective number of
    independent trials, at least the number of problems (of unequal shares: Kish's effective
    number), and that a Wilson interval, which stays within [0, 1] and does not shrink to a point at
    0% or 100%.
    """
    n = len(per_problem)
    if n == 0:
        raise ValueError("no problems")
    p = sum(per_problem) / n
    sums = sum_deviations(per_problem, texts)
    variance = sum(s * s for s in sums) / n**2 * len(sums) / max(1, len(sums) - 1)
    least = n**2 / sum(size * size for size in Counter(texts or range(n)).values())
    trials = max(least, p * (1 - p) / variance) if variance > 0 else least
    centre = p + Z_95**2 / (2 * trials)
    spread = Z_95 * math.sqrt(p * (1 - p) / trials + Z_95**2 / (4 * trials**2))
    scale = 1 + Z_95**2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sum_deviations(values: Sequence[float], texts: Sequence[str] | None) -> list[float]:
    """Per text, the sum of its values' deviations from the overall mean."""
    mean = sum(values) / len(values)
    sums: dict[object, float] = {}
    for key, value in zip(texts or range(len(values)), values, strict=True):
        sums[key] = sums.get(key, 0.0) + value - mean
    return list(sums.values())


def paired_interval(
    before: Sequence[float], after: Sequence[float], texts: Sequence[str] | None = None
) -> tuple[float, float, float]:
    """mean(after) - mean(before) and its 95% interval; entry i of both is of the same problem, and
    `texts` are as in `clustered_interval`.

    Problems that are hard for one checkpoint are hard for the other, so their difference is known
    better than either mean (Miller 2024, arXiv:2411.00640, section 4.2). The limits are put
    together from those of `clustered_interval` and the correlation over problems (Newcombe 1998,
    Statist. Med. 17, 2635-2650, method 10; Zou and Donner 2008): with many problems the usual
    paired interval, and like Wilson's it does not shrink to a point where both are always right.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} problems before, {len(after)} after")
    low_0, high_0 = clustered_interval(before, texts)
    low_1, high_1 = clustered_interval(after, texts)
    mean_0, mean_1 = sum(before) / len(before), sum(after) / len(after)
    correlation = correlate(sum_deviations(before, texts), sum_deviations(after, texts))

    def reach(spread_1: float, spread_0: float) -> float:
        squared = spread_1**2 + spread_0**2 - 2 * correlation * spread_1 * spread_0
        return math.sqrt(max(0.0, squared))

    difference = mean_1 - mean_0
    low = difference - reach(mean_1 - low_1, high_0 - mean_0)
    high = difference + reach(high_1 - mean_1, mean_0 - low_0)
    return difference, max(-1.0, low), min(1.0, high)


def correlate(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of deviations from a mean; 0 where one of them does not vary."""
    spread = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / spread if spread > 0 else 0.0
