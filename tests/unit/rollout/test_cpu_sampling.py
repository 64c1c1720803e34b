"""The draws are uniform, independent and repeatable; tokens come as often as they should."""

import numpy as np
import pytest
import torch
from frequencies import counts_p
from vllm import SamplingParams

from r1pipe.config.base import COLDEST
from r1pipe.rollout.cpu_sampling import choose_tokens, draw_uniforms, keep_agreed, mix
from r1pipe.utils.seeds import derive_seed

SMALLEST_P = 1e-4  # the draws are fixed: what passes once always does
SIZE = 512


def uniform_p(values: np.ndarray) -> float:
    """Of Kolmogorov and Smirnov's test, by the limiting distribution."""
    places = np.arange(len(values) + 1) / len(values)
    values = np.sort(values)
    distance = max((places[1:] - values).max(), (values - places[:-1]).max())
    k = np.arange(1, 100)
    terms = (-1.0) ** (k - 1) * np.exp(-2 * k**2 * len(values) * distance**2)
    return float(np.clip(2 * terms.sum(), 0, 1))


def draw_grid(seeds: np.ndarray) -> np.ndarray:
    """`[seeds, positions]`"""
    seeds_N, positions_N = (part.ravel() for part in np.meshgrid(seeds, range(SIZE), indexing="ij"))
    return draw_uniforms(seeds_N, positions_N).reshape(len(seeds), SIZE)


NEIGHBOURS = np.arange(SIZE)
DERIVED = np.array([derive_seed(0, "grpo", 1, "problem", n) for n in range(SIZE)])


@pytest.mark.parametrize("seeds", [NEIGHBOURS, DERIVED], ids=["neighbours", "derived"])
def test_draws_are_uniform_and_independent_of_their_neighbours(seeds: np.ndarray) -> None:
    draws = draw_grid(seeds)
    assert 0 <= draws.min() < draws.max() < 1
    assert len(np.unique(draws)) == draws.size
    assert uniform_p(draws.ravel()) > SMALLEST_P
    for lines in (draws, draws.T):  # one seed's positions, one position's seeds
        smallest = min(uniform_p(line) for line in lines)
        assert smallest > SMALLEST_P / len(lines)
    # One place, or one bit of the seed or of the position, apart; and seed and position swapped.
    pairs = [(draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])]
    for bit in range(9):
        low = NEIGHBOURS[NEIGHBOURS & 1 << bit == 0]
        pairs += [(grid[low], grid[low + (1 << bit)]) for grid in (draws, draws.T)]
    upper = np.triu_indices(SIZE, 1)
    pairs.append((draws[upper], draws.T[upper]))
    for one, other in pairs:
        cells = (one * 16).astype(int) * 16 + (other * 16).astype(int)
        found = np.bincount(cells.ravel(), minlength=256)
        assert counts_p(found, found.mean()) > SMALLEST_P


def test_a_seed_has_its_draw_for_each_position_wherever_it_stands() -> None:
    """Written down: a run resumes with another release's draws otherwise."""
    alone = draw_uniforms(np.array([7]), np.array([3]))
    among = draw_uniforms(np.array([1, 7, 2**31 - 1]), np.array([0, 3, 100_000]))
    assert among[1] == alone[0]
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0xE220A8397B1DCDAF


def test_tokens_are_kept_up_to_the_first_that_was_not_drafted() -> None:
    """Requests with all drafts right, none, with none, and with a right one behind a wrong one."""
    rows = ([1, 2, 3], [4, 5, 6], [7], [8, 9, 1])
    drafts = ([1, 2], [9, 5], [], [8, 3])
    tokens_BK, rows_BK = keep_agreed(
        np.concatenate(rows), np.concatenate(drafts).astype(int), np.array([*map(len, drafts)])
    )
    assert tokens_BK.tolist() == [[1, 2, 3], [4, -1, -1], [7, -1, -1], [8, 9, -1]]
    assert rows_BK.tolist() == [[0, 1, 2], [3, 4, 5], [6, 6, 6], [7, 8, 9]]


def some_logprobs() -> torch.Tensor:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    logits = torch.linspace(0, 6, 24)[order]
    logits[5] = -torch.inf  # as top_k leaves it
    return logits.log_softmax(-1)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logprobs, count = some_logprobs(), 200_000
    uniforms = draw_uniforms(np.arange(count), np.zeros(count, int))
    chosen = choose_tokens(logprobs.expand(count, -1), uniforms)
    found = torch.bincount(chosen, minlength=24).numpy()
    expected = logprobs.double().exp().numpy()
    kept = expected > 0
    assert not found[~kept].any()
    expected = expected[kept] / expected[kept].sum() * count
    assert counts_p(found[kept], expected) > SMALLEST_P


def test_small_probabilities_of_a_large_vocabulary_are_not_lost() -> None:
    """In float32 the last 50,000 would add nothing to the sum."""
    size, count = 150_000, 40
    probabilities = torch.full((size,), 1e-8)
    probabilities[0] = 1 - 1e-8 * (size - 1)
    uniforms = 1 - (np.arange(count) + 0.5) / count * 1e-8 * 50_000
    chosen = choose_tokens(probabilities.log().expand(count, -1), uniforms)
    assert len(chosen.unique()) == count
    assert int(chosen.min()) >= size - 50_100


def test_the_ends_of_the_distribution() -> None:
    logprobs = torch.tensor([[-torch.inf, -0.7, -0.7, -torch.inf], [torch.nan] * 4])
    for uniform, expected in ((0.0, 1), (1 - 2.0**-50, 2)):
        chosen = choose_tokens(logprobs, np.array([uniform, uniform]))
        assert int(chosen[0]) == expected
        assert 0 <= int(chosen[1]) < 4


def test_the_coldest_temperature() -> None:
    """What vLLM does with less; recipes may not ask for it."""
    for asked, taken in ((COLDEST, COLDEST), (COLDEST / 2, COLDEST), (0.0, 0.0)):
        assert SamplingParams(temperature=asked).temperature == taken
