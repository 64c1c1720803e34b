"""Any task of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760), generated, judged by the
task's own scorer: `rewards.reasoning_gym_score`.

Needs the package reasoning-gym (Apache-2.0). `task` is one of its about 100 tasks (`sudoku`,
`basic_arithmetic`, `propositional_logic`, ...); `config` has that task's own settings except seed
and size. Splits train and test are generated from distant seeds. A task with few different
questions may repeat some in both; decontamination then drops them from training.

`kind` is task, `answer` the task's own (None if many answers are right), and `tests` the scorer's
input: {task, config, entry}. There are no traces.
"""

import difflib
import json
from collections.abc import Iterator

from r1pipe.data.rows import ask

INSTRUCTION = (
    "Reason step by step within <think> and </think>, then give the answer, and nothing else, "
    "within <answer> and </answer>."
)
SPLITS = {"train": 0, "test": 1}
LICENSE = "apache-2.0"
SEEDS_APART = 10**7
"""Most tasks make question n from seed + n, so neighboring seeds share questions."""


def load(
    split: str = "train",
    *,
    task: str,
    config: dict | None = None,
    system: str | None = INSTRUCTION,
    size: int = 1000,
    seed: int = 0,
) -> Iterator[dict]:
    """Yield `size` problems."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if split not in SPLITS:
        raise ValueError(f'split "{split}": reasoning_gym has "train" and "test"')
    if task not in DATASETS or task == "composite":
        near = difflib.get_close_matches(task, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see reasoning-gym's gallery"
        raise ValueError(f'no task "{task}"; {hint}')
    config = config or {}
    try:
        first = (2 * seed + SPLITS[split]) * SEEDS_APART
        problems = reasoning_gym.create_dataset(task, **config, size=size, seed=first)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"options.config of {task}: {error}") from error
    for number in range(size):
        entry = problems[number]
        yield {
            "id": f"{task}-{split}-{seed}-{number}",
            "kind": "task",
            "prompt": ask(entry["question"], system),
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "tests": {"task": task, "config": config, "entry": make_plain(entry)},
            "source": f"reasoning-gym/{task}",
        }


def make_plain(entry: dict) -> dict:
    """Through JSON, so that a problem is the same before and after it is written to a file."""
    return json.loads(json.dumps(entry))
