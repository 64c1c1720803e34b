"""What a training stage needs for an exact resume, saved while it runs.

    runs/<name>/.<stage>.partial/checkpoints/
      step-10/
        rank-0.pt ...   one per process: shards of weights and optimizer, scheduler, random
                        states, position in the data, the batch in flight; no pickled code
        manifest.json   size and sha256 of these files, and positions of the logs

A checkpoint appears by one rename, after everything in it is on disk. A damaged one is found by its
checksum and removed, and the one before it is used; an intact one is never removed. Logs are cut
back, so no step is missing or doubled in them, unless rows were removed by hand.
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from r1pipe.config.base import Saving
from r1pipe.runs.folder import CHECKPOINTS, find_steps
from r1pipe.utils import distributed
from r1pipe.utils.errors import FULL, UserError, is_disk_full
from r1pipe.utils.jsonl import write_text
from r1pipe.utils.phases import phase
from r1pipe.utils.progress import Interrupt, log_line

MANIFEST = "manifest.json"
UNREADABLE = "cannot be read"
"""Not the same as damaged: the file's owner or disk may still provide it."""


class Stateful(Protocol):
    """A part of the stage. States are per rank, of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AppendOnlyLog(Protocol):
    """A file that grows step by step; rank 0's counts."""

    def position(self) -> Any:
        """Its end, as JSON; everything before it is on disk."""

    def cut(self, position: Any) -> None:
        """Drop what came after; None: everything. Raises ValueError if earlier rows are gone, or
        OSError; the log can still be written."""


class Checkpoints:
    """Saves and restores the `parts` of a stage, and cuts its `logs` back with them.

    Every rank makes one with the same `folder`, the stage's, and calls the same methods at the
    same steps.
    """

    def __init__(
        self,
        folder: Path,
        settings: Saving,
        label: str,
        parts: Mapping[str, Stateful],
        logs: Mapping[str, AppendOnlyLog],
    ):
        self.folder, self.settings, self.label = folder / CHECKPOINTS, settings, label
        self.parts = {"random": RandomStates(), **parts}
        self.logs = logs
        self._seconds: list[float] = []
        self._asked = False

    def end_step(self, step: int, score: float | None = None) -> None:
        """Save if due. Then raise KeyboardInterrupt if the run was told to end.

        `score`: quality of the checkpoint, higher is better.
        """
        if self.is_due(step):
            self.save(step, score)
        self.end_if_asked()

    def is_due(self, step: int) -> bool:
        """At every `save_steps`, and when any rank was told to end."""
        self._asked = any(distributed.gather(Interrupt.asked))
        return self._asked or bool(
            self.settings.save_steps and step % self.settings.save_steps == 0
        )

    def end_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    @phase("saving")
    def save(self, step: int, score: float | None = None) -> None:
        """Raises UserError if the disk is full; earlier checkpoints stay intact."""
        started = time.perf_counter()
        place, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        distributed.on_first_rank(lambda: make_empty(partial))
        try:
            file, problem = self._write_own(partial), ""
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and not is_disk_full(error):
                raise
            file, problem = {}, explain(error, partial)
        files, problems = zip(*distributed.gather((file, problem)))
        if any(problems):
            distributed.on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise UserError(f"{self.label}: {next(filter(None, problems))}")
        manifest = {
            "step": step,
            "score": score,
            "num_processes": distributed.world_size(),
            "num_threads": torch.get_num_threads(),
            "files": {name: facts for file in files for name, facts in file.items()},
        }
        distributed.on_first_rank(lambda: self._place(partial, place, manifest))
        self._seconds.append(time.perf_counter() - started)

    def facts(self) -> dict[str, float]:
        """Number and seconds of this process's saves."""
        return {"checkpoints": len(self._seconds), "checkpoints_s": round(sum(self._seconds), 2)}

    def _write_own(self, partial: Path) -> dict[str, Any]:
        """Write this rank's file; returns its entry in the manifest."""
        name = f"rank-{distributed.rank()}.pt"
        state = {part: owner.state_dict() for part, owner in self.parts.items()}
        with (partial / name).open("wb") as file:
            hashing = HashingFile(file)
            torch.save(state, hashing)
            sync(file)
        return {name: {"bytes": hashing.size, "sha256": hashing.hash.hexdigest()}}

    def _place(self, partial: Path, place: Path, manifest: dict[str, Any]) -> None:
        try:
            manifest["logs"] = {name: log.position() for name, log in self.logs.items()}
            write_manifest(partial / MANIFEST, manifest)
            sync_folder(partial)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{self.label}: {explain(error, partial)}") from error
        for step in self._superfluous():
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

    def _superfluous(self) -> list[int]:
        """Steps neither among the newest `save_total_limit` nor the best."""
        steps = find_steps(self.folder)
        older = steps[: -self.settings.save_total_limit]
        scores = {step: self._score(step) for step in steps}
        best = max(steps, key=lambda step: (scores[step], step))
        return [step for step in older if step != best or scores[step] == -float("inf")]

    def _score(self, step: int) -> float:
        try:
            score = read_manifest(self.folder / f"step-{step}")["score"]
        except (OSError, ValueError):
            return -float("inf")
        return -float("inf") if score is None or score != score else score

    def restore_last_good(self) -> int:
        """Restore every part from the newest intact checkpoint, and cut the logs to it.

        Returns its step, or 0 if there is none: the parts are unchanged then, the logs empty.
        Raises UserError if another number of processes saved it or it cannot be read.
        """
        distributed.on_first_rank(self._sweep)
        steps = distributed.on_first_rank(lambda: find_steps(self.folder)[::-1])
        for step in steps:
            place = self.folder / f"step-{step}"
            problem = distributed.on_first_rank(lambda place=place: self._check_manifest(place))
            if not problem:
                problem = next(filter(None, distributed.gather(check_own_file(place))), "")
            if not problem:
                distributed.on_first_rank(lambda place=place: self._cut_logs(place))
                self._load_own(place)
                log_line(f"{self.label}: resumes after step {step}")
                return step
            if UNREADABLE in problem:
                raise UserError(f"{place}/{problem}; it was left as it is")
            log_line(
                f"{self.label}: warning: checkpoint of step {step} is damaged ({problem}): removed"
            )
            distributed.on_first_rank(lambda place=place: shutil.rmtree(place, ignore_errors=True))
        if steps:
            log_line(f"{self.label}: no intact checkpoint: the stage starts over")
        if distributed.is_first():
            for log in self.logs.values():
                log.cut(None)
        return 0

    def discard_from(self, step: int) -> None:
        """Delete the checkpoints of this step and later ones."""

        def discard() -> None:
            for suspect in find_steps(self.folder):
                if suspect >= step:
                    shutil.rmtree(self.folder / f"step-{suspect}", ignore_errors=True)

        distributed.on_first_rank(discard)

    def _sweep(self) -> None:
        """Delete what killed saves left behind."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _check_manifest(self, place: Path) -> str:
        try:
            manifest = read_manifest(place)
        except (OSError, ValueError) as error:
            return describe_damage(MANIFEST, error)
        if (count := manifest["num_processes"]) != distributed.world_size():
            raise UserError(
                f"{place}: saved by {count} processes, and this run has "
                f"{distributed.world_size()}: start {count} of them, or add --redo to start over"
            )
        if (threads := manifest["num_threads"]) != torch.get_num_threads():
            log_line(
                f"{self.label}: warning: saved with {threads} threads, and there are "
                f"{torch.get_num_threads()}: float sums will differ in the last bits "
                "(OMP_NUM_THREADS)"
            )
        return ""

    def _cut_logs(self, place: Path) -> None:
        positions = read_manifest(place)["logs"]
        for name, log in self.logs.items():
            try:
                log.cut(positions.get(name))
            except (OSError, ValueError) as error:
                log_line(f"{self.label}: warning: {error}: it keeps the rows that are left")

    def _load_own(self, place: Path) -> None:
        path = place / f"rank-{distributed.rank()}.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for part, owner in self.parts.items():
            owner.load_state_dict(state[part])


class RandomStates:
    """The global random number generators. Only libraries draw from them."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()
        state = {
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), *rest],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


class HashingFile:
    """Hashes what is written, so that it need not be read again."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.hash = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def check_own_file(place: Path) -> str:
    """What is wrong with this rank's file; empty if intact."""
    name = f"rank-{distributed.rank()}.pt"
    try:
        facts = read_manifest(place)["files"][name]
        with (place / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except (OSError, ValueError) as error:
        return describe_damage(name, error)
    if size != facts["bytes"]:
        return f"{name} has {size} bytes instead of {facts['bytes']}"
    return "" if digest == facts["sha256"] else f"{name}: its sha256 does not match"


def describe_damage(name: str, error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return f"{name}: {UNREADABLE}: {error.strerror}"
    return f"{name}: {error}"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    write_text(path, json.dumps({**manifest, "sha256": digest}, indent=2) + "\n")


def read_manifest(place: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if it is damaged."""
    manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    digest = manifest.pop("sha256", None)
    if hashlib.sha256(json.dumps(manifest).encode()).hexdigest() != digest:
        raise ValueError("its sha256 does not match")
    return manifest


def make_empty(folder: Path) -> None:
    """Raises UserError if it cannot be made."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(explain(error, folder)) from error


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """A rename is on disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain(error: OSError | RuntimeError, path: Path) -> str:
    if is_disk_full(error):
        return f"{path.parent}: {FULL}"
    return f"{path}: cannot be written: {error}"
