"""Your own dataset, its columns named in the YAML: a JSONL, CSV or Parquet file, a folder of them
(one per split), or a dataset on the hub.

    data:
      recipe: columns
      split: train
      options:
        path: my/problems.csv               # or a folder, or a hub id
        columns: {prompt: question, answer: final}

`columns` says which column of yours becomes which of ours (README.md): `prompt` (text, or a list
of messages) is needed, and what `kind` is judged by: `answer` for math, `tests` for code,
`solution` for text. `id` and `source` may be given, too. `answer_pattern` is a regular expression
whose group 1, where it matches last, is the answer: "#### (.+)" for GSM8K's; "boxed" takes what is
in the last box.
"""

import re
from collections.abc import Iterator
from itertools import chain

from r1pipe.datasets_io import (
    BrokenRow,
    ask,
    describe_missing,
    last_boxed,
    load_rows,
    read_table,
)

COLUMNS = ("id", "prompt", "answer", "tests", "solution", "source")


def load(
    split: str = "train",
    *,
    path: str,
    columns: dict[str, str],
    config: str | None = None,
    kind: str = "math",
    system: str | None = None,
    answer_pattern: str | None = None,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    for ours in columns:
        if ours not in COLUMNS:
            raise ValueError(f"options.columns: {describe_missing(ours, COLUMNS)}")
    if "prompt" not in columns:
        raise ValueError('options.columns: name the column that is the "prompt"')

    def make_problem(row: dict) -> dict:
        problem = {ours: row[theirs] for ours, theirs in columns.items()}
        if isinstance(problem["prompt"], str):
            problem["prompt"] = ask(problem["prompt"], system)
        if "id" in problem:
            problem["id"] = str(problem["id"])
        if isinstance(problem.get("answer"), int | float):
            problem["answer"] = str(problem["answer"])
        if answer_pattern is not None:
            problem["answer"] = find_answer(problem.get("answer"), answer_pattern)
        return {"kind": kind, **problem}

    rows = check_columns(read_table(path, split, config), columns)
    return load_rows("columns", rows, split, make_problem, size=size, skip=skip, source=path)


def check_columns(
    rows: Iterator[dict | BrokenRow], columns: dict[str, str]
) -> Iterator[dict | BrokenRow]:
    """The same rows. A column that the first one lacks is the YAML's mistake, not the row's."""
    for row in rows:
        if isinstance(row, dict):
            for ours, theirs in columns.items():
                if theirs not in row:
                    raise ValueError(f"options.columns.{ours}: {describe_missing(theirs, row)}")
            yield from chain([row], rows)
            return
        yield row


def find_answer(text: str | None, pattern: str) -> str:
    if pattern == "boxed":
        answer = last_boxed(text or "")
    else:
        found = re.findall(pattern, text or "")
        answer = found[-1] if found else None
    if answer is None:
        raise ValueError(f"the answer column has nothing like answer_pattern {pattern}")
    return answer.strip()
