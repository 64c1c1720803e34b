"""Which prompts a step gets, and by which policy they are sampled."""

import threading

import pytest
import torch

from r1pipe.config.rl import Difficulty
from r1pipe.rl.batch import Batch, Group
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.prefetch import Prefetcher
from r1pipe.types import Problem

PROBLEMS = [
    Problem(id=f"p{i}", kind="math", prompt=[{"role": "user", "content": "?"}], answer=str(i))
    for i in range(8)
]


def test_every_epoch_has_every_problem_once() -> None:
    epochs = draw_epochs(Prompts(PROBLEMS, seed=3), 2, 8)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(p.id for p in PROBLEMS)
    assert epochs[0] != epochs[1]


def draw_epochs(prompts: Prompts, count: int, size: int) -> list[list[str]]:
    return [[problem.id for problem in prompts.draw(size)] for _ in range(count)]


RATES = {f"p{i}": i / 8 for i in range(7)} | {"p7": None}


def test_prompts_are_chosen_and_ordered_by_pass_rate() -> None:
    chosen = Prompts(PROBLEMS, 3, Difficulty(min_pass_rate=0.25, max_pass_rate=0.5), RATES)
    for epoch in draw_epochs(chosen, 3, 3):
        assert sorted(epoch) == ["p2", "p3", "p4"]
    easy_first = Prompts(PROBLEMS, 3, Difficulty(order="easy_first"), RATES)
    for epoch in draw_epochs(easy_first, 2, 7):
        assert epoch == ["p6", "p5", "p4", "p3", "p2", "p1", "p0"]  # p7 could not be judged


def test_prompts_follow_newer_rates() -> None:
    prompts = Prompts(PROBLEMS, 3, Difficulty(max_pass_rate=0.5), RATES)
    assert sorted(draw_epochs(prompts, 1, 5)[0]) == ["p0", "p1", "p2", "p3", "p4"]
    prompts.draw(2)
    prompts.note({"p0": 1.0, "p6": 0.2})
    rest = draw_epochs(prompts, 1, 3)[0]
    assert "p6" not in rest, "the epoch that has begun is not changed"
    assert sorted(draw_epochs(prompts, 1, 5)[0]) == ["p1", "p2", "p3", "p4", "p6"]
    prompts.draw(1)
    prompts.refresh({"p1": 1.0, "p2": 1.0})
    assert sorted(draw_epochs(prompts, 1, 3)[0]) == ["p3", "p4", "p6"]
    assert prompts.noted == {}
    prompts.refresh(dict.fromkeys(RATES, 1.0))
    assert prompts.num_chosen == 8, "outgrown: all of them again"


def test_prompts_resume_where_they_were() -> None:
    """Saved in the middle of an epoch, with rates noted that the epoch does not know yet."""
    settings = Difficulty(max_pass_rate=0.6, order="easy_first")
    for place in range(14):
        prompts = Prompts(PROBLEMS, 3, settings, RATES)
        prompts.draw(place)
        prompts.note({"p0": 1.0, "p6": 0.5})
        state = prompts.state_dict()
        expected = draw_epochs(prompts, 3, 4)
        again = Prompts(PROBLEMS, 3, settings, RATES)
        again.draw(3)
        again.load_state_dict(state)
        assert draw_epochs(again, 3, 4) == expected


def test_prefetcher_samples_while_the_caller_trains() -> None:
    began, trained = threading.Event(), threading.Event()
    made: list[tuple[int, int]] = []

    def sample(step: int, policy_step: int) -> tuple[int, int]:
        if step == 2:
            began.set()
            assert trained.wait(10)
        made.append((step, policy_step))
        return step, policy_step

    with Prefetcher(sample, 3, max_staleness=1) as batches:
        assert batches.take(1) == (1, 1)
        assert began.wait(10), "step 2 is sampled before step 1 has been waited for"
        assert made == [(1, 1)]
        trained.set()
        batches.wait()
        assert made == [(1, 1), (2, 1)]
        assert batches.take(2) == (2, 1)
        assert batches.take(3) == (3, 2)
    assert len(made) == 3, "nothing is sampled beyond the last step"


def test_prefetcher_samples_on_the_callers_gpu_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that is made up: both are a thread's own, and others in a new one."""
    here: dict[int, dict[str, object]] = {}

    def mine() -> dict[str, object]:
        return here.setdefault(threading.get_ident(), {"device": 0, "stream": "default"})

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: mine()["device"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: mine()["stream"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: mine().update(device=device))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: mine().update(stream=stream))
    mine().update(device=3, stream="vllm's")

    def sample(step: int, policy_step: int) -> tuple:
        return threading.get_ident(), *mine().values()

    with Prefetcher(sample, 2, max_staleness=1) as batches:
        first, second = batches.take(1), batches.take(2)
    assert first[0] != second[0]
    assert first[1:] == second[1:] == (3, "vllm's")


def test_prefetcher_without_async_samples_in_order() -> None:
    with Prefetcher(lambda step, policy_step: (step, policy_step), 2, max_staleness=0) as batches:
        assert [batches.take(1), batches.take(2)] == [(1, 1), (2, 2)]


def test_prefetched_batch_of_an_older_run_is_restored() -> None:
    batch = Batch(2, 1, [Group(PROBLEMS[0], [], [], used=False)], [], 1, {})
    state = batch.state_dict()
    state["made_at"] = state.pop("policy_step")
    for group in state["groups"]:
        group["takes_part"] = group.pop("used")
    assert Batch.from_state(state) == batch


def test_prefetcher_passes_errors_on() -> None:
    def fail(step: int, policy_step: int) -> int:
        if step == 2:
            raise ValueError("no more")
        return step

    with Prefetcher(fail, 3, max_staleness=1) as batches:
        batches.take(1)
        batches.wait()
        with pytest.raises(ValueError, match="no more"):
            batches.take(2)
