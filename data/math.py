"""MATH: 7,500 + 5,000 competition problems with worked solutions (Hendrycks et al. 2021,
arXiv:2103.03874).

Hub id `EleutherAI/hendrycks_math`, MIT license; splits train and test, one configuration per
subject, all read one after another. Rows: `problem`, `level` ("Level 3"), `type`, `solution`,
whose last box is the answer. A local folder has the split's files, or a folder for each subject.

`levels: [3, 4, 5]` keeps problems of these levels. Evaluate on data/math_500.py, which is part of
the test split.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from r1pipe.data.rows import MATH_INSTRUCTION, Unwanted, ask, last_boxed, load_rows, write_trace
from r1pipe.data.tables import read_table

HUB_ID = "EleutherAI/hendrycks_math"
LICENSE = "mit"
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
)  # fmt: skip


def load(
    split: str = "train",
    *,
    path: str = HUB_ID,
    levels: list[int] | None = None,
    system: str | None = MATH_INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        if levels is not None and row["level"] not in [f"Level {level}" for level in levels]:
            raise Unwanted("other levels")
        answer = last_boxed(row["solution"])
        if answer is None:
            raise ValueError("the solution has no \\boxed{} answer")
        return {
            "kind": "math",
            "prompt": ask(row["problem"], system),
            "answer": answer,
            "solution": write_trace(row["solution"], answer),
        }

    local = Path(path).expanduser()
    by_subject = local.is_dir() and any((local / subject).is_dir() for subject in SUBJECTS)
    configs = SUBJECTS if by_subject or not local.exists() else (None,)
    rows = chain.from_iterable(read_table(path, split, config) for config in configs)
    return load_rows("math", rows, split, make_problem, size=size, skip=skip, source=HUB_ID)
