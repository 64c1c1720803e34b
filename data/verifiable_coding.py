"""Verifiable coding problems in Python: 35k contest problems judged by input and output, for
reinforcement learning.

Hub id `open-r1/verifiable-coding-problems-python` (from PrimeIntellect's
verifiable-coding-problems); split train. License: see the card. Rows: `prompt` (with instructions
of its own), `gold_standard_solution`, and `verification_info` (an object, or JSON of one):
{language, test_cases: [{type: stdin_stdout, input, output, fn_name}]}.

Rows in other languages, or whose tests call a function, are filtered out. The first `max_tests`
tests are used.
"""

import json

from r1pipe.data.rows import CODE_INSTRUCTION, Unwanted, make_load

HUB_ID = "open-r1/verifiable-coding-problems-python"


def make_problem(row: dict, *, max_tests: int = 20) -> dict:
    info = row["verification_info"]
    info = json.loads(info) if isinstance(info, str) else info
    cases = info["test_cases"]
    if info.get("language", "python") != "python":
        raise Unwanted("another language")
    if any(case.get("type", "stdin_stdout") != "stdin_stdout" for case in cases):
        raise Unwanted("tests that call a function")
    if not cases:
        raise Unwanted("no tests")
    tests = {
        "inputs": [case["input"] for case in cases[:max_tests]],
        "outputs": [case["output"] for case in cases[:max_tests]],
    }
    return {"kind": "code", "prompt": row["prompt"], "tests": tests}


load = make_load("verifiable-coding", HUB_ID, make_problem, instruction=CODE_INSTRUCTION)
