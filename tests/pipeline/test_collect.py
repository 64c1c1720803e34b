"""Collecting a step's batch from a real engine: scores, dynamic sampling, sampling ahead."""

from collections.abc import Iterator

import pytest
import reward_of_tests
import torch
from grpo_settings import make_grpo
from test_engine import ARCHITECTURES, CPU, SETTINGS, lengthen

from r1pipe.config.base import ProblemSet, Sampling
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rl.batch import Batch
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.grpo_collect import GrpoCollector
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.scoring import Scorer
from r1pipe.types import Problem

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 40}))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(build_model(ARCHITECTURES["llama"], tokenizer, 0), tokenizer, folder)
    sampler = Sampler(str(folder), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


def make_collector(
    sampler: Sampler, reward: str, problems: list[Problem] = PROBLEMS, **changes: object
) -> GrpoCollector:
    rewards = [{"function": reward}]
    sizes = {"prompts_per_step": 8, "num_generations": 4, "max_completion_length": 8}
    stage = make_grpo(rewards=rewards, **{**sizes, **changes})
    prompts = Prompts(problems, 0, stage.difficulty)
    return GrpoCollector(stage, sampler, Scorer(stage.rewards), prompts)


def collect(collector: GrpoCollector, step: int) -> Batch:
    return collector.collect(step, step, collector.draw(step))


def describe(batch: Batch) -> list[tuple[str, list[int]]]:
    return [(rollout.problem_id, rollout.completion_ids) for rollout in batch.rollouts]


def test_scores_and_advantages_belong_to_their_rollouts(sampler: Sampler) -> None:
    """Groups are judged in the order in which they finish, in another thread."""
    batch = collect(make_collector(sampler, "reward_of_tests.own_tokens"), 1)
    assert len(batch.rollouts) == len(batch.samples) == 32
    for group in batch.groups:
        assert {r.problem_id for r in group.rollouts} == {group.problem.id}
        ids = [rollout.completion_ids for rollout in group.rollouts]
        assert group.rewards == reward_of_tests.own_tokens(ids)
        order = sorted(range(4), key=lambda i: group.rewards[i])
        assert order == sorted(range(4), key=lambda i: group.advantages[i])
    records = batch.records()
    assert [r["reward"] for r in records] == [v for g in batch.groups for v in g.rewards]


def test_dynamic_sampling_refills_the_batch(sampler: Sampler) -> None:
    reward = "reward_of_tests.undecided_for_odd_answers"
    plain = collect(make_collector(sampler, reward), 1)
    assert plain.rounds == 1
    silent = plain.metrics()["groups_without_spread"]
    assert 0 < silent < 1
    changes = {"dynamic_sampling": True, "max_sampling_rounds": 9}
    batch = collect(make_collector(sampler, reward, **changes), 1)
    assert 1 < batch.rounds <= 9
    assert len(batch.samples) == 32
    taking_part = [group for group in batch.groups if len(set(group.rewards)) > 1]
    assert len(taking_part) == 8
    assert batch.metrics()["groups_sampled"] == len(batch.groups) > 8
    # The reward in the log is of all that was sampled, the advantage 0 for what was dropped.
    dropped = [group for group in batch.groups if len(set(group.rewards)) == 1]
    assert all(group.advantages == [0.0] * 4 for group in dropped)
    assert batch.metrics()["reward"] == pytest.approx(
        sum(sum(g.rewards) for g in batch.groups) / (4 * len(batch.groups))
    )


def test_dynamic_sampling_gives_up_in_the_end(sampler: Sampler) -> None:
    changes = {"dynamic_sampling": True, "max_sampling_rounds": 3}
    batch = collect(make_collector(sampler, "reward_of_tests.always_one", **changes), 1)
    assert batch.rounds == 3
    assert batch.samples == []
    assert batch.metrics()["groups_without_spread"] == 1.0


def test_a_problem_drawn_twice_gets_other_samples(sampler: Sampler) -> None:
    problems = PROBLEMS[:3]
    batch = collect(make_collector(sampler, "reward_of_tests.own_tokens", problems), 1)
    groups = {}
    for group in batch.groups:
        groups.setdefault(group.problem.id, []).append([r.completion_ids for r in group.rollouts])
    for first, *others in groups.values():
        assert others
        assert all(other != first for other in others)


def test_an_interrupted_batch_leaves_no_requests_behind(sampler: Sampler) -> None:
    collector = make_collector(sampler, "reward_of_tests.own_tokens")
    expected = describe(collect(collector, 1))

    def interrupt() -> None:
        for _ in sampler.generate_groups(PROBLEMS, 4, collector.sampling, (7,)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    again = make_collector(sampler, "reward_of_tests.own_tokens")
    torch.manual_seed(5)
    assert describe(collect(again, 1)) == expected


DIFFICULTY = {"num_samples": 2, "min_pass_rate": 0.1, "max_pass_rate": 0.9, "refresh_steps": 2}
EVEN = "reward_of_tests.undecided_for_odd_answers"
"""Pass rates: 1 for even answers, about a half for others."""


def test_refresh_samples_what_had_no_rollouts(sampler: Sampler) -> None:
    odd = {problem.id for problem in PROBLEMS if int(problem.answer) % 2}
    collector = make_collector(sampler, EVEN, difficulty=DIFFICULTY)
    collector.prompts.refresh(dict.fromkeys((problem.id for problem in PROBLEMS), 0.5))
    first = collect(collector, 1)
    drawn = {group.problem.id for group in first.groups}
    assert drawn - odd, "nothing is known yet"
    rates = collector.refresh_difficulty(2)
    assert set(rates) == {problem.id for problem in PROBLEMS}
    for group in first.groups:  # four samples of these
        assert rates[group.problem.id] == sum(group.rewards) / 4
    assert all(rates[name] == 1.0 for name in set(rates) - odd)
    assert {rates[name] for name in odd - drawn} <= {0.0, 0.5, 1.0}  # two samples of these
    chosen = {name for name, rate in rates.items() if 0.1 <= rate <= 0.9}
    assert 0 < collector.prompts.num_chosen == len(chosen) < len(odd)
    assert {group.problem.id for group in collect(collector, 3).groups} <= chosen


def test_collector_with_difficulty_resumes_where_it_was(sampler: Sampler) -> None:
    def make() -> GrpoCollector:
        rates = {problem.id: 0.5 for problem in PROBLEMS}
        prompts = Prompts(PROBLEMS, 0, stage.difficulty, rates)
        return GrpoCollector(stage, sampler, Scorer(stage.rewards), prompts)

    stage = make_collector(sampler, EVEN, difficulty={**DIFFICULTY, "order": "easy_first"}).stage
    collector = make()
    collect(collector, 1)
    state = collector.state_dict()
    expected = [collector.refresh_difficulty(2), describe(collect(collector, 3))]
    again = make()
    again.load_state_dict(state)
    assert [again.refresh_difficulty(2), describe(collect(again, 3))] == expected


def test_a_group_s_prompt_is_read_once(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other samples find it in the prefix cache, in whole blocks of 128 tokens on CPU."""
    problems = [lengthen(problem, 6) for problem in PROBLEMS[:4]]
    cached = []
    read = sampler.read

    def read_and_note(result, *arguments):
        cached.append(result.num_cached_tokens)
        return read(result, *arguments)

    monkeypatch.setattr(sampler, "read", read_and_note)
    sampler.generate(problems, 8, Sampling(max_completion_length=2), (0,))
    assert sum(tokens >= 128 for tokens in cached) >= 4 * 7
