"""The run folder: who may write it, which stages are finished, how a stage appears in it.

    runs/<name>/
      <stage>/            a finished stage: checkpoint, metrics.jsonl, problems.jsonl, stage.json,
                          lineage.json
      .<stage>.partial/   a stage in progress; after an interruption, what it can resume from:
                          checkpoints/ (trainer/checkpoints.py), journal/ (rollout/journal.py)
      summary.json        one object per evaluated checkpoint

A stage's folder appears by one rename, after everything in it is written.
"""

import difflib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from r1pipe.config.base import Saving, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.models.hub_cache import find_snapshot
from r1pipe.runs.lineage import RECORD, Lineage, read_record
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_text

SHARED_KEYS = ("seed", "dtype", "attn_implementation", "ngram", "chat_template")
"""Recipe settings that change a stage's result. The engine's only bound what fits."""

MAX_CHANGES = 3
"""Changed keys that an error names."""

JOURNAL = "journal"
"""A stage's samples (rollout/journal.py), until it is finished."""
CHECKPOINTS = "checkpoints"
"""What a training stage resumes from (trainer/checkpoints.py), until it is finished."""


class RunFolder:
    """The folder of one run, held by one process at a time. Use as a context manager.

    In a run of several processes rank 0 holds and writes it; the other ranks write to temporary
    folders, and must be able to read it.

    Raises UserError if another process holds it or it cannot be written.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path = recipe.run_dir
        self.lineages: dict[str, Lineage] = {}
        """By name of the stages that have begun."""
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

    def partial_dir(self, name: str) -> Path:
        """The folder of a stage in progress, the same on every rank."""
        return self.path / f".{name}.partial"

    def begin(self, stage: Stage, redo: bool = False) -> Path:
        """The stage's partial folder: an interrupted run's, or, also with `redo`, an empty one.

        Raises UserError if it was left by other settings.
        """
        lineage = self.lineages[stage.name] = Lineage(self.recipe, stage)
        distributed.on_first_rank(lambda: self._begin(stage, redo))
        if distributed.is_first():
            lineage.enter(self.partial_dir(stage.name))
            return self.partial_dir(stage.name)
        return Path(tempfile.mkdtemp(prefix="r1pipe-"))

    def _begin(self, stage: Stage, redo: bool) -> None:
        partial = self.partial_dir(stage.name)
        record = None if redo else read_record(partial)
        if not redo and find_steps(partial / CHECKPOINTS):
            if record is None:
                raise UserError(
                    f"{partial}: {RECORD} is gone, so the settings of its checkpoints are not "
                    "known; put it back to resume, or add --redo to discard that work"
                )
            if change := self._find_change(stage, record):
                raise UserError(
                    f"{partial}: interrupted with {change} than the recipe has now; put it back to "
                    "resume, add --redo to discard that work, or change the run's name"
                )
            return
        partial.mkdir(exist_ok=True)
        for path in partial.iterdir():
            if path.name == JOURNAL and not redo:
                continue  # it checks its own settings
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        write_text(partial / RECORD, json.dumps(self._describe(stage), indent=2) + "\n")

    def abandon(self, partial: Path, keep: bool = False) -> int:
        """After a failure: delete the partial folder unless resumable, or `keep`. Returns
        the step of the newest checkpoint, 0 if there is none."""
        if not can_resume(partial) and not (keep and distributed.is_first()):
            shutil.rmtree(partial, ignore_errors=True)
        return max(find_steps(partial / CHECKPOINTS), default=0)

    def finish(self, stage: Stage, partial: Path, facts: dict[str, Any], wall_s: float) -> None:
        """Put a stage's folder in its place, replacing an older one."""
        distributed.barrier()  # finished on every rank
        distributed.on_first_rank(lambda: self._place(stage, partial, facts, wall_s))
        if not distributed.is_first():
            shutil.rmtree(partial, ignore_errors=True)

    def _place(self, stage: Stage, partial: Path, facts: dict[str, Any], wall_s: float) -> None:
        record = {
            **self._describe(stage),
            "wall_s": round(wall_s, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        }
        write_text(partial / RECORD, json.dumps(record, indent=2) + "\n")
        shutil.rmtree(partial / JOURNAL, ignore_errors=True)
        # safetensors makes its files readable by their owner only.
        for path in partial.rglob("*.safetensors"):
            path.chmod((partial / RECORD).stat().st_mode)
        self.lineages[stage.name].write(partial, self.path)
        target = self.stage_dir(stage.name)
        if target.exists():
            # A folder cannot be replaced in one step.
            old = self.path / f".{stage.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
        shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)

    def _describe(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage.name,
            "kind": stage.kind,
            "settings": self.settings(stage),
            "parents": self._find_parents(stage),
        }

    def read_record(self, name: str) -> dict | None:
        """`stage.json` of a finished stage, or None."""
        return read_record(self.stage_dir(name))

    def settings(self, stage: Stage) -> dict[str, Any]:
        """The stage's own section and the shared keys, resolved, without how often it saves and the
        breaker's limits, which a resumed run may change."""
        shared = self.recipe.model_dump(mode="json", include=set(SHARED_KEYS), exclude_none=True)
        saving = set(Saving.model_fields)
        left_out = {"train": saving} | dict.fromkeys({*saving, "breaker"}, True)
        own = stage.model_dump(mode="json", by_alias=True, exclude=left_out)
        for part in (own, own.get("traces") or {}):
            if "rewards" in part:
                part["rewards"] = [reward.decisive() for reward in stage.rewards_used()]
        return {**shared, **own}

    def is_finished(self, stage: Stage) -> bool:
        """Raises UserError if the stage was finished with other settings than it has now."""
        record = self.read_record(stage.name)
        if record is None:
            return False
        if change := self._find_change(stage, record):
            raise UserError(
                f"{self.stage_dir(stage.name)}: finished with {change} than the recipe has now; "
                f"add --redo {stage.name} to make it and what follows again, or change the run's "
                "name"
            )
        return not self._is_being_redone(stage)

    def _is_being_redone(self, stage: Stage) -> bool:
        """Whether an interrupted --redo can be resumed."""
        partial = self.partial_dir(stage.name)
        begun = read_record(partial) if can_resume(partial) else None
        return begun is not None and not self._find_change(stage, begun)

    def _find_change(self, stage: Stage, record: dict[str, Any]) -> str:
        """What differs from when the stage was begun; "" if nothing."""
        now, then = (dict(flatten(s)) for s in (self.settings(stage), record["settings"]))
        changed = sorted(key for key in {**now, **then} if now.get(key) != then.get(key))
        # A key newer than the record, and not set: the stage was made with its default.
        own = dict(flatten(stage.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
        left_open = {key for key in changed if key not in then and key not in own}
        # auto depends on the machine, which may be another one when a stage is resumed.
        if '"auto"' in (now.get("attn_implementation"), then.get("attn_implementation")):
            left_open.add("attn_implementation")
        changed = [key for key in changed if key not in left_open]
        if changed:
            values = {key: (then.get(key, "not set"), now.get(key, "not set")) for key in changed}
            shown = [f"{key}: {old}, now {new}" for key, (old, new) in values.items()][:MAX_CHANGES]
            more = f", and {len(changed) - MAX_CHANGES} more" if changed[MAX_CHANGES:] else ""
            return f"other settings ({', '.join(shown)}{more})"
        parents = self._find_parents(stage)
        known = record.get("parents") or parents
        if again := [name for name in {**known, **parents} if parents.get(name) != known.get(name)]:
            return f"another parent ({', '.join(again)}, made again since)"
        for name in stage.parents():
            parent, made = self.recipe.stage(name), self.read_record(name)
            if parent and made and self._find_change(parent, made):
                return f"another parent (other settings of {name})"
        return ""

    def _find_parents(self, stage: Stage) -> dict[str, str]:
        """When each parent was finished, by name: made again, it is another parent."""
        records = {
            name: self.read_record(name) for name in stage.parents() if self.recipe.stage(name)
        }
        return {name: record["finished"] for name, record in records.items() if record}

    def resolve_checkpoint(self, name: str, needed_by: str) -> str:
        """The folder or hub id behind a stage's `from` or an entry of `checkpoints`."""
        stage = self.recipe.stage(name)
        if stage is None:
            if mistake := find_mistake(name, self.recipe):
                raise UserError(f'stage "{needed_by}": {mistake}')
            folder = Path(name).expanduser()
            return str(folder) if folder.is_dir() else name
        if not stage.makes_checkpoint:
            raise UserError(f'stage "{needed_by}": the stage "{name}" makes no checkpoint')
        if not self.is_finished(stage):
            raise UserError(
                f'stage "{needed_by}" starts from "{name}", which has not run: '
                f"run r1pipe {stage.kind} first"
            )
        return str(self.stage_dir(name))


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value as JSON) of every leaf of nested settings: rewards[0].weight."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from flatten(inner, f"{key}[{number}]")
    else:
        yield key, json.dumps(value)


HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def find_mistake(name: str, recipe: Recipe) -> str:
    """What is wrong with a checkpoint's name that is no stage's; "" for a checkpoint folder or a
    possible hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").exists():
            return ""
        inside = sorted(file.parent for file in folder.glob("*/config.json"))
        hint = f"; did you mean {', or '.join(map(str, inside[:3]))}?" if inside else ""
        adapter = (folder / "adapter_config.json").exists()
        why = "is an adapter: merge it into its base model" if adapter else "has no config.json"
        return f'"{name}" {why}{hint}'
    if folder.is_file():
        how = ": r1pipe import-gguf makes a checkpoint of it" if folder.suffix == ".gguf" else ""
        return f'"{name}" is a file, not a checkpoint folder{how}'
    parent, last = folder.parent, folder.name
    named = [stage.name for stage in recipe.stages if stage.makes_checkpoint]
    near = difflib.get_close_matches(name, named, n=1, cutoff=0.75)
    is_typo = bool(near) and abs(len(near[0]) - len(name)) < 2
    if not near:
        siblings = [file.parent.name for file in parent.glob("*/config.json")]
        near = [str(parent / s) for s in difflib.get_close_matches(last, siblings, n=1)]
    # runs/demo/sft is the folder of a stage, and org/name, or name, is the hub's.
    is_local = len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()
    if HUB_ID.fullmatch(name) and not is_local and not (is_typo and not find_snapshot(name)):
        return ""
    hint = f"did you mean {near[0]}?" if near else f"there is no {folder.absolute()}"
    return f'"{name}" is neither a stage nor a checkpoint folder; {hint}'


def can_resume(partial: Path) -> bool:
    """Whether an interrupted stage has left checkpoints or samples."""
    return bool(find_steps(partial / CHECKPOINTS)) or (partial / JOURNAL).exists()


def find_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a folder, complete or not, oldest first."""
    names = (path.name.removeprefix("step-") for path in checkpoints.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())
