"""MBPP: 974 short Python tasks with asserts (Austin et al. 2021, arXiv:2108.07732).

Hub id `google-research-datasets/mbpp`, CC-BY-4.0; splits train (374), validation (90), test (500),
prompt (10). Rows of configuration full: `task_id`, `text`, `code`, `test_list`, `test_setup_code`,
`challenge_test_list`; of `config: sanitized` (427 in all): `prompt` instead of `text`, and
`test_imports`. The asserts stand in the prompt, as in the paper: they name the function.
"""

from collections.abc import Iterator

from r1pipe.data.rows import CODE_INSTRUCTION, ask, load_rows

HUB_ID = "google-research-datasets/mbpp"
LICENSE = "cc-by-4.0"


def load(
    split: str = "train",
    *,
    path: str = HUB_ID,
    config: str | None = None,
    system: str | None = CODE_INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        task = row["text"] if "text" in row else row["prompt"]
        asserts = "\n".join(row["test_list"])
        question = f"{task}\n\nYour code should pass these tests:\n\n```python\n{asserts}\n```"
        names = ("test_list", "test_setup_code", "test_imports")
        return {
            "kind": "code",
            "prompt": ask(question, system),
            "tests": {name: row[name] for name in names if row.get(name)},
        }

    return load_rows(
        "mbpp",
        path,
        split,
        make_problem,
        config=config,
        default_config="full",
        size=size,
        skip=skip,
        source=HUB_ID,
    )
