"""DeepScaleR-Preview: 40k problems of AIME (before 2024), AMC, Omni-MATH and STILL, for
reinforcement learning.

Hub id `agentica-org/DeepScaleR-Preview-Dataset`, MIT licence; split train. Rows: `problem`,
`answer`, `solution` (often empty, and then there is no trace).
"""

from collections.abc import Iterator

from r1pipe.data.rows import MATH_INSTRUCTION, ask, load_rows, write_trace, write_value

HUB_ID = "agentica-org/DeepScaleR-Preview-Dataset"
LICENSE = "mit"


def load(
    split: str = "train",
    *,
    path: str = HUB_ID,
    system: str | None = MATH_INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        answer, worked = write_value(row["answer"], "answer"), row.get("solution")
        return {
            "kind": "math",
            "prompt": ask(row["problem"], system),
            "answer": answer,
            "solution": write_trace(worked, answer) if worked else None,
        }

    return load_rows("deepscaler", path, split, make_problem, size=size, skip=skip, source=HUB_ID)
