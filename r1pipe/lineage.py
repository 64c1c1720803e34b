"""Lineage: what a stage was made from, with what, and what it made; `r1pipe verify` looks again.

Each stage's folder holds `lineage.json`, written last, before the folder takes its place:

    config     the stage's settings and the recipe's shared ones, resolved
    inputs     hashes: each parent checkpoint's files, the data's rows as they were loaded and the
               source of their recipe, the source of the reward functions
    parents    the lineage.json of every parent stage, by hash: a chain back to the first stage
    outputs    hashes of all files of the folder
    r1pipe, packages, git, machine, seed, started, finished: of the process that finished it
    interrupted   the same of those that worked on it before

Every hash is SHA-256. `inputs` holds nothing that depends on time or place: equal runs have equal
ones. Paths outside the run are cut to their last part, and nothing is read from the environment:
the file can be published. What it cannot show is that it was not written by hand itself, unless a
later stage names its hash. Imports no torch.
"""

import fnmatch
import functools
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from r1pipe import __version__
from r1pipe.config import Grpo, ProblemSet, Recipe, Stage
from r1pipe.environment import PACKAGE, describe_machine, list_versions, read_commit
from r1pipe.errors import UserError
from r1pipe.problems import COLUMNS, find_recipe, load_problems
from r1pipe.records import Problem, read_json, write_text
from r1pipe.scoring import find_reward, list_rewards

FILE = "lineage.json"
CHECKPOINT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab*", "merges.txt", "*.model", "*.py",
)  # fmt: skip
"""What of a folder is the model: the other files of a stage differ from run to run."""
NOT_OUTPUTS = (FILE, "checkpoints")
"""Of a stage's folder: this record itself, and what an interrupted stage goes on from, which is
thrown away when it is finished."""
ELSEWHERE = "..."
"""In place of the folders of a path that lies outside the run."""


class Lineage:
    """Of one stage while it runs. Code is looked at when it begins: a person may go on editing."""

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
        """Note in the folder which process works there, beside those that were interrupted: their
        part of the stage was made with what they had."""
        left = read_lineage(folder) or {}
        if "process" in left:
            self._interrupted = [*left["interrupted"], left["process"]]
        code = {package: hash_tree(hashes) for package, hashes in self.code.items()}
        present = {"process": {**self.process, "code": code}, "interrupted": self._interrupted}
        write_json(folder / FILE, present)

    def add_data(self, source: ProblemSet, problems: list[Problem]) -> None:
        """Note rows that the stage has loaded, to train on, to sample from or to hold out."""
        entry = {
            "source": describe_source(source),
            "rows": len(problems),
            "sha256": hash_rows(problems),
        }
        if source.recipe is not None:
            entry["recipe_sha256"] = hash_file(find_recipe(source.recipe))
        self._data[json.dumps(entry["source"])] = entry

    def write(self, folder: Path, run: Path) -> None:
        """lineage.json of the stage whose files lie in `folder`; finished stages lie in `run`."""
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


@dataclass(frozen=True)
class Finding:
    """Something about a stage that is not as its lineage says, or could not be looked at."""

    stage: str
    what: str
    is_problem: bool = True


def find_run(name: str) -> Path:
    """The folder of a run, by its path or by its name in runs/. Raises UserError."""
    for folder in (Path(name), Path("runs") / name):
        if list_stages(folder):
            return folder
    raise UserError(f"{name}: no such run, in {Path.cwd()} or its runs/: a folder with stages")


def list_stages(run: Path) -> list[str]:
    """The stages that stand in a run's folder, the first that was finished first."""
    if not run.is_dir():
        return []
    folders = [path.parent for path in run.glob("[!.]*/stage.json")]
    folders += [path.parent for path in run.glob(f"[!.]*/{FILE}") if path.parent not in folders]
    return [folder.name for folder in sorted(folders, key=finish_time)]


def finish_time(folder: Path) -> tuple[str, int]:
    """To the second, then by the clock of the disk."""
    record = read_lineage(folder) or {}
    return record.get("finished", ""), (folder / FILE).stat().st_mtime_ns if record else 0


def verify_run(run: Path) -> Iterator[tuple[str, list[Finding]]]:
    """Each stage of a run with what is wrong with it."""
    for name in list_stages(run):
        yield name, verify_stage(run / name)


def verify_stage(folder: Path) -> list[Finding]:
    """Compute a finished stage's hashes again: its files, parents, data and reward code.

    Nothing of a parent but its own files is looked at: verify it, too, where that matters.
    """
    record = read_lineage(folder)
    try:
        return list(find_changes(folder, record))
    except (KeyError, TypeError, AttributeError):  # no record, or one that somebody has been at
        what = f"no {FILE} that can be read: nobody knows what it was made from"
        return [Finding(folder.name, what)]


def find_changes(folder: Path, record: dict[str, Any]) -> Iterator[Finding]:
    name = folder.name
    for what in compare(record["outputs"], hash_folder(folder)):
        yield Finding(name, what)
    settings = read_settings(folder)
    yield from verify_parents(folder, record, settings)
    yield from verify_data(name, record["inputs"]["data"], settings)
    for package, hashes in record["inputs"]["code"].items():
        for what in compare(hashes, find_sources(package)):
            yield Finding(name, f"code of its rewards: {what} since it was used")
        for process in record["interrupted"]:
            if process["code"].get(package) != hash_tree(hashes):
                what = f"its part begun {process['started']} had another {package}"
                yield Finding(name, f"code of its rewards: {what}")


def verify_parents(folder: Path, record: dict, settings: dict) -> Iterator[Finding]:
    stage, run = folder.name, folder.parent
    remade = set()
    for place, then in zip(list_checkpoints(settings), record["inputs"]["checkpoints"]):
        name = then["name"]
        files = find_checkpoint(place, run)
        if files is None:
            is_problem = name in record["parents"]
            yield Finding(stage, f"its parent {name}: gone, so not compared", is_problem)
            continue
        for what in compare(then["files"], hash_files(files)):
            remade.add(name)
            yield Finding(stage, f"its parent {name}: {what} since it was used")
    for name, digest in record["parents"].items():
        path = run / name / FILE
        if name not in remade and path.exists() and hash_file(path) != digest:
            yield Finding(stage, f"its parent {name}: {FILE} changed since it was used")


def verify_data(name: str, entries: list[dict], settings: dict) -> Iterator[Finding]:
    """Load the stage's own rows again, if their recipe is still the same. Held-out rows are the
    own ones of an eval stage."""
    own = settings.get("data") or settings.get("tokenizer", {}).get("data") or []
    for values in own if isinstance(own, list) else [own]:
        known = ProblemSet.model_fields
        source = ProblemSet.model_validate({k: v for k, v in values.items() if k in known})
        entry = next((e for e in entries if e["source"] == describe_source(source)), None)
        if entry is not None and source.recipe is not None:
            yield from verify_rows(name, entry, source)


def verify_rows(name: str, entry: dict, source: ProblemSet) -> Iterator[Finding]:
    try:
        if hash_file(find_recipe(source.recipe)) != entry["recipe_sha256"]:
            yield Finding(name, f"data recipe {source.recipe}: changed since it was used")
        elif hash_rows(load_problems(source)) != entry["sha256"]:
            yield Finding(name, f"data recipe {source.recipe}: gives other rows than were used")
    except UserError as error:
        yield Finding(name, f"data not compared: {error}", is_problem=False)


def compare(then: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """What became of files: "a.json changed"."""
    for name in sorted({*then, *now}):
        if name not in now:
            yield f"{name} missing"
        elif name not in then:
            yield f"{name} added"
        elif then[name] != now[name]:
            yield f"{name} changed"


# Hashes


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read once per process unless it changes: two stages may start from the
    same 60 GB."""
    facts = path.stat()
    return hash_version(path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def hash_version(path: Path, *version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: dict[str, Path]) -> dict[str, str]:
    return {name: hash_file(path) for name, path in sorted(files.items())}


def hash_folder(folder: Path) -> dict[str, str]:
    """Of every file that the stage has made, by path from its folder."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return hash_files({str(n): p for n, p in files.items() if n.parts[0] not in NOT_OUTPUTS})


def hash_tree(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def hash_rows(problems: Iterable[Problem]) -> str:
    """Of problems as they were loaded, whatever made them and in whatever form they were stored."""
    digest = hashlib.sha256()
    for problem in problems:
        row = [getattr(problem, column) for column in COLUMNS]
        row += [problem.extra] if problem.extra else []
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def hash_checkpoint(name: str, run: Path) -> dict[str, Any]:
    """The files of a model that a stage has read: of an earlier stage as its own lineage has them,
    unless they are newer than that."""
    files = find_checkpoint(name, run) or {}
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
    """Sources of the stage's reward functions, and of a loss of the user's own, by package: a
    function's verdict may come from any of its package's modules."""
    names = [reward.function for reward in list_rewards(stage)]
    if isinstance(stage, Grpo) and "." in stage.loss_type:
        names.append(stage.loss_type)
    packages = {package for name in names for package in list_packages(name)}
    return {package: find_sources(package) for package in sorted(packages)}


def list_packages(function_name: str) -> set[str]:
    """The packages, or modules outside any, where a function is found and where it is written."""
    function = find_reward(function_name)
    names = {function_name.rpartition(".")[0], getattr(function, "__module__", None)}
    modules = (importlib.import_module(name) for name in names if name)
    return {module.__package__ or module.__name__ for module in modules}


def find_sources(package: str) -> dict[str, str]:
    """Hashes of a package's or module's Python files, found without importing anything."""
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


def hash_sources(folder: Path) -> dict[str, str]:
    files = {f"{folder.name}/{p.relative_to(folder)}": p for p in folder.rglob("*.py")}
    return hash_files(files)


# Where things lie


def list_checkpoints(settings: dict[str, Any]) -> list[str]:
    """Models that a stage of these settings reads: stages' names, folders, hub ids."""
    names = [settings.get("from"), settings.get("student"), *settings.get("checkpoints", ())]
    return [name for name in names if isinstance(name, str)]


def find_checkpoint(name: str, run: Path) -> dict[str, Path] | None:
    """A checkpoint's files by name; None if it is not there (a hub id: not in the hub's cache)."""
    folder = run / name
    if not (folder / "stage.json").exists():
        folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = find_snapshot(name)
    if folder is None:
        return None
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    return {n: p for n, p in files.items() if any(fnmatch.fnmatch(n, c) for c in CHECKPOINT_FILES)}


def find_snapshot(hub_id: str) -> Path | None:
    """The folder of a model in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def find_revision(files: dict[str, Path]) -> str | None:
    """The commit of a model in the hub's cache: snapshots lie in folders of that name."""
    folder = next((path.parent for path in files.values()), Path())
    return folder.name if folder.parent.name == "snapshots" else None


# Records


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """None if there is none, or nothing that is one."""
    try:
        record = read_json(folder / FILE)
    except UserError:
        return None  # `verify` reports it, with what else is wrong
    return record if isinstance(record, dict) else None


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """A stage's settings with the paths that its lineage leaves out."""
    try:
        return read_json(folder / "stage.json")["settings"]
    except (UserError, KeyError):
        return {}


def describe_source(source: ProblemSet) -> dict[str, Any]:
    # Not what an eval stage adds to it, which is no matter of the rows.
    return hide_places(source.model_dump(mode="json", include=set(ProblemSet.model_fields)))


def hide_places(value: Any) -> Any:
    """`value` with every path that leaves the working folder cut to its last part."""
    if isinstance(value, dict):
        return {key: hide_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hide_places(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return os.path.join(ELSEWHERE, os.path.basename(value.rstrip("/")))
    return value


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
