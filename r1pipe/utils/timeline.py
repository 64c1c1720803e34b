"""Who worked when, within a step of reinforcement learning: idle shares and the report's timeline.

Lanes: `trainer`, `judges`, and `engine_0` onwards. What no span covers is waiting.
"""

import itertools
import time
from collections import deque
from typing import Any

MAX_SPANS = 10_000
"""Of a lane; where no step asks for them, the oldest are forgotten."""
RESOLUTION = 1e-3
"""Share of a step: spans of the same work that are closer become one."""

Span = tuple[str, float, float]
"""What was done, and from when to when: seconds of time.perf_counter."""

_lanes: dict[str, deque[Span]] = {}
_open: dict[int, tuple[str, str, float]] = {}
"""Lane, what and since when, of what is being done."""
_numbers = itertools.count()


def record(lane: str, what: str, began: float, ended: float) -> None:
    _lanes.setdefault(lane, deque(maxlen=MAX_SPANS)).append((what, began, ended))


def begin(lane: str, what: str) -> int:
    """From now until `end` of the number. From any thread."""
    number = next(_numbers)
    _open[number] = lane, what, time.perf_counter()
    return number


def end(number: int) -> None:
    record(*_open.pop(number), time.perf_counter())


def describe_step(began: float, ended: float) -> dict[str, Any]:
    """`idle/LANE`, the share of the step in which it did nothing, and `timeline`: rows of lane,
    what, begin and end, in seconds of the step. Forgets what ended before."""
    going_on: dict[str, list[Span]] = {}
    for lane, what, since in _open.copy().values():
        going_on.setdefault(lane, []).append((what, since, ended))
    metrics: dict[str, Any] = {}
    timeline: list[tuple[str, str, float, float]] = []
    for lane in sorted({*_lanes.copy(), *going_on}, key=order):
        spans = _lanes.setdefault(lane, deque(maxlen=MAX_SPANS))
        recorded = [spans.popleft() for _ in range(len(spans))]
        spans.extend(span for span in recorded if span[2] > ended)
        recorded += going_on.get(lane, [])
        within = [
            (w, max(a, began), min(b, ended)) for w, a, b in recorded if a < ended and b > began
        ]
        joined = join(within, (ended - began) * RESOLUTION)
        busy_s = sum(b - a for _, a, b in join([("", a, b) for _, a, b in within], 0))
        metrics[f"idle/{lane}"] = 1 - busy_s / (ended - began)
        timeline += [(lane, w, round(a - began, 3), round(b - began, 3)) for w, a, b in joined]
    return {**metrics, "timeline": timeline}


def join_ranks(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """The first rank's step, with the lanes that only others have: their engines in a fleet."""
    idle: dict[str, float] = {}
    rows: list[tuple[str, str, float, float]] = []
    for metrics in by_rank:
        new = {lane: s for lane, s in find_idle(metrics).items() if lane not in idle}
        idle |= new
        rows += [row for row in metrics["timeline"] if row[0] in new]
    shares = {f"idle/{lane}": idle[lane] for lane in sorted(idle, key=order)}
    return {**shares, "timeline": sorted(rows, key=lambda row: order(row[0]))}


def order(lane: str) -> tuple[str, int, str]:
    """Engines by number, judges, trainer."""
    return lane[:6], len(lane), lane


def find_idle(metrics: dict[str, Any]) -> dict[str, float]:
    """Idle shares by lane, of a step's metrics."""
    return {n.removeprefix("idle/"): share for n, share in metrics.items() if n.startswith("idle/")}


def join(spans: list[Span], gap_s: float) -> list[Span]:
    """In order; those of the same work that overlap, or are `gap_s` apart at most, are one."""
    joined: list[Span] = []
    latest: dict[str, int] = {}
    for what, began, ended in sorted(spans, key=lambda span: span[1]):
        place = latest.get(what)
        if place is not None and began - joined[place][2] <= gap_s:
            joined[place] = (what, joined[place][1], max(ended, joined[place][2]))
        else:
            latest[what] = len(joined)
            joined.append((what, began, ended))
    return joined
