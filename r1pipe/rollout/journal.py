"""Samples and scores on disk as they come: a killed stage resumes without sampling them again."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from r1pipe.types import Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.jsonl import dump_row

Place = tuple[str, int]
"""A line's file name and offset in the journal."""


class SampleJournal:
    """Samples and their scores on disk, a line each, at once; a file per rank and start.

    `digest` is that of everything that decides what the samples are. Files with another digest are
    deleted, and a last line that a kill cut is ignored.
    """

    def __init__(self, folder: Path, digest: str):
        self.folder = folder
        self._header = {"journal": digest}
        self.places: dict[tuple[str, int], Place] = {}
        self.scores: dict[str, list[Score]] = {}
        self.num_added = 0
        self._lock = threading.Lock()
        self._file: TextIO | None = None

    def read(self) -> None:
        """Fill `places`, where the samples are, and `scores`, those of all samples by the problem's
        id; the same on all ranks."""
        self.places, self.scores = distributed.on_first_rank(self.find)

    def find_samples(self, problem_id: str, num_samples: int) -> dict[int, Rollout]:
        """A problem's samples by number, as far as they are there."""
        places = {n: self.places.get((problem_id, n)) for n in range(num_samples)}
        return {number: self.load(place) for number, place in places.items() if place}

    def find(self) -> tuple[dict[tuple[str, int], Place], dict[str, list[Score]]]:
        places: dict[tuple[str, int], Place] = {}
        scores: dict[str, list[Score]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            rows = read_whole_lines(path)
            if next(rows, (0, None))[1] != self._header:
                path.unlink()
                continue
            for begin, row in rows:
                if "scores" in row:
                    scores[row["problem_id"]] = [Score(**score) for score in row["scores"]]
                else:
                    places[row["problem_id"], row["sample"]] = path.name, begin
        return places, scores

    def load(self, place: Place) -> Rollout:
        """A sample, without its prompt and log-probabilities."""
        name, begin = place
        with (self.folder / name).open("rb") as file:
            file.seek(begin)
            return Rollout(prompt_ids=[], logprobs=[], **json.loads(file.readline()))

    def __enter__(self) -> "SampleJournal":
        """Open a new file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns()}-{distributed.rank()}.jsonl"
        self._file = (self.folder / name).open("w", encoding="utf-8")
        self._write(self._header)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add_sample(self, rollout: Rollout) -> None:
        self.num_added += 1
        self._write(
            {
                "problem_id": rollout.problem_id,
                "sample": rollout.sample,
                "completion_ids": rollout.completion_ids,
                "completion": rollout.completion,
                "finish_reason": rollout.finish_reason,
                **({"episode": rollout.describe_episode()} if rollout.episode else {}),
            }
        )

    def add_scores(self, problem_id: str, scores: list[Score]) -> None:
        self._write({"problem_id": problem_id, "scores": [asdict(score) for score in scores]})

    def _write(self, row: dict[str, Any]) -> None:
        with self._lock:  # scores come from another thread
            self._file.write(dump_row(row) + "\n")
            self._file.flush()


def read_whole_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a file and where each begins. Its writer may have been killed in a line: what
    follows a broken one is ignored, and sampled again."""
    begin = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                yield begin, json.loads(line)
            except ValueError:
                break
            begin += len(line)
