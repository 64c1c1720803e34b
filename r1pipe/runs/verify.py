"""`r1pipe verify`: compares a run's files, parents, data and code with its lineage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import find_recipe, load_problems
from r1pipe.runs.hashes import hash_file, hash_files, hash_rows, hash_tree
from r1pipe.runs.lineage import (
    FILE,
    describe_source,
    find_checkpoint_files,
    find_sources,
    hash_folder,
    list_checkpoints,
    list_stages,
    read_lineage,
    read_record,
)
from r1pipe.utils.errors import UserError

MOVED = "rewards/mathematics.py"
"""A module that only lineages from before `rewards/` was split into packages have."""


@dataclass(frozen=True)
class Finding:
    """Something about a stage that differs from its lineage, or could not be compared."""

    stage: str
    what: str
    is_problem: bool = True


def verify_run(run: Path) -> Iterator[tuple[str, list[Finding]]]:
    """Each stage of a run with its findings."""
    for name in list_stages(run):
        yield name, verify_stage(run / name)


def verify_stage(folder: Path) -> list[Finding]:
    """Compare a finished stage's files, parents, data and reward code with its lineage.

    Of a parent only its own files are compared: verify the parent, too, where that matters.
    """
    record = read_lineage(folder)
    try:
        return list(find_changes(folder, record))
    except (KeyError, TypeError, AttributeError):  # no record, or one edited by hand
        what = f"no {FILE} that can be read: what it was made from is unknown"
        return [Finding(folder.name, what)]


def find_changes(folder: Path, record: dict[str, Any]) -> Iterator[Finding]:
    name = folder.name
    for what in list_differences(record["outputs"], hash_folder(folder)):
        yield Finding(name, what)
    try:
        settings = (read_record(folder) or {}).get("settings", {})
    except UserError:  # its hash tells
        settings = {}
    yield from verify_parents(folder, record, settings)
    yield from verify_data(name, record["inputs"]["data"], settings)
    yield from verify_code(name, record)


def verify_code(name: str, record: dict[str, Any]) -> Iterator[Finding]:
    for package, hashes in record["inputs"]["code"].items():
        now = find_sources(package)
        if MOVED in hashes and MOVED not in now:
            version = record["r1pipe"]["version"]
            commit = (record["git"] or {}).get("commit", "unknown commit")[:12]
            what = f"the modules of {package} have moved since r1pipe {version} ({commit})"
            yield Finding(name, f"code of its rewards not compared: {what}", is_problem=False)
        else:
            for what in list_differences(hashes, now):
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
        files = find_checkpoint_files(place, run)
        if files is None:
            is_problem = name in record["parents"]
            yield Finding(stage, f"its parent {name}: gone, so not compared", is_problem)
            continue
        for what in list_differences(then["files"], hash_files(files)):
            remade.add(name)
            yield Finding(stage, f"its parent {name}: {what} since it was used")
    for name, digest in record["parents"].items():
        path = run / name / FILE
        if name not in remade and path.exists() and hash_file(path) != digest:
            yield Finding(stage, f"its parent {name}: {FILE} changed since it was used")


def verify_data(name: str, entries: list[dict], settings: dict) -> Iterator[Finding]:
    """Load the stage's rows again, if their recipe is unchanged. Held-out rows are compared for the
    eval stage that owns them."""
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


def list_differences(then: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """Such as "a.json changed"."""
    for name in sorted({*then, *now}):
        if name not in now:
            yield f"{name} missing"
        elif name not in then:
            yield f"{name} added"
        elif then[name] != now[name]:
            yield f"{name} changed"
