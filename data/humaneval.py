"""HumanEval: 164 Python functions to be completed (Chen et al. 2021, arXiv:2107.03374), for
evaluation with `rewards.code_passes`.

Hub id `openai/openai_humaneval`, MIT license; split test. Rows: `task_id`, `prompt` (imports, the
function's head and docstring), `entry_point`, `canonical_solution`, `test` (defines
check(candidate)).
"""

from r1pipe.data.rows import CODE_INSTRUCTION, make_load

HUB_ID = "openai/openai_humaneval"
LICENSE = "mit"


def make_problem(row: dict) -> dict:
    question = f"Complete this function:\n\n```python\n{row['prompt'].rstrip()}\n```"
    tests = {"entry_point": row["entry_point"], "prompt": row["prompt"], "code": row["test"]}
    return {"kind": "code", "prompt": question, "tests": tests}


load = make_load("humaneval", HUB_ID, make_problem, instruction=CODE_INSTRUCTION, split="test")
