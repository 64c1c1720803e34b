"""What each thread of this process is doing, and when work last went on: for the hang guard."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_names: dict[int, list[str]] = {}
_last_beat = time.monotonic()


def heartbeat() -> None:
    """Say that work goes on: after each piece of it that cannot be cut smaller."""
    global _last_beat
    _last_beat = time.monotonic()


def seconds_since_heartbeat() -> float:
    """Of any thread: one may wait for another that works."""
    return time.monotonic() - _last_beat


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what this thread does within it; beats at both ends. Also a decorator."""
    names = _names.setdefault(threading.get_ident(), [])
    names.append(name)
    heartbeat()
    try:
        yield
    finally:
        names.pop()
        heartbeat()


def describe_phases() -> str:
    """What every thread is doing: `update > waiting for other ranks, scoring`."""
    return ", ".join(" > ".join(names) for names in list(_names.values()) if names) or "no phase"
