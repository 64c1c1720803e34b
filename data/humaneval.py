"""HumanEval: 164 Python functions to be completed (Chen et al. 2021, arXiv:2107.03374), for
evaluation with `rewards.code_passes`.

Hub id `openai/openai_humaneval`, MIT licence; split test. Rows: `task_id`, `prompt` (imports, the
function's head and docstring), `entry_point`, `canonical_solution`, `test` (defines
check(candidate)).
"""

from collections.abc import Iterator

from r1pipe.data.rows import CODE_INSTRUCTION, ask, load_rows

HUB_ID = "openai/openai_humaneval"
LICENSE = "mit"


def load(
    split: str = "test",
    *,
    path: str = HUB_ID,
    system: str | None = CODE_INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        question = f"Complete this function:\n\n```python\n{row['prompt'].rstrip()}\n```"
        tests = {"entry_point": row["entry_point"], "prompt": row["prompt"], "code": row["test"]}
        return {"kind": "code", "prompt": ask(question, system), "tests": tests}

    return load_rows("humaneval", path, split, make_problem, size=size, skip=skip, source=HUB_ID)
