"""Sampling that is interrupted and resumes, from a real engine: nothing twice, nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from samples import sample_all
from test_engine import ARCHITECTURES, CPU, SETTINGS

from r1pipe.config.base import ProblemSet, Reward, Sampling
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.sampling import SamplingJob
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 6}))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(build_model(ARCHITECTURES["llama"], tokenizer, 0), tokenizer, folder)
    sampler = Sampler(str(folder), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


@pytest.fixture
def job(tmp_path: Path) -> SamplingJob:
    return SamplingJob(
        problems=PROBLEMS,
        num_samples=4,
        sampling=Sampling(max_completion_length=8),
        seed_parts=(0, "test"),
        rewards=[Reward(function="reward_of_tests.own_tokens")],
        origin="weights",
        folder=tmp_path / "journal",
        label="test",
    )


class Counted:
    """An engine that counts what it samples, and breaks after so many samples."""

    def __init__(self, sampler: Sampler, breaks_after: int | None = None):
        self._sampler, self._breaks_after = sampler, breaks_after
        self.share = sampler.share
        self.num_sampled = 0

    def generate_groups(self, *arguments: object, journal: SampleJournal) -> Iterator[SampleGroup]:
        add_sample = journal.add_sample

        def count(rollout: Rollout) -> None:
            if self.num_sampled == self._breaks_after:
                raise KeyboardInterrupt
            self.num_sampled += 1
            add_sample(rollout)

        journal.add_sample = count
        return self._sampler.generate_groups(*arguments, journal=journal)


def describe(result: tuple) -> list[tuple]:
    rollouts, scores = result
    return [
        (r.problem_id, r.sample, r.completion_ids, r.completion, r.finish_reason, s.rewards)
        for r, s in zip(rollouts, scores, strict=True)
    ]


def interrupt(job: SamplingJob, sampler: Sampler, breaks_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        sample_all(job, lambda: Counted(sampler, breaks_after))


def must_not_open() -> Sampler:
    raise AssertionError("nothing is left to sample")


def test_resumes_where_it_was_interrupted(
    sampler: Sampler, job: SamplingJob, tmp_path: Path
) -> None:
    """Also in the middle of a problem's samples, and twice."""
    uninterrupted = sample_all(replace(job, folder=tmp_path / "other"), lambda: sampler)
    interrupt(job, sampler, 7)
    interrupt(job, sampler, 9)
    last = Counted(sampler)
    result = sample_all(job, lambda: last)
    assert last.num_sampled == 24 - 7 - 9
    assert describe(result) == describe(uninterrupted)
    assert describe(sample_all(job, must_not_open)) == describe(uninterrupted)


def test_a_line_cut_by_a_kill_is_sampled_again(sampler: Sampler, job: SamplingJob) -> None:
    interrupt(job, sampler, 10)
    (journal,) = job.folder.iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    samples = [line for line in lines if b'"completion_ids"' in line]
    assert len(samples) == 10
    journal.write_bytes(lines[0] + b"".join(samples)[:-5])
    last = Counted(sampler)
    result = sample_all(job, lambda: last)
    assert last.num_sampled == 24 - 9
    assert len(describe(result)) == 24


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "other weights"},
        {"seed_parts": (1, "test")},
        {"sampling": Sampling(max_completion_length=7)},
        {"problems": [replace(PROBLEMS[0], answer="-1"), *PROBLEMS[1:]]},
        {"rewards": [Reward(function="reward_of_tests.always_one")]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_samples_of_another_protocol_are_not_taken(
    change: dict, sampler: Sampler, job: SamplingJob
) -> None:
    interrupt(job, sampler, 7)
    last = Counted(sampler)
    sample_all(replace(job, **change), lambda: last)
    assert last.num_sampled == 24


def test_a_reward_that_fails_ends_the_sampling(sampler: Sampler, job: SamplingJob) -> None:
    broken = replace(job, rewards=[Reward(function="reward_of_tests.raises")])
    with pytest.raises(UserError, match="broken reward"):
        sample_all(broken, lambda: sampler)
