"""Lineage: hashes of a stage's inputs and outputs, checked again by `r1pipe verify`.

Each stage's folder holds `lineage.json`, written last, before the folder takes its place:

    config     the stage's settings and the recipe's shared ones, resolved
    inputs     hashes: each parent checkpoint's files, the rows as loaded and the source of their
               recipe, the source of the reward functions
    parents    hash of every parent stage's lineage.json: a chain back to the first stage
    outputs    hashes of all files in the folder
    r1pipe, packages, git, machine, seed, started, finished   of the process that finished it
    interrupted   the same of the processes before

Every hash is SHA-256. `inputs` does not depend on time or place: equal runs have equal inputs.
Paths outside the run are cut to their last part and nothing is read from the environment, so the
file can be published. It proves nothing about itself unless a later stage has its hash. Imports no
torch.
"""

import fnmatch
import importlib.util
import json
import os
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from r1pipe import __version__
from r1pipe.config.base import ProblemSet, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.data.problems import find_recipe
from r1pipe.models.hub_cache import find_revision, find_snapshot
from r1pipe.runs.environment import PACKAGE, describe_machine, list_versions, read_commit
from r1pipe.runs.hashes import hash_file, hash_files, hash_rows, hash_sources, hash_tree
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from r1pipe.utils.imports import import_named
from r1pipe.utils.jsonl import read_json, write_text

RECORD = "stage.json"
FILE = "lineage.json"
CHECKPOINT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab*", "merges.txt", "*.model", "*.py",
)  # fmt: skip
"""The model's files: a stage's other files differ from run to run."""
NOT_OUTPUTS = (FILE, "checkpoints")
"""Not hashed: this record, and what the stage resumes from, deleted when it is finished."""
ELSEWHERE = "..."
"""Replaces the folders of a path outside the run."""


class Lineage:
    """One stage's, while it runs. Code is hashed at its begin: it may be edited meanwhile."""

    def __init__(self, recipe: Recipe, stage: Stage):
        self.recipe, self.stage = recipe, stage
        self.code = hash_code(stage)
        self.process = {
            "r1pipe": {"version": __version__, "sha256": hash_tree(hash_sources(PACKAGE))},
            "git": read_commit(),
            "packages": list_versions(),
            "machine": describe_machine(),
            "started": now(),
        }
        self._interrupted: list[dict[str, Any]] = []
        self._data: dict[str, dict[str, Any]] = {}

    def enter(self, folder: Path) -> None:
        """Write this process to the folder's record, after the interrupted ones."""
        left = read_lineage(folder) or {}
        if "process" in left:
            self._interrupted = [*left["interrupted"], left["process"]]
        code = {package: hash_tree(hashes) for package, hashes in self.code.items()}
        present = {"process": {**self.process, "code": code}, "interrupted": self._interrupted}
        write_json(folder / FILE, present)

    def add_data(self, source: ProblemSet, problems: list[Problem]) -> None:
        """Record rows that the stage has loaded: to train on, to sample from or held out."""
        entry = {
            "source": describe_source(source),
            "rows": len(problems),
            "sha256": hash_rows(problems),
        }
        if source.recipe is not None:
            entry["recipe_sha256"] = hash_file(find_recipe(source.recipe))
        self._data[json.dumps(entry["source"])] = entry

    def write(self, folder: Path, run: Path) -> None:
        """Write lineage.json of the stage in `folder`. `run`: the folder of finished stages."""
        shared = self.recipe.model_dump(mode="json", exclude={"stages", "runs_dir"}, by_alias=True)
        settings = self.stage.model_dump(mode="json", by_alias=True)
        checkpoints = list_checkpoints(settings)
        traces = [source.stage for source in self.stage.problem_sets() if source.stage]
        parents = {name: run / name / FILE for name in (*checkpoints, *traces)}
        record = {
            "stage": self.stage.name,
            "kind": self.stage.kind,
            "seed": self.recipe.seed,
            "config": hide_places({**shared, "stage": settings}),
            "inputs": {
                "checkpoints": [hash_checkpoint(name, run) for name in checkpoints],
                "data": list(self._data.values()),
                "code": self.code,
            },
            "parents": hash_files({n: path for n, path in parents.items() if path.exists()}),
            "outputs": hash_folder(folder),
            **self.process,
            "finished": now(),
            "interrupted": self._interrupted,
        }
        write_json(folder / FILE, record)


def find_run(name: str) -> Path:
    """The folder of a run, by its path or by its name in runs/. Raises UserError."""
    for folder in (Path(name), Path("runs") / name):
        if list_stages(folder):
            return folder
    raise UserError(f"{name}: no such run, in {Path.cwd()} or its runs/: a folder with stages")


def list_stages(run: Path) -> list[str]:
    """Finished stages in a run's folder, in the order in which they were finished."""
    if not run.is_dir():
        return []
    folders = [path.parent for path in run.glob(f"[!.]*/{RECORD}")]
    folders += [path.parent for path in run.glob(f"[!.]*/{FILE}") if path.parent not in folders]
    return [folder.name for folder in sorted(folders, key=finish_time)]


def finish_time(folder: Path) -> tuple[str, int]:
    """In seconds, then by the file system's clock."""
    record = read_lineage(folder) or {}
    return record.get("finished", ""), (folder / FILE).stat().st_mtime_ns if record else 0


def hash_folder(folder: Path) -> dict[str, str]:
    """By relative path, of every file that the stage has made."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return hash_files({str(n): p for n, p in files.items() if n.parts[0] not in NOT_OUTPUTS})


def hash_checkpoint(name: str, run: Path) -> dict[str, Any]:
    """The files of a model that a stage has read. An earlier stage's hashes are taken from its own
    lineage, unless the files are newer."""
    files = find_checkpoint_files(name, run) or {}
    record = read_lineage(run / name)
    known, written = {}, 0
    if record is not None:
        known, written = record.get("outputs", {}), (run / name / FILE).stat().st_mtime_ns
    hashes = {
        file: known[file]
        if file in known and path.stat().st_mtime_ns <= written
        else hash_file(path)
        for file, path in sorted(files.items())
    }
    revision = find_revision(files)
    return {
        "name": hide_places(name),
        **({"revision": revision} if revision else {}),
        "files": hashes,
    }


# Code


def hash_code(stage: Stage) -> dict[str, dict[str, str]]:
    """Source hashes of the stage's reward functions and custom loss, by package: all modules of a
    function's package, since it may call any of them."""
    names = stage.functions_used()
    packages = {package for name in names for package in list_packages(name)}
    return {package: find_sources(package) for package in sorted(packages)}


def list_packages(function_name: str) -> set[str]:
    """The packages, or modules outside any, where a function is found and where it is written."""
    found = import_named("function", function_name, lambda x: x is not None)
    names = {function_name.rpartition(".")[0]}
    if callable(found):  # a LossType has the module of its class
        names.add(getattr(found, "__module__", None))
    modules = (importlib.import_module(name) for name in names if name)
    return {module.__package__ or module.__name__ for module in modules}


def find_sources(package: str) -> dict[str, str]:
    """Hashes of a package's or module's Python files. Imports nothing."""
    name, *rest = package.split(".")
    spec = importlib.util.find_spec(name)
    for part in rest:
        if spec is None:
            break
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {Path(spec.origin).name: hash_file(Path(spec.origin))}
    folders = map(Path, spec.submodule_search_locations)
    return {name: digest for folder in folders for name, digest in hash_sources(folder).items()}


# Files


def list_checkpoints(settings: dict[str, Any]) -> list[str]:
    """Models that a stage of these settings reads: stages' names, folders, hub ids."""
    teachers = dict.fromkeys(settings.get("teachers", {}).values())
    start = (settings.get("from"), *teachers, settings.get("student"))
    names = [*start, *settings.get("checkpoints", ())]
    return [name for name in names if isinstance(name, str)]


def find_checkpoint_files(name: str, run: Path) -> dict[str, Path] | None:
    """A checkpoint's files by name; None if it is not there (a hub id: not in the hub's cache)."""
    folder = run / name
    if not (folder / RECORD).exists():
        folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = find_snapshot(name)
    if folder is None:
        return None
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    return {n: p for n, p in files.items() if any(fnmatch.fnmatch(n, c) for c in CHECKPOINT_FILES)}


# Records


def read_record(folder: Path) -> dict[str, Any] | None:
    """A stage's `stage.json`; None if there is none. Raises UserError if it is broken."""
    return read_json(folder / RECORD, missing_ok=True)


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """None if it is missing or broken."""
    try:
        record = read_json(folder / FILE)
    except UserError:
        return None  # `verify` reports it, with what else is wrong
    return record if isinstance(record, dict) else None


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def describe_source(source: ProblemSet) -> dict[str, Any]:
    # Without what an eval stage adds: that does not change the rows.
    return hide_places(source.model_dump(mode="json", include=set(ProblemSet.model_fields)))


def hide_places(value: Any) -> Any:
    """`value` with every path outside the working folder cut to its last part."""
    if isinstance(value, dict):
        return {key: hide_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hide_places(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return os.path.join(ELSEWHERE, os.path.basename(value.rstrip("/")))
    return value


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
