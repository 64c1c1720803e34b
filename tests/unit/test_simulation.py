"""benchmarks/common/simulation.py, by cases that can be computed by hand."""

import sys
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import pytest
from report_run import write_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from common.simulation import (  # noqa: E402
    Plan,
    Rates,
    Simulation,
    draw_again,
    draw_lognormal,
    simulate,
)
from common.splits import MEAN, Workload, choose_lengths  # noqa: E402

RATES = Rates(
    step_s=0.010,
    sequence_s=0.001,
    read_s=0.0,
    token_s=0.0005,
    update_s=1.0,
    sync_s=0.25,
    max_num_seqs=4,
)
LENGTH, SAMPLES = 100, 4
STEP_S = 0.010 + 4 * 0.001
"""Of an engine that samples a whole group."""


def constant():
    return repeat([LENGTH] * SAMPLES)


def change(**values: float) -> Rates:
    return Rates(**{**RATES.__dict__, **values})


def test_one_engine_samples_group_by_group() -> None:
    """Four sequences at a time, so three groups one after another; reading holds up the others."""
    outcome = simulate(change(read_s=0.01, prompt_tokens=5), Plan(1, groups=3), constant())
    sampling = 3 * (LENGTH * STEP_S + 4 * 5 * 0.01)
    training = 1.0 + 3 * SAMPLES * (LENGTH + 5) * 0.0005
    assert outcome.step_s == pytest.approx(sampling + training + 0.25)
    assert outcome.trainer_idle == pytest.approx(1 - training / outcome.step_s)
    assert outcome.engine_idle == pytest.approx(1 - sampling / outcome.step_s)
    assert (outcome.staleness, outcome.max_staleness) == (0, 0)


def test_a_short_sequence_makes_room_and_the_others_faster() -> None:
    """Two run; the short one's place is taken by the third; then one is alone."""
    outcome = simulate(change(max_num_seqs=2), Plan(1, groups=1), repeat([100, 30, 40]))
    sampling = 30 * 0.012 + 40 * 0.012 + 30 * 0.011
    assert outcome.step_s == pytest.approx(sampling + 1.0 + 170 * 0.0005 + 0.25)


def test_groups_go_to_engines_in_turn() -> None:
    """The first engine has the first and the third group."""
    outcome = simulate(RATES, Plan(2, groups=3), constant())
    assert outcome.step_s == pytest.approx(2 * LENGTH * STEP_S + 1.0 + 1200 * 0.0005 + 0.25)
    busy = (2 + 1) * LENGTH * STEP_S / 2
    assert outcome.engine_idle == pytest.approx(1 - busy / outcome.step_s)


@pytest.mark.parametrize(("update_s", "slower"), [(0.5, "sampling"), (20.0, "training")])
@pytest.mark.parametrize(("staleness", "in_flight"), [(1, False), (16, True)])
def test_ahead_a_step_takes_what_the_slower_side_does(
    update_s: float, slower: str, staleness: int, in_flight: bool
) -> None:
    plan = Plan(1, 4, staleness, in_flight)
    outcome = simulate(change(update_s=update_s, sync_s=0.0), plan, constant())
    sampling, training = 4 * LENGTH * STEP_S, update_s + 1600 * 0.0005
    assert outcome.step_s == pytest.approx(max(sampling, training))
    shares = {"sampling": 1 - outcome.engine_idle, "training": 1 - outcome.trainer_idle}
    assert shares[slower] == pytest.approx(1)
    assert outcome.max_staleness <= staleness


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_sync_holds_up_all(in_flight: bool) -> None:
    rates = change(update_s=0.1, token_s=0.0, sync_s=0.5)
    outcome = simulate(rates, Plan(1, 4, 1, in_flight), constant())
    assert outcome.step_s == pytest.approx(4 * LENGTH * STEP_S + 0.5)


def test_in_flight_what_runs_is_read_again() -> None:
    """A group begins as another is trained on for half of its time: then its four samples have 50
    tokens each, beside three of the prompt."""
    rates = change(update_s=LENGTH / 2 * STEP_S, token_s=0.0, sync_s=0.0, read_s=0.01)
    plan = Plan(1, 1, 1, in_flight=True)
    outcome = simulate(Rates(**{**rates.__dict__, "prompt_tokens": 3}), plan, constant())
    reading = 4 * 3 * 0.01  # its prompts: so 0.12 s less of its samples are there
    again = 4 * (3 + (LENGTH / 2 * STEP_S - reading) / STEP_S) * 0.01
    assert outcome.step_s == pytest.approx(LENGTH * STEP_S + reading + again)


@pytest.mark.parametrize(("staleness", "in_flight"), [(0, False), (1, False), (1, True), (4, True)])
def test_nothing_is_lost(staleness: int, in_flight: bool) -> None:
    """Each group is trained on once, in order, or is still on its way; none is too old."""
    drawn = [next(lengths) for lengths in [draw_lognormal(200, 1.0, 4000, 4)] for _ in range(100)]
    run = Simulation(RATES, Plan(3, 5, staleness, in_flight), drawn).run(12)
    begun = [group for batch in run.batches for group in batch]
    assert [group.tokens for group in begun] == [sum(lengths) for lengths in drawn[: len(begun)]]
    assert run.taken == 12
    assert not any(group.missing for group in begun[: 12 * 5])
    assert len(begun) <= (12 + staleness) * 5
    left = [group for engine in run.engines for group, _ in engine.waiting]
    left += [group for engine in run.engines for *_, group in engine.running]
    assert sum(group.missing for group in begun) == len(left)
    assert run.unfinished == sum(group.missing > 0 for group in begun)
    outcome = run.describe(2)
    assert outcome.max_staleness <= staleness
    assert (outcome.staleness > 0) == (staleness > 0)


def test_more_threads_than_cores_share_them() -> None:
    """An engine and a trainer of two threads on two cores: three threads."""
    rates = change(sync_s=0.0, cores=2, trainer_threads=2, token_s=0.0, update_s=3.0)
    outcome = simulate(rates, Plan(1, 1, staleness=1), repeat([250] * 4))
    sampling = 250 * STEP_S  # 3.5 s alone, as long as training takes beside it, and more
    both = 3.0 * 3 / 2
    assert outcome.step_s == pytest.approx(both + max(0.0, sampling - both * 2 / 3))


def test_lengths_of_a_run_are_drawn_by_group() -> None:
    drawn = draw_again([[1, 2], [30, 40]], scale=10)
    groups = [tuple(next(drawn)) for _ in range(20)]
    assert set(groups) == {(10, 20), (300, 400)}


def test_lognormal_lengths_are_cut() -> None:
    drawn = draw_lognormal(1000, 1.0, 3000, 16)
    lengths = [length for _ in range(500) for length in next(drawn)]
    assert max(lengths) == 3000
    assert sum(lengths) / len(lengths) == pytest.approx(890, abs=25)


def test_splits_that_are_left_out_are_slower() -> None:
    work = Workload(partial(draw_lognormal, 500, 1.0, 4000, 4), prompts=12)
    found = work.find_split(8, 1.0, 2, in_flight=True)
    all_s = [work.try_split(8 - n, n, 1.0, 2, True).outcome.step_s for n in range(1, 8)]
    assert found.outcome.step_s == min(all_s)
    assert found.sampling + found.training == 8


def test_a_run_gives_its_lengths_their_shape(tmp_path: Path) -> None:
    """Of 20 to 23 tokens in the run's groups, of 16 samples."""
    draw, _ = choose_lengths(write_run(tmp_path / "run"))
    for lengths in islice(draw(), 10):
        assert lengths == [round(MEAN / 21.5 * length) for length in (20, 21, 22, 23)] * 4
