"""A run read from disk: stage folders, what each comes from, how each was evaluated.

For commands that read a run without its recipe and without locking it. Imports no torch.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from r1pipe import __version__
from r1pipe.config.base import STAGE_TYPES, Stage
from r1pipe.config.evals import EvalSet
from r1pipe.runs.folder import SHARED_KEYS
from r1pipe.runs.lineage import find_run, list_stages, read_lineage, read_record
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder, finished or in progress, and its `stage.json`."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["stage"]

    @property
    def kind(self) -> str:
        return self.record["kind"]

    @property
    def is_running(self) -> bool:
        """In progress, or interrupted."""
        return self.folder.name.startswith(".")

    @property
    def settings(self) -> dict[str, Any]:
        """The stage's section of the recipe, resolved, and the recipe's shared keys."""
        return self.record["settings"]

    @property
    def config(self) -> dict[str, Any]:
        """The recipe as the stage saw it, from its lineage: without outside paths, so it can be
        published. Empty if it has no lineage."""
        return (read_lineage(self.folder) or {}).get("config", {})

    @cached_property
    def section(self) -> Stage:
        """The stage's section of the recipe."""
        values = {k: v for k, v in self.settings.items() if k not in SHARED_KEYS}
        try:
            return STAGE_TYPES[self.kind].model_validate(values)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"{self.folder}/stage.json: settings.{key}: unknown to r1pipe {__version__}: "
                "make the stage again, or use the version that made it"
            ) from error

    @property
    def parents(self) -> list[str]:
        """Stages, folders and hub ids that its result comes from; none of a stage that measures."""
        section = self.section
        if section.measures:
            return []
        traces = [source.stage for source in section.problem_sets()]
        parents = (section.weights_from, *section.taught_by, *traces)
        return list(dict.fromkeys(parent for parent in parents if parent is not None))

    def read_summary(self) -> list[dict[str, Any]]:
        """An eval stage's."""
        return read_summary(self.folder)


@dataclass(frozen=True)
class Evaluation:
    """An entry of an eval stage's summary: a checkpoint on a set of problems."""

    stage: StageFolder
    entry: dict[str, Any]

    @property
    def data(self) -> EvalSet:
        """The set of problems."""
        sets = self.stage.section.data
        return next(data for data in sets if data.label == self.entry["dataset"])


@dataclass(frozen=True)
class FinishedRun:
    """The finished stages of a run, each after its parents."""

    path: Path
    stages: dict[str, StageFolder]

    def lineage(self, name: str) -> list[StageFolder]:
        """The stage and its ancestors, each after its parents."""
        return sort_stages(self.stages, [name])

    def base_model(self, name: str) -> str | None:
        """The folder or hub id that the stage's weights descend from; None: random weights."""
        while (stage := self.stages.get(name)) is not None:
            if stage.section.weights_from is None:
                return None
            name = stage.section.weights_from
        return name

    def evaluations(self, name: str) -> list[Evaluation]:
        """Those of the stage's checkpoint, since it was last made."""
        made = self.stages[name].record["finished"]
        return [
            Evaluation(stage, entry)
            for stage in self.stages.values()
            if stage.section.measures and stage.record["finished"] >= made
            for entry in stage.read_summary()
            if entry["stage"] == name
        ]


def read_run(path: Path) -> FinishedRun:
    """Raises UserError if the folder holds no finished stage."""
    stages = list(read_stages(path / name for name in list_stages(path)))
    if not stages:
        raise UserError(f"{path}: no such run: a run's folder holds finished stages")
    stages.sort(key=lambda stage: stage.record["finished"])
    by_name = {stage.name: stage for stage in stages}
    return FinishedRun(path, {s.name: s for s in sort_stages(by_name, list(by_name))})


def find_stages(run: Path) -> list[StageFolder]:
    """Finished and in progress, each after its parents. Raises UserError if there is none."""
    folders = [run / name for name in list_stages(run)]
    folders += [path.parent for path in sorted(run.glob(".*.partial/stage.json"))]
    stages = list(read_stages(folders))
    if not stages:
        raise UserError(f"{run}: no such run, in {Path.cwd()} or its runs/: a folder with stages")
    stages.sort(key=lambda stage: "~" if stage.is_running else stage.record.get("finished", ""))
    # A stage being made again replaces the old one.
    return list({stage.name: stage for stage in stages}.values())


def read_stages(folders: Iterable[Path]) -> Iterator[StageFolder]:
    records = ((folder, read_record(folder)) for folder in folders)
    return (StageFolder(folder, record) for folder, record in records if record is not None)


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """`summary.json` of a run or an eval stage, an entry per checkpoint and set; empty if there is
    none."""
    return read_json(folder / "summary.json", missing_ok=True) or []


def sort_stages(stages: dict[str, StageFolder], names: list[str]) -> list[StageFolder]:
    """The named stages in this order, each after its ancestors."""
    found: dict[str, StageFolder] = {}

    def visit(name: str) -> None:
        if name in stages and name not in found:
            for parent in stages[name].parents:
                visit(parent)
            found[name] = stages[name]

    for name in names:
        visit(name)
    return list(found.values())


def find_finished(target: Path) -> tuple[FinishedRun, StageFolder]:
    """The run and the stage named by RUN or RUN/STAGE, here or in runs/. RUN alone: its last stage
    with a checkpoint.

    Raises UserError for a stage that is not finished or has no checkpoint.
    """
    name = ""
    parents = (target.parent, "runs" / target.parent)
    if not any(map(list_stages, (target, "runs" / target))) and any(map(list_stages, parents)):
        target, name = target.parent, target.name
    run = read_run(find_run(str(target)))
    made = {stage.name: stage for stage in run.stages.values() if stage.section.makes_checkpoint}
    if not made:
        raise UserError(f"{run.path}: no stage that makes a checkpoint is finished")
    if not name:
        return run, list(made.values())[-1]
    if name in run.stages and name not in made:
        raise UserError(f"{run.path / name}: makes no checkpoint; there are {', '.join(made)}")
    if name not in made:
        near = difflib.get_close_matches(name, made, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(made)}"
        raise UserError(f"{run.path / name}: no finished stage of that name; {hint}")
    return run, made[name]
