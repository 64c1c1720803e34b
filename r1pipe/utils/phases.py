"""What each thread of this process is doing, and the last heartbeat: for the hang guard. Some of it
goes to the step's timeline."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from r1pipe.utils import timeline

LANES = {"sampling": "engine_0", "scoring": "judges"}
"""Phases of which a step's timeline tells, wherever they come from."""

_names: dict[int, list[str]] = {}
_last_beat = time.monotonic()


def heartbeat() -> None:
    """Report progress, after each smallest unit of work."""
    global _last_beat
    _last_beat = time.monotonic()


def seconds_since_heartbeat() -> float:
    """Over all threads: one may wait for another that works."""
    return time.monotonic() - _last_beat


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what this thread does; sends a heartbeat at both ends. Also a decorator."""
    names = _names.setdefault(threading.get_ident(), [])
    names.append(name)
    heartbeat()
    span = timeline.begin(LANES[name], name) if name in LANES else None
    try:
        yield
    finally:
        names.pop()
        heartbeat()
        if span is not None:
            timeline.end(span)


def describe_phases() -> str:
    """What every thread is doing: `update > waiting for other ranks, scoring`."""
    return ", ".join(" > ".join(names) for names in list(_names.values()) if names) or "no phase"
