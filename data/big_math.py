"""Big-Math: 251k problems with checked, closed answers, made for reinforcement learning (Albalak
et al. 2025, arXiv:2502.17387).

Hub id `SynthLabsAI/Big-Math-RL-Verified`, Apache-2.0 (accept its access form there);
split train. Rows: `problem`, `answer`, `source`, `domain`, `llama8b_solve_rate` (0 to 1, or none).

`min_solve_rate` and `max_solve_rate` filter by Llama-3.1-8B's rate, and drop rows without one. To
filter by your own policy's rate: `difficulty` of a stage (data/README.md).
"""

from r1pipe.data.rows import MATH_INSTRUCTION, Unwanted, make_load

HUB_ID = "SynthLabsAI/Big-Math-RL-Verified"
LICENSE = "apache-2.0"


def make_problem(
    row: dict, *, min_solve_rate: float | None = None, max_solve_rate: float | None = None
) -> dict:
    if (min_solve_rate, max_solve_rate) != (None, None):
        low = 0.0 if min_solve_rate is None else min_solve_rate
        high = 1.0 if max_solve_rate is None else max_solve_rate
        rate = row["llama8b_solve_rate"]
        if rate is None or not low <= float(rate) <= high:
            raise Unwanted(f"solve rate not within {low:g} to {high:g}")
    return {"kind": "math", "prompt": row["problem"], "answer": row["answer"]}


load = make_load("big-math", HUB_ID, make_problem, instruction=MATH_INSTRUCTION)
