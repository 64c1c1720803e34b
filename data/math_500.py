"""MATH-500: 500 problems of MATH's test split (Lightman et al. 2023, arXiv:2305.20050), for
evaluation.

Hub id `HuggingFaceH4/MATH-500`, split test. Licence: see the card (MATH itself: MIT). Rows:
`problem`, `solution`, `answer`, `subject`, `level` (1 to 5), `unique_id`.
"""

from collections.abc import Iterator

from r1pipe.data.rows import MATH_INSTRUCTION, ask, load_rows, write_trace

HUB_ID = "HuggingFaceH4/MATH-500"


def load(
    split: str = "test",
    *,
    path: str = HUB_ID,
    system: str | None = MATH_INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        return {
            "kind": "math",
            "prompt": ask(row["problem"], system),
            "answer": row["answer"],
            "solution": write_trace(row["solution"], row["answer"]),
        }

    return load_rows("math-500", path, split, make_problem, size=size, skip=skip, source=HUB_ID)
