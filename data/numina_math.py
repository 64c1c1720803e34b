"""NuminaMath 1.5: 896k problems from contests, forums and textbooks, with worked solutions.

Hub id `AI-MO/NuminaMath-1.5`, Apache-2.0; split train. Rows: `problem`, `solution`, `answer`
("proof" or "notfound" where there is none to compare), `problem_type`, `question_type`, `source`,
`problem_is_valid`, `solution_is_valid` ("Yes" where so). `path: AI-MO/NuminaMath-CoT` (859k rows
of the same kind without `answer`) works too: there the solution's last box is the answer.

Rows without an answer, or marked invalid, are filtered out; `sources: [olympiads, cn_k12]` keeps
rows of these.
"""

from r1pipe.data.rows import MATH_INSTRUCTION, Unwanted, last_boxed, make_load, write_trace

HUB_ID = "AI-MO/NuminaMath-1.5"
LICENSE = "apache-2.0"
NO_ANSWER = ("", "proof", "notfound")


def make_problem(row: dict, *, sources: list[str] | None = None) -> dict:
    if sources is not None and row["source"] not in sources:
        raise Unwanted("other sources")
    if any(row.get(key, "Yes") != "Yes" for key in ("problem_is_valid", "solution_is_valid")):
        raise Unwanted("not valid")
    answer = row["answer"] if "answer" in row else last_boxed(row["solution"])
    if answer is None or answer.strip().lower() in NO_ANSWER:
        raise Unwanted("no final answer")
    return {
        "kind": "math",
        "prompt": row["problem"],
        "answer": answer,
        "solution": write_trace(row["solution"], answer),
    }


load = make_load("numina-math", HUB_ID, make_problem, instruction=MATH_INSTRUCTION)
