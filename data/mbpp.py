"""MBPP: 974 short Python tasks with asserts (Austin et al. 2021, arXiv:2108.07732).

Hub id `google-research-datasets/mbpp`, CC-BY-4.0; splits train (374), validation (90), test (500),
prompt (10). Rows of configuration full: `task_id`, `text`, `code`, `test_list`, `test_setup_code`,
`challenge_test_list`; of `config: sanitized` (427 in all): `prompt` instead of `text`, and
`test_imports`. The asserts are in the prompt, as in the paper: they name the function.
"""

from r1pipe.data.rows import CODE_INSTRUCTION, make_load

HUB_ID = "google-research-datasets/mbpp"
LICENSE = "cc-by-4.0"


def make_problem(row: dict) -> dict:
    task = row["text"] if "text" in row else row["prompt"]
    asserts = "\n".join(row["test_list"])
    question = f"{task}\n\nYour code should pass these tests:\n\n```python\n{asserts}\n```"
    names = ("test_list", "test_setup_code", "test_imports")
    return {
        "kind": "code",
        "prompt": question,
        "tests": {name: row[name] for name in names if row.get(name)},
    }


load = make_load(
    "mbpp",
    HUB_ID,
    make_problem,
    instruction=CODE_INSTRUCTION,
    default_config="full",
    has_configs=True,
)
