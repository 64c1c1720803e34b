"""CodeContests: 13,328 + 117 + 165 programming contest problems judged by input and output (Li et
al. 2022, arXiv:2203.07814).

Hub id `deepmind/code_contests`, CC-BY-4.0; splits train, valid, test. Rows: `description` and
`public_tests`, `private_tests`, `generated_tests`, each {input: [...], output: [...]}; or, as
others have copied it, `problem`, `inputs`, `outputs`.

The first `max_tests` tests are used, public ones first. Problems without tests are filtered out.
"""

from r1pipe.data.rows import CODE_INSTRUCTION, Unwanted, make_load

HUB_ID = "deepmind/code_contests"
LICENSE = "cc-by-4.0"
TESTS = ("public_tests", "private_tests", "generated_tests")


def make_problem(row: dict, *, max_tests: int = 20) -> dict:
    if "inputs" in row:
        question, inputs, outputs = row["problem"], row["inputs"], row["outputs"]
    else:
        question = row["description"]
        inputs = [text for name in TESTS for text in row[name]["input"]]
        outputs = [text for name in TESTS for text in row[name]["output"]]
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if not inputs:
        raise Unwanted("no tests")
    return {
        "kind": "code",
        "prompt": question.strip(),
        "tests": {"inputs": inputs[:max_tests], "outputs": outputs[:max_tests]},
    }


load = make_load("code-contests", HUB_ID, make_problem, instruction=CODE_INSTRUCTION)
