"""reasoning-gym's tasks, judged by their own scorers, in the sandbox that model code runs in.

The scorers are trusted, the answers are not, and some scorers evaluate them (``gym_scorer``). So
every answer is scored in a process of its own, forked from one that has reasoning-gym loaded:
without network and files, with limits of time and memory.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards.code.judge import report_failure
from rewards.sandbox.choice import find_mechanism
from rewards.sandbox.client import Limits
from rewards.text.answers import find_boxes
from rewards.text.completions import Completion, completion_text, split_thinking
from rewards.workers import pool

MEMORY_MB = 2048  # address space: numpy and sympy take more than half a gigabyte of it
START_S = 120.0  # for a worker's first answer: it loads reasoning-gym
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


def reasoning_gym_score(
    completions: Sequence[Completion], tests: Sequence[object], **kwargs: object
) -> list[float | None]:
    """Return the score, 0 to 1, that each answer gets from its task's own scorer.

    ``tests`` is the dataset's column: {"task": name, "config": {...}, "entry": {...}}, or JSON of
    it, as data/reasoning_gym.py makes it. The answer is what the last ``<answer>`` outside the
    thinking holds, else the last box; without either the score is 0.0, and so it is where the
    scorer raises or runs out of time. None where the tests cannot be used.

    Raises ``rewards.SandboxError`` if no sandbox works here, and ``ModuleNotFoundError`` without
    the package reasoning-gym.
    """
    if len(completions) != len(tests):
        raise ValueError(f"{len(completions)} completions but {len(tests)} tests")
    answers = [find_tagged_answer(completion_text(completion)) for completion in completions]
    tasks = [_read_tests(cell) for cell in tests]
    # Samples of one problem repeat each other: duplicates are judged once.
    items = list(
        dict.fromkeys((t, a) for t, a in zip(tasks, answers) if t is not None and a is not None)
    )
    scores = dict(zip(items, _score(items), strict=True))
    return [
        None if task is None else 0.0 if answer is None else scores[task, answer]
        for task, answer in zip(tasks, answers)
    ]


def find_tagged_answer(text: str) -> str | None:
    """Return what the last ``<answer>`` outside the thinking holds, else the last box."""
    _, said = split_thinking(text)
    if tagged := _TAGGED.findall(said):
        return tagged[-1].strip() or None
    boxes = find_boxes(said)
    return boxes[-1].content if boxes else None


def _read_tests(tests: object) -> str | None:
    """The tests as JSON, so that they can be compared; None if they are none."""
    try:
        tests = json.loads(tests) if isinstance(tests, str) else tests
        is_usable = isinstance(tests, Mapping) and {"task", "config", "entry"} <= set(tests)
        return json.dumps(tests, sort_keys=True) if is_usable else None
    except (ValueError, TypeError):
        return None


def _score(items: list[tuple[str, str]]) -> list[float | None]:
    if not items:
        return []
    limits = Limits(seconds=pool.get_limit(), memory_mb=MEMORY_MB)
    mechanism, folders = find_mechanism(), find_packages()
    jobs = [(mechanism, folders, tests, answer, limits) for tests, answer in items]
    results = pool.run_task("rewards.tasks.gym_runs:score", jobs, limits.seconds + START_S)
    return [_read_result(result) for result in results]


def _read_result(result: pool.Result) -> float | None:
    if result.status == pool.OK:
        score: float | None = result.value
        return score
    report_failure(str(result.value or f"a worker {result.status}"))
    return None


@functools.cache
def find_packages() -> list[str]:
    """The folders that reasoning-gym and what it needs are imported from, without importing it."""
    import importlib.util  # slow, and not needed to import this package

    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("rewards.reasoning_gym_score needs the package reasoning-gym")
    return [str(Path(spec.origin).resolve().parent.parent)]
