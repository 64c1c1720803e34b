"""The dataset of an environment of PrimeIntellect's verifiers; `environment: {name: verifiers}`
plays it.

Needs the package verifiers (MIT), 0.1.14 to 0.3. `env` is the name of an installed environment
(`wordle`, `owner/wordle`), or the dotted name of a function or class that makes one; `args` are its
arguments. Split train is its `dataset`, test its `eval_dataset`.

`kind` is task, `prompt` and `answer` the row's own, `tests` the rest of the row, and `environment`
says who plays it. Its reward is the environment's, by its rubric. There are no traces.
"""

import json
from collections.abc import Iterator


def load(
    split: str = "train", *, env: str, args: dict | None = None, size: int | None = None
) -> Iterator[dict]:
    """Yield the first `size` rows, by default all."""
    from r1pipe.envs.verifiers import normalize, open_environment, write_messages

    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": {env} has "train" and "test"')
    made = open_environment(env, json.dumps(args or {}, sort_keys=True))
    if split == "test" and made.eval_dataset is None and made.eval_dataset_source is None:
        raise ValueError(f'split "test": {env} has no eval_dataset')
    rows = made.get_dataset(size or -1) if split == "train" else made.get_eval_dataset(size or -1)
    for number, row in enumerate(rows):
        prompt = row.pop("prompt")
        if not isinstance(prompt, list):
            raise ValueError(f"{env}: its prompts are {type(prompt).__name__}, not messages")
        yield {
            "id": f"{env}-{split}-{number}",
            "kind": "task",
            "prompt": write_messages(normalize(prompt)),
            "answer": row["answer"] if isinstance(row.get("answer"), str) else None,
            "tests": json.loads(json.dumps(row)),
            "source": f"verifiers/{env}",
            "environment": {"name": "verifiers", "options": {"env": env, "args": args or {}}},
        }
