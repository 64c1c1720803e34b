"""Hashes of files, folders, rows and sources."""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from r1pipe.data.problems import COLUMNS
from r1pipe.types import Problem


def hash_file(path: Path) -> str:
    """SHA-256, computed once per process unless the file changes: two stages may start from the
    same 60 GB."""
    facts = path.stat()
    return hash_version(path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def hash_version(path: Path, *version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: dict[str, Path]) -> dict[str, str]:
    return {name: hash_file(path) for name, path in sorted(files.items())}


def hash_tree(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def hash_rows(problems: Iterable[Problem]) -> str:
    """Of problems as loaded, whatever file they come from."""
    digest = hashlib.sha256()
    for problem in problems:
        row = [getattr(problem, column) for column in COLUMNS]
        row += [problem.extra] if problem.extra else []
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def hash_sources(folder: Path) -> dict[str, str]:
    files = {f"{folder.name}/{p.relative_to(folder)}": p for p in folder.rglob("*.py")}
    return hash_files(files)
