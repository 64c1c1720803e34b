"""Small files of rows, and what a recipe makes of them."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import Loaded, load_set
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

QA = {"prompt": "q", "answer": "a"}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(recipe: str, split: str = "train", on_broken_row: str = "error", **options) -> Loaded:
    return load_set(
        ProblemSet(recipe=recipe, split=split, options=options, on_broken_row=on_broken_row)
    )


def read_one(recipe: str, path: Path, split: str = "train", **options) -> Problem:
    (problem,) = read(recipe, split, path=str(path), **options).problems
    return problem


def read_error(recipe: str, path: Path, columns: dict, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        read(recipe, path=str(path), columns=columns)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)
