"""Logs of a stage as JSONL: metrics.jsonl and others, cut back on resume."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1pipe.utils.jsonl import dump_row, read_jsonl


class JsonlLog:
    """An append-only file of a stage. Rows are flushed when written, and can be cut back to a
    checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("ab")

    def write(self, *rows: dict[str, Any]) -> None:
        self._file.write("".join(f"{dump_row(row)}\n" for row in rows).encode())
        self._file.flush()

    def position(self) -> int:
        """Bytes so far, synced to disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, position: int | None) -> None:
        """Drop what came after `position`; None: everything. Raises ValueError if the file is
        shorter, after dropping its last row if that is cut."""
        size = position or 0
        if lost := size > self._file.tell():
            size = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(size)
        self._file.seek(size)
        if lost:
            raise ValueError(f"{self.path.name} has lost rows")

    def close(self) -> None:
        self._file.close()


class MetricsLog(JsonlLog):
    """`metrics.jsonl` of a stage: one object per step, null for figures that do not exist, such as
    the reward of a step without a judged rollout. `listeners` are called with each step's metrics.
    """

    def __init__(self, folder: Path, listeners: Sequence[Callable[[dict[str, Any]], None]] = ()):
        super().__init__(folder / "metrics.jsonl")
        self.listeners = listeners

    def write(self, *rows: dict[str, Any]) -> None:
        super().write(*rows)
        for row in rows:
            for listener in self.listeners:
                listener(row)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "metrics.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A log's rows, also while it grows; none if there is no file."""
    return [row for _, row in read_jsonl(path, missing_ok=True, growing=True)]
