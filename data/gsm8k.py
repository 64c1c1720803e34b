"""GSM8K: 7,473 + 1,319 grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168).

Hub id `openai/gsm8k`, MIT license; splits train and test. Rows have `question` and either the
hub's `answer` ("... #### 72") or separate `solution` and `answer`. Calculator annotations
(<<48/2=24>>) are removed from the solution.

`solution` puts the worked steps inside <think> and boxes the answer.
"""

import re

from r1pipe.data.rows import MATH_INSTRUCTION, make_load, write_trace

HUB_ID = "openai/gsm8k"
LICENSE = "mit"


def make_problem(row: dict) -> dict:
    steps, _, marked = (row.get("solution") or row["answer"]).partition("####")
    answer = (row["answer"] if "solution" in row else marked).strip()
    return {
        "kind": "math",
        "prompt": row["question"],
        "answer": answer.replace(",", ""),
        "solution": write_trace(re.sub(r"<<[^>]*>>", "", steps), answer),
    }


load = make_load("gsm8k", HUB_ID, make_problem, instruction=MATH_INSTRUCTION, default_config="main")
