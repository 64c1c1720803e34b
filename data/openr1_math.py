"""OpenR1-Math-220k: problems of NuminaMath 1.5 with traces of DeepSeek-R1, for the cold start.

Hub id `open-r1/OpenR1-Math-220k`, Apache-2.0; split train, configurations default (94k rows),
extended (131k) and all. Rows: `problem`, `answer`, `generations` (traces with <think>), and per
trace `is_reasoning_complete` and `correctness_math_verify`.

`solution` is the first complete and verified trace; rows without one are filtered out, as are those
whose answer is just "proof".
"""

from r1pipe.data.rows import MATH_INSTRUCTION, Unwanted, make_load

HUB_ID = "open-r1/OpenR1-Math-220k"
LICENSE = "apache-2.0"


def make_problem(row: dict) -> dict:
    if not row["answer"] or row["answer"] == "proof":
        raise Unwanted("no final answer")
    checks = zip(row["generations"], row["is_reasoning_complete"], row["correctness_math_verify"])
    trace = next((trace for trace, complete, right in checks if complete and right), None)
    if trace is None:
        raise Unwanted("no verified trace")
    return {
        "kind": "math",
        "prompt": row["problem"],
        "answer": row["answer"],
        "solution": trace,
    }


load = make_load(
    "openr1-math",
    HUB_ID,
    make_problem,
    instruction=MATH_INSTRUCTION,
    default_config="default",
    has_configs=True,
)
