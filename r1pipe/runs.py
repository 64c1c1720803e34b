"""The run folder: who may write it, which stages are finished, how a stage appears in it.

    runs/<name>/
      <stage>/            a finished stage: checkpoint, metrics.jsonl, problems.jsonl, stage.json,
                          lineage.json
      .<stage>.partial/   a stage that is being made; whatever an interrupted run left is redone
      summary.json        one object per evaluated checkpoint

A stage's folder appears by one rename, after everything in it is written.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from r1pipe import distributed
from r1pipe.config import Recipe, Stage
from r1pipe.errors import UserError
from r1pipe.lineage import Lineage
from r1pipe.records import dump_row, read_jsonl, write_text

SHARED_KEYS = ("seed", "dtype", "attn_implementation", "ngram")
"""Settings of the recipe that change what a stage makes. The engine's bound only what fits."""

JOURNAL = "journal"
"""Where a stage keeps what it has sampled (sampling.py) until it is finished."""


class RunFolder:
    """The folder of one run, held by one process at a time. Use as a context manager.

    In a run of several processes rank 0 holds it and writes; what the stages of the others write
    goes into folders that are thrown away. All must see the folder, to read from it.

    Raises UserError if another process holds it or it cannot be written.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path = recipe.run_dir
        self.lineages: dict[str, Lineage] = {}
        """Of the stages that have begun, by name."""
        self._held: TextIO | None = None

    def __enter__(self) -> "RunFolder":
        distributed.on_first_rank(self._lock)
        return self

    def _lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise UserError(
                f"{self.path}: busy, process {holder} is writing it; wait for it or change name"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._held = lock

    def __exit__(self, *exc: object) -> None:
        if self._held:
            self._held.close()

    def stage_dir(self, name: str) -> Path:
        return self.path / name

    def begin(self, stage: Stage) -> Path:
        """An empty folder to write the stage into."""
        self.lineages[stage.name] = Lineage(self.recipe, stage)
        if not distributed.is_first():
            return Path(tempfile.mkdtemp(prefix="r1pipe-"))
        partial = self.path / f".{stage.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        return partial

    def abandon(self, partial: Path) -> None:
        """Nothing half-written stays behind a stage that failed or was interrupted."""
        shutil.rmtree(partial, ignore_errors=True)

    def finish(self, stage: Stage, partial: Path, facts: dict[str, Any], wall_s: float) -> None:
        """Put a stage's folder in its place, replacing an older one."""
        distributed.barrier()  # a stage that a rank has not finished is not finished
        distributed.on_first_rank(lambda: self._place(stage, partial, facts, wall_s))
        if not distributed.is_first():
            shutil.rmtree(partial, ignore_errors=True)

    def _place(self, stage: Stage, partial: Path, facts: dict[str, Any], wall_s: float) -> None:
        record = {
            "stage": stage.name,
            "kind": stage.kind,
            "fingerprint": self.fingerprint(stage),
            "settings": self.settings(stage),
            "wall_s": round(wall_s, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        }
        write_text(partial / "stage.json", json.dumps(record, indent=2) + "\n")
        shutil.rmtree(partial / JOURNAL, ignore_errors=True)
        self.lineages[stage.name].write(partial, self.path)
        target = self.stage_dir(stage.name)
        if target.exists():
            # A folder cannot be replaced in one step: the old one steps aside first.
            old = self.path / f".{stage.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)

    def read_record(self, name: str) -> dict | None:
        """`stage.json` of a finished stage, or None."""
        try:
            return json.loads((self.stage_dir(name) / "stage.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.stage_dir(name)}/stage.json: cannot be read: {error}"
            ) from error

    def settings(self, stage: Stage) -> dict[str, Any]:
        """What the stage is made from: its own section and the shared keys, resolved."""
        shared = self.recipe.model_dump(mode="json", include=set(SHARED_KEYS), by_alias=True)
        return {**shared, **stage.model_dump(mode="json", by_alias=True)}

    def fingerprint(self, stage: Stage) -> str:
        """Changes when the stage's settings do, or those of anything that it starts from."""
        parents = [
            self.fingerprint(parent)
            for name in stage.parents()
            if (parent := self.recipe.stage(name)) is not None
        ]
        text = json.dumps([self.settings(stage), parents], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_finished(self, stage: Stage) -> bool:
        """Raises UserError if the stage was finished with other settings than it has now."""
        record = self.read_record(stage.name)
        if record is None:
            return False
        if record["fingerprint"] == self.fingerprint(stage):
            return True
        now, then = self.settings(stage), record["settings"]
        changed = [key for key in {**now, **then} if now.get(key) != then.get(key)]
        what = f"other settings ({', '.join(sorted(changed))})" if changed else "another parent"
        raise UserError(
            f"{self.stage_dir(stage.name)}: finished with {what} than the recipe has now; "
            f"add --redo {stage.name} to make it and what follows again, or change the run's name"
        )

    def resolve_checkpoint(self, name: str, needed_by: str) -> str:
        """The folder or hub id behind a stage's `from` or an entry of `checkpoints`."""
        stage = self.recipe.stage(name)
        if stage is None:
            folder = Path(name).expanduser()
            if folder.is_dir():
                return str(folder)
            if name.startswith((".", "/", "~")):
                raise UserError(f'stage "{needed_by}": "{name}" is neither a stage nor a folder')
            return name
        if not stage.makes_checkpoint:
            raise UserError(f'stage "{needed_by}": the stage "{name}" makes no checkpoint')
        if not self.is_finished(stage):
            raise UserError(
                f'stage "{needed_by}" starts from "{name}", which has not run: '
                f"run r1pipe {stage.kind} first"
            )
        return str(self.stage_dir(name))


class MetricsLog:
    """`metrics.jsonl` of a stage: one object per step, on disk as soon as the step is over."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self._file.write(dump_row(metrics) + "\n")
        self._file.flush()


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [row for _, row in read_jsonl(path)] if path.exists() else []
