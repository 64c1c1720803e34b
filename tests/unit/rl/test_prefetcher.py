"""Which prompts a step gets, and by which policies they are sampled."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run_ranks
from grpo_settings import make_grpo

from r1pipe.config.recipe import KeptRollouts
from r1pipe.config.rl import Difficulty
from r1pipe.rl.batch import Batch, Group
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.prefetch import Prefetcher
from r1pipe.rl.replay import ReplayBatches
from r1pipe.rollout.store import RolloutFiles
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed

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


# --- Batches ahead --------------------------------------------------------------------------------


class FakeCollector:
    """`sample` makes a batch of a step, a policy's step, and prompts: one of PROBLEMS a step."""

    def __init__(self, sample: Callable):
        self.collect, self.drawn = sample, 0

    def draw(self, policy_step: int) -> list[Problem]:
        self.drawn += 1
        return [PROBLEMS[self.drawn - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def prefetch(
    sample: Callable, max_steps: int, max_staleness: int, *, in_flight: bool = False
) -> Prefetcher:
    bounds = {"max_staleness": max_staleness, "in_flight": in_flight}
    return Prefetcher(FakeCollector(sample), make_grpo(max_steps=max_steps, **bounds))


def test_prefetcher_samples_while_the_caller_trains() -> None:
    began, trained = threading.Event(), threading.Event()
    made: list[tuple[int, int]] = []

    def sample(step: int, policy_step: int, prompts: list[Problem]) -> tuple[int, int]:
        if step == 2:
            began.set()
            assert trained.wait(10)
        made.append((step, policy_step))
        return step, policy_step

    with prefetch(sample, 3, 1) as batches:
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

    def sample(step: int, policy_step: int, prompts: list[Problem]) -> tuple:
        return threading.get_ident(), *mine().values()

    with prefetch(sample, 2, 1) as batches:
        first, second = batches.take(1), batches.take(2)
    assert first[0] != second[0]
    assert first[1:] == second[1:] == (3, "vllm's")


def test_prefetcher_on_policy_samples_in_order() -> None:
    with prefetch(lambda step, policy_step, prompts: (step, policy_step), 2, 0) as batches:
        assert [batches.take(1), batches.take(2)] == [(1, 1), (2, 2)]


def test_prefetched_batch_of_an_older_run_is_restored() -> None:
    batch = Batch(2, 1, [Group(PROBLEMS[0], [], [], used=False)], [], 1, {})
    state = batch.state_dict()
    state["made_at"] = state.pop("policy_step")
    for group in state["groups"]:
        group["takes_part"] = group.pop("used")
    assert Batch.from_state(state) == batch


def test_prefetcher_passes_errors_on() -> None:
    def fail(step: int, policy_step: int, prompts: list[Problem]) -> int:
        if step == 2:
            raise ValueError("no more")
        return step

    with prefetch(fail, 3, 1) as batches:
        batches.take(1)
        batches.wait()
        assert batches.state_dict() == {"ahead": [], "collector": {"drawn": 1}}
        with pytest.raises(ValueError, match="no more"):
            batches.take(2)


class Gates:
    """Batches that are finished when their gate is opened."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}
        """By step: the policy's."""
        self.gates: dict[int, threading.Event] = defaultdict(threading.Event)

    def sample(self, step: int, policy_step: int, prompts: list[Problem]) -> Batch:
        self.begun[step] = policy_step
        assert self.gates[step].wait(10)
        versions = [policy_step, step]
        rollout = Rollout(prompts[0].id, 0, [1], [2, 3], [0, 0], "", "stop", versions=versions)
        groups = [Group(prompts[0], [rollout], [Score()])]
        return Batch(step, policy_step, groups, groups, 1, {"sample": 1.0})

    def finish(self, batches: Prefetcher, step: int, before: int) -> None:
        """The batch of this step, which is ahead while `before` trains."""
        self.gates[step].set()
        batches._ahead[step - before - 1].batch.result(10)


def test_in_flight_no_batch_is_begun_too_early() -> None:
    """Nor is one taken before its turn; and weights may change at any time."""
    world = Gates()
    world.gates[1].set()
    with prefetch(world.sample, 5, 2, in_flight=True) as batches:
        batches.take(1)
        batches.wait()
        world.finish(batches, 3, before=1)
        assert world.begun == {1: 1, 2: 1, 3: 1}
        assert batches.ahead is None
        world.gates[2].set()
        assert batches.take(2).step == 2
        batch = batches.take(3)
        assert (batch.step, batch.num_waiting) == (3, 0)
        world.finish(batches, 5, before=3)
        assert world.begun == {1: 1, 2: 1, 3: 1, 4: 2, 5: 3}
        world.gates[4].set()
        batch = batches.take(4)
        assert (batch.step, batch.policy_step, batch.num_waiting) == (4, 2, 1)
        assert batches.take(5).step == 5
    assert all(step - policy_step <= 2 for step, policy_step in world.begun.items())


def test_what_was_not_finished_is_sampled_again() -> None:
    """Of steps 2 to 4 the third is still sampled when the run is saved, and killed."""
    world = Gates()
    for step in (1, 2, 4):
        world.gates[step].set()
    with prefetch(world.sample, 6, 3, in_flight=True) as batches:
        trained = [batches.take(1)]
        for step in (2, 4):
            world.finish(batches, step, before=1)
        state = batches.state_dict()
        assert state["collector"] == {"drawn": 2}
        world.gates[3].set()
    again = Gates()
    for step in range(3, 7):
        again.gates[step].set()
    with prefetch(again.sample, 6, 3, in_flight=True) as batches:
        batches.load_state_dict(state)
        trained += [batches.take(step) for step in range(2, 7)]
    assert again.begun == {3: 2, 4: 2, 5: 2, 6: 3}, "by the policy that has resumed"
    names = [rollout.problem_id for batch in trained for rollout in batch.rollouts]
    assert names == [f"p{number}" for number in range(6)]


def sample_on_one_rank(arguments: list[str]) -> None:
    """One of two, which reach the ends of their batches in different orders. Saved when one rank
    has finished the third."""
    rank = distributed.rank()
    met, saved = {}, threading.Event()

    def sample(step: int, policy_step: int, prompts: list[Problem]) -> Batch:
        time.sleep((step + rank) % 2 / 2)
        met[step] = distributed.gather((step, rank))
        if (step, rank) == (4, 1):
            assert saved.wait(60)
        return Batch(step, policy_step, [], [], 1, {})

    with (
        distributed.joined("cpu", 60, num_lanes=4),
        prefetch(sample, 6, 3, in_flight=True) as batches,
    ):
        batches.take(1)
        for ahead in list(batches._ahead)[: 3 - rank]:
            ahead.batch.result(60)
        state = batches.state_dict()
        saved.set()
    found = met, len(state["ahead"]), state["collector"]
    Path(arguments[0], f"{rank}.json").write_text(json.dumps(found))


def test_batches_of_several_ranks_do_not_mix(tmp_path: Path) -> None:
    """And all ranks keep the same ones."""
    result = run_ranks(2, tmp_path, program=sample_on_one_rank)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = [{str(step): [[step, 0], [step, 1]] for step in range(1, 5)}, 2, {"drawn": 3}]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_staleness_is_by_token() -> None:
    """Of a batch that has seen two syncs."""

    def make(*versions: int) -> Group:
        ids = [0] * len(versions)
        rollout = Rollout("p", 0, [1], ids, ids, "", "stop", versions=list(versions))
        return Group(PROBLEMS[0], [rollout], [Score()])

    groups = [make(4, 4, 4, 5), make(5, 5, 6, 6, 6, 6)]
    batch = Batch(6, 5, groups, groups, 1, {"sample": 1.0})
    assert batch.policy_step == 4, "the oldest token's"
    expected = {"mean": 0.9, "max": 2, "tokens": [4, 3, 3], "batches_waiting": 0}
    assert batch.describe_staleness() == {f"staleness/{k}": v for k, v in expected.items()}
    assert Batch.from_state(batch.state_dict()).groups[0].rollouts[0].versions == [4, 4, 4, 5]
    plain = Batch(6, 5, [], [], 1, {"sample": 1.0})
    assert plain.describe_staleness() == {"staleness/mean": 1, "staleness/max": 1}


def test_a_replay_knows_whose_a_token_is(tmp_path: Path) -> None:
    """Unless it trains other weights than the run did."""
    rollout = Rollout("p", 0, [1], [2, 3], [-1, -2], "", "stop", versions=[4, 5])
    groups = [Group(PROBLEMS[0], [rollout], [Score({"r": 1.0}, 1.0)])]
    batch = Batch(6, 5, groups, groups, 1, {"sample": 1.0})
    RolloutFiles(tmp_path, KeptRollouts()).write(6, batch.records(), batch.facts())
    for has_old_weights, policy_step, versions in ((False, 4, [4, 5]), (True, 5, None)):
        batches = ReplayBatches(tmp_path, needs_routes=False, has_old_weights=has_old_weights)
        replayed = batches.take(6)
        assert replayed.policy_step == policy_step
        assert replayed.rollouts[0].versions == versions
