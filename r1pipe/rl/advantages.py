"""Group-relative advantages: pure functions from rewards to advantages."""

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative difference up to which rewards count as equal: their totals are sums, and 0.1 + 0.2 is
not 0.3."""


def compute_advantages(rewards_NG: Tensor, scale_rewards: str) -> Tensor:
    """Advantage of each of G samples over its group: `[N, G] -> [N, G]`.

    A = (r - mean(group)) / std, with the std of the group as in GRPO (arXiv:2402.03300, eq. in
    section 4.1.2), of the whole batch (arXiv:2508.08221), or 1 as in Dr. GRPO (arXiv:2503.20783,
    section 3.1), which shows that the group's std favours too easy and too hard questions.

    A NaN reward stands for "could not be judged": mean and std leave it out, and its advantage is
    0. Advantages are also exactly 0 in a group whose rewards are all equal.
    """
    judged_NG = ~rewards_NG.isnan()
    centred_NG = rewards_NG - rewards_NG.nanmean(dim=1, keepdim=True)
    # The mean of equal numbers is rounded; the remainder would be divided by next to nothing.
    silent_N1 = find_silent_groups(rewards_NG).unsqueeze(1)
    centred_NG = centred_NG.masked_fill(silent_N1 & judged_NG, 0.0)
    if scale_rewards == "group":
        centred_NG = centred_NG / (nan_std(centred_NG, dim=1) + EPSILON)
    elif scale_rewards == "batch":
        centred_NG = centred_NG / (nan_std(centred_NG.reshape(1, -1), dim=1) + EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards: {scale_rewards!r}")
    return torch.where(judged_NG, centred_NG, 0.0)


def nan_std(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation over `dim`, kept, of the entries that are not NaN."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def find_silent_groups(rewards_NG: Tensor) -> Tensor:
    """True for groups `[N]` whose rewards are all equal, NaN aside, or missing: nothing to
    learn."""
    missing_NG = rewards_NG.isnan()
    highest_N = rewards_NG.masked_fill(missing_NG, -torch.inf).amax(1)
    lowest_N = rewards_NG.masked_fill(missing_NG, torch.inf).amin(1)
    size_N = torch.maximum(highest_N.abs(), lowest_N.abs())
    return (highest_N <= lowest_N) | (highest_N - lowest_N <= ROUNDING * size_N)
