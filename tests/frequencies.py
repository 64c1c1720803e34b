"""Whether things come as often as they should."""

import numpy as np
import torch


def counts_p(found: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's chi-square test."""
    statistic = ((found - expected) ** 2 / expected).sum()
    halves = torch.tensor([found.size - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))
