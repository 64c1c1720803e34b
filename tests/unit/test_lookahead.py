"""Which prompts and which policy's samples a step gets."""

import threading

import pytest

from r1pipe.grpo.collect import Lookahead, draw_prompts
from r1pipe.records import Problem

PROBLEMS = [
    Problem(id=f"p{i}", kind="math", prompt=[{"role": "user", "content": "?"}], answer=str(i))
    for i in range(8)
]


def test_every_epoch_has_every_problem_once() -> None:
    prompts = draw_prompts(PROBLEMS, seed=3)
    epochs = [[next(prompts).id for _ in PROBLEMS] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(p.id for p in PROBLEMS)
    assert epochs[0] != epochs[1]


def test_lookahead_samples_while_the_caller_trains() -> None:
    began, trained = threading.Event(), threading.Event()
    made: list[tuple[int, int]] = []

    def sample(step: int, made_at: int) -> tuple[int, int]:
        if step == 2:
            began.set()
            assert trained.wait(10)
        made.append((step, made_at))
        return step, made_at

    with Lookahead(sample, 3, async_steps=1) as batches:
        assert batches.take(1) == (1, 1)
        assert began.wait(10), "step 2 is sampled before step 1 has been waited for"
        assert made == [(1, 1)]
        trained.set()
        batches.wait()
        assert made == [(1, 1), (2, 1)]
        assert batches.take(2) == (2, 1)
        assert batches.take(3) == (3, 2)
    assert len(made) == 3, "nothing is sampled beyond the last step"


def test_lookahead_without_async_samples_in_order() -> None:
    with Lookahead(lambda step, made_at: (step, made_at), 2, async_steps=0) as batches:
        assert [batches.take(1), batches.take(2)] == [(1, 1), (2, 2)]


def test_lookahead_passes_errors_on() -> None:
    def fail(step: int, made_at: int) -> int:
        if step == 2:
            raise ValueError("no more")
        return step

    with Lookahead(fail, 3, async_steps=1) as batches:
        batches.take(1)
        batches.wait()
        with pytest.raises(ValueError, match="no more"):
            batches.take(2)
