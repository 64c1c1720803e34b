"""DeepScaleR-Preview: 40k problems of AIME (before 2024), AMC, Omni-MATH and STILL, for
reinforcement learning.

Hub id `agentica-org/DeepScaleR-Preview-Dataset`, MIT license; split train. Rows: `problem`,
`answer`, `solution` (often empty: then there is no trace).
"""

from r1pipe.data.rows import MATH_INSTRUCTION, make_load, write_trace, write_value

HUB_ID = "agentica-org/DeepScaleR-Preview-Dataset"
LICENSE = "mit"


def make_problem(row: dict) -> dict:
    answer, worked = write_value(row["answer"], "answer"), row.get("solution")
    return {
        "kind": "math",
        "prompt": row["problem"],
        "answer": answer,
        "solution": write_trace(worked, answer) if worked else None,
    }


load = make_load("deepscaler", HUB_ID, make_problem, instruction=MATH_INSTRUCTION)
