"""MATH-500: 500 problems of MATH's test split (Lightman et al. 2023, arXiv:2305.20050), for
evaluation.

Hub id `HuggingFaceH4/MATH-500`, split test. License: see the card (MATH itself: MIT). Rows:
`problem`, `solution`, `answer`, `subject`, `level` (1 to 5), `unique_id`.
"""

from r1pipe.data.rows import MATH_INSTRUCTION, make_load, write_trace

HUB_ID = "HuggingFaceH4/MATH-500"


def make_problem(row: dict) -> dict:
    return {
        "kind": "math",
        "prompt": row["problem"],
        "answer": row["answer"],
        "solution": write_trace(row["solution"], row["answer"]),
    }


load = make_load("math-500", HUB_ID, make_problem, instruction=MATH_INSTRUCTION, split="test")
