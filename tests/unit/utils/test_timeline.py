"""Spans of a step: idle shares, what reaches over its ends, what is joined."""

import threading
import time

import pytest

from r1pipe.rl.loop import Clock
from r1pipe.utils import timeline
from r1pipe.utils.phases import phase


@pytest.fixture(autouse=True)
def no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_lanes", "_open"):
        monkeypatch.setattr(timeline, name, {})


def test_what_overlaps_is_busy_once() -> None:
    timeline.record("judges", "scoring", 1.0, 3.0)
    timeline.record("judges", "scoring", 2.0, 4.0)
    timeline.record("engine_0", "sampling", 0.0, 6.0)
    timeline.record("engine_0", "sync", 5.0, 8.0)
    metrics = timeline.describe_step(0.0, 10.0)
    assert metrics["idle/judges"] == pytest.approx(0.7)
    assert metrics["idle/engine_0"] == pytest.approx(0.2)
    assert metrics["timeline"] == [
        ("engine_0", "sampling", 0.0, 6.0),
        ("engine_0", "sync", 5.0, 8.0),
        ("judges", "scoring", 1.0, 4.0),
    ]


def test_pieces_of_a_second_are_one_span() -> None:
    for number in range(5):
        timeline.record("engine_0", "sampling", number, number + 0.999)
    metrics = timeline.describe_step(0.0, 5.0)
    assert metrics["timeline"] == [("engine_0", "sampling", 0.0, 4.999)]
    assert metrics["idle/engine_0"] == pytest.approx(0.001)


def test_work_across_steps_belongs_to_each() -> None:
    """Also while it goes on."""
    timeline.record("engine_0", "sampling", -5.0, 1.0)
    timeline.record("engine_0", "sampling", 3.0, 12.0)
    first = timeline.describe_step(0.0, 10.0)
    assert [row[2:] for row in first["timeline"]] == [(0.0, 1.0), (3.0, 10.0)]
    second = timeline.describe_step(10.0, 20.0)
    assert [row[2:] for row in second["timeline"]] == [(0.0, 2.0)]
    assert timeline.describe_step(20.0, 30.0) == {"idle/engine_0": 1.0, "timeline": []}
    now = time.perf_counter()
    span = timeline.begin("engine_1", "sampling")
    assert timeline.describe_step(now - 1, now + 1)["idle/engine_1"] == pytest.approx(0.5, abs=0.1)
    assert timeline.describe_step(now + 1, now + 2)["idle/engine_1"] == 0
    timeline.end(span)
    assert timeline.describe_step(now + 2, now + 3)["idle/engine_1"] == 1


def test_other_ranks_engines_are_the_first_ranks_too() -> None:
    """Where it has none of that number."""
    first = {"idle/engine_0": 0.5, "idle/trainer": 0.1, "timeline": [("engine_0", "sync", 0, 1)]}
    rows = [("engine_0", "sampling", 2, 3), ("engine_1", "sampling", 2, 4)]
    other = {"idle/engine_0": 0.6, "idle/engine_1": 0.7, "timeline": rows}
    joined = timeline.join_ranks([first, other])
    lanes = {"idle/engine_0": 0.5, "idle/engine_1": 0.7, "idle/trainer": 0.1}
    assert joined == {**lanes, "timeline": [first["timeline"][0], rows[1]]}
    assert list(joined) == [*lanes, "timeline"]


def test_no_lane_grows_without_a_limit() -> None:
    for number in range(3 * timeline.MAX_SPANS):
        timeline.record("judges", "scoring", number, number + 0.5)
    assert len(timeline._lanes["judges"]) == timeline.MAX_SPANS


def test_phases_of_any_thread_and_the_trainers_clock() -> None:
    """Sampling of an engine in this process, judging beside it; the trainer waits, then updates."""
    clock = Clock()

    def judge() -> None:
        with phase("scoring"):
            time.sleep(0.02)

    with phase("sampling"):
        thread = threading.Thread(target=judge)
        thread.start()
        time.sleep(0.05)
    thread.join()
    clock.lap("wait")
    time.sleep(0.05)
    clock.lap("update")
    metrics = clock.metrics(1)
    step_s = metrics["seconds/step"]
    assert metrics["idle/trainer"] == pytest.approx(metrics["seconds/wait"] / step_s)
    assert metrics["idle/engine_0"] >= metrics["seconds/update"] / step_s
    assert metrics["idle/judges"] > metrics["idle/engine_0"]
    names = [row[:2] for row in metrics["timeline"]]
    assert names == [("engine_0", "sampling"), ("judges", "scoring"), ("trainer", "update")]
