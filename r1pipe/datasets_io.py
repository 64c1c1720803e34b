"""Rows of datasets, from the hub or from local files, and how recipes in data/ turn them into
problems.

A row that cannot be read or mapped does not end the reading: it becomes a `BrokenRow` with its
number, and `problems.read_problems` stops or goes on, as the recipe's YAML says.
"""

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.extract import find_boxes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

MATH_INSTRUCTION = (
    "Reason step by step within <think> and </think>, then give the answer in \\boxed{}."
)
CODE_INSTRUCTION = (
    "Reason step by step within <think> and </think>, then give the program in a ```python block."
)


@dataclass(frozen=True)
class BrokenRow:
    """A row that is not what its dataset promises. `number` counts from 1."""

    number: int
    reason: str


@dataclass(frozen=True)
class FilteredRow:
    """A row in order that the recipe does not want, such as a proof without an answer."""

    reason: str


class Unwanted(Exception):
    """Raised by a recipe's mapping for a row that it filters out; the message says which kind."""


def load_rows(
    name: str,
    table: str | Iterable[dict | BrokenRow],
    split: str,
    make_problem: Callable[[dict], dict],
    *,
    config: str | None = None,
    size: int | None = None,
    skip: int = 0,
    source: str,
) -> Iterator[dict | BrokenRow | FilteredRow]:
    """What most recipes are: each row of a table (what `read_table` takes for a path, or rows)
    through `make_problem`.

    One item per row, in order: a problem with `id` and `source` filled in, or a BrokenRow where
    `make_problem` finds a column missing or of a wrong type, or a FilteredRow where it raises
    `Unwanted`. `size` problems (default: all) after the first `skip`; what is broken or filtered
    counts for neither.
    """
    num_wanted = 0
    rows = read_table(table, split, config) if isinstance(table, str) else table
    for number, row in enumerate(rows, 1):
        if size is not None and num_wanted >= skip + size:
            return
        if isinstance(row, BrokenRow):
            yield row
            continue
        try:
            problem = make_problem(row)
        except Unwanted as reason:
            yield FilteredRow(str(reason))
            continue
        except KeyError as error:
            yield BrokenRow(number, describe_missing(str(error.args[0]), row))
            continue
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            yield BrokenRow(number, f"{type(error).__name__}: {first_line(error)}")
            continue
        num_wanted += 1
        if num_wanted <= skip:
            yield FilteredRow("skipped")
        else:
            yield {"id": f"{name}-{split}-{number - 1}", "source": source, **problem}


def describe_missing(column: str, row: Iterable[str]) -> str:
    """That a table lacks a column, with the nearest that it has."""
    columns = list(map(str, row))
    near = difflib.get_close_matches(column, columns, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(columns)}"
    return f'no column "{column}"; {hint}'


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def ask(question: str, system: str | None = None) -> list[dict[str, str]]:
    """A question as chat messages. Raises TypeError if it is not text."""
    if not isinstance(question, str):
        raise TypeError(f"the question is {type(question).__name__}, not text")
    asked = [{"role": "user", "content": question}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def write_trace(steps: str, answer: str) -> str:
    """Worked steps as a trace: inside <think>, with the answer boxed after it."""
    return f"<think>\n{steps.strip()}\n</think>\n\\boxed{{{answer}}}"


def last_boxed(text: str) -> str | None:
    """What is in the last `\\boxed{}` of a worked solution: its answer."""
    boxes = find_boxes(text)
    return boxes[-1].content if boxes else None


# Tables


def read_table(path: str, split: str, config: str | None = None) -> Iterator[dict | BrokenRow]:
    """The rows of one split: of a local file, of the split's files in a local folder, or of a
    dataset on the hub (`config` is its configuration there).

    Raises OSError or ValueError, in one line, if there is no such file, split or dataset.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        for file in find_split_files(local, split, config):
            yield from read_file(file)
    elif local.is_file():
        yield from read_file(local)
    elif local.suffix in SUFFIXES or path.startswith((".", "/", "~")):
        raise ValueError(f"{path}: no such file or folder")
    else:
        yield from read_hub(path, split, config)


def read_hub(path: str, split: str, config: str | None) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the hub's errors have many classes and long messages
        raise ValueError(
            f"{path}: cannot be had from the hub ({first_line(error)}); "
            "give a local file or folder as options.path"
        ) from error
    yield from rows


def find_split_files(folder: Path, split: str, config: str | None) -> list[Path]:
    """The files of a split, as hub repositories and their exports name them: train.jsonl,
    train-00000-of-00002.parquet, train/..., also in data/ or in a folder named like the config."""
    places = [folder / config] if config and (folder / config).is_dir() else []
    places += [folder, folder / "data"]
    for place in places:
        for pattern in (f"{split}{{}}", f"{split}-*{{}}", f"{split}/*{{}}"):
            for suffix in SUFFIXES:
                if files := sorted(place.glob(pattern.format(suffix))):
                    return files
    found = sorted(f.name for place in places for f in place.glob("*") if f.suffix in SUFFIXES)
    raise ValueError(
        f'{folder}: no file of split "{split}" ({split}.jsonl, {split}-*.parquet, ...); '
        f"there are {', '.join(found) or 'no tables'}"
    )


def read_file(path: Path) -> Iterator[dict | BrokenRow]:
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix == ".csv":
        return read_csv(path)
    if path.suffix in (".jsonl", ".json"):
        return read_json(path)
    raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}")


def read_json(path: Path) -> Iterator[dict | BrokenRow]:
    """JSON objects, one a line, or one array of them."""
    with path.open(encoding="utf-8") as lines:
        if lines.read(1) == "[":
            rows = json.loads("[" + lines.read())
            yield from (check_object(number, row) for number, row in enumerate(rows, 1))
            return
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield BrokenRow(number, f"not JSON: {error}")
                continue
            yield check_object(number, row)


def check_object(number: int, row: Any) -> dict | BrokenRow:
    return row if isinstance(row, dict) else BrokenRow(number, "not a JSON object")


def read_csv(path: Path) -> Iterator[dict | BrokenRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # traces are longer than its 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            if None in row:
                yield BrokenRow(number, "more cells than the header has columns")
            elif None in row.values():
                yield BrokenRow(number, "fewer cells than the header has columns")
            else:
                yield row


def read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet: {first_line(error)}") from error
