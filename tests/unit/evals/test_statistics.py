"""Estimates against exact values and simulation."""

import itertools
import random

import pytest

from r1pipe.evals.statistics import clustered_interval, estimate_pass_at_k, paired_interval, vote

TRIALS = 400
ROOM = 4 * (0.95 * 0.05 / TRIALS) ** 0.5
"""Four standard errors, 0.044, of a coverage that is counted in so many trials."""

# (n, right, k)
PASS_AT_K = [(4, 0, 2), (4, 1, 2), (4, 2, 3), (5, 5, 1), (6, 3, 1), (3, 1, 3)]


@pytest.mark.parametrize(("n", "right", "k"), PASS_AT_K)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, right: int, k: int) -> None:
    samples = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(samples, k))
    assert estimate_pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@5"):
        estimate_pass_at_k(4, 2, 5)


# (answers, winner)
VOTES = [
    (["1", "2", "2"], "2"),
    (["2", "1", "1", "2"], "2"),
    ([None, None, "3"], "3"),
    ([None], None),
    ([], None),
]


@pytest.mark.parametrize(("answers", "winner"), VOTES)
def test_vote(answers: list, winner: str | None) -> None:
    assert vote(answers) == winner


def test_interval_covers_the_truth_when_samples_cluster() -> None:
    """95% of intervals hold the true mean, although samples of one problem are alike."""
    rng = random.Random(0)
    truth, num_problems, num_samples, covered = 0.4, 100, 8, 0
    for _ in range(TRIALS):
        rates = []
        for _ in range(num_problems):
            chance = rng.betavariate(0.4, 0.6)  # mean 0.4, most problems all right or all wrong
            rates.append(sum(rng.random() < chance for _ in range(num_samples)) / num_samples)
        low, high = clustered_interval(rates)
        covered += low <= truth <= high
    assert abs(covered / TRIALS - 0.95) <= ROOM


def test_interval_at_the_edges() -> None:
    low, high = clustered_interval([0.0] * 100)
    assert low == pytest.approx(0, abs=1e-12)
    assert 0.02 < high < 0.05
    low, high = clustered_interval([1.0] * 100)
    assert 0.95 < low < 0.98
    assert high == pytest.approx(1)
    with pytest.raises(ValueError, match="no problems"):
        clustered_interval([])


@pytest.mark.parametrize("rates", [[0.0, 0.5, 1.0, 0.25], [1.0, 1.0, 1.0, 1.0]])
def test_problems_that_are_there_several_times_make_no_interval_shorter(rates: list) -> None:
    texts = [f"text {i}" for i in range(len(rates))]
    once = clustered_interval(rates)
    assert clustered_interval(rates, texts) == pytest.approx(once)
    assert clustered_interval(rates * 5, texts * 5) == pytest.approx(once)
    assert clustered_interval(rates * 5)[0] > once[0]
    _, low, high = paired_interval(rates * 5, rates[::-1] * 5, texts * 5)
    assert (low, high) == pytest.approx(paired_interval(rates, rates[::-1])[1:])
    # One of two five times: less is known than from two problems.
    low, high = clustered_interval([1.0] * 5 + [0.0], ["a"] * 5 + ["b"])
    assert high - low > 0.7


def draw_pair(rng: random.Random, mean: float, gain: float, num_problems: int) -> tuple:
    """Pass rates of two checkpoints, of 8 samples: the second closes a share `gain` of the gap."""
    before, after = [], []
    for _ in range(num_problems):
        chance = rng.betavariate(mean, 1 - mean)
        for rates, p in ((before, chance), (after, chance + gain * (1 - chance))):
            rates.append(sum(rng.random() < p for _ in range(8)) / 8)
    return before, after


@pytest.mark.parametrize(("mean", "gain"), [(0.5, 0.3), (0.5, 0.0), (0.98, 0.3)])
def test_paired_interval_covers_the_true_difference(mean: float, gain: float) -> None:
    """Near 100% as well, where the usual paired interval covers 86%."""
    rng = random.Random(0)
    covered = 0
    for _ in range(TRIALS):
        _, low, high = paired_interval(*draw_pair(rng, mean, gain, 50))
        covered += low <= gain * (1 - mean) <= high
    assert covered / TRIALS >= 0.95 - ROOM


def test_pairing_makes_the_interval_shorter() -> None:
    rng = random.Random(0)
    before, after = draw_pair(rng, 0.5, 0.2, 100)
    difference, low, high = paired_interval(before, after)
    assert difference == pytest.approx(sum(after) / 100 - sum(before) / 100)
    assert low < difference < high
    shuffled = rng.sample(after, len(after))
    _, low_unpaired, high_unpaired = paired_interval(before, shuffled)
    assert high - low < 0.6 * (high_unpaired - low_unpaired)


def test_paired_interval_at_the_edges() -> None:
    difference, low, high = paired_interval([1.0] * 50, [1.0] * 50)
    assert difference == 0
    assert low < -0.01
    assert high > 0.01
    assert paired_interval([0.0] * 50, [1.0] * 50)[2] == 1.0
    with pytest.raises(ValueError, match="no problems"):
        paired_interval([], [])
