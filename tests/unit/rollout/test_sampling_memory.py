"""How much of what is sampled stays in memory: figures, not tokens and texts."""

import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from r1pipe.config.base import Reward, Sampling
from r1pipe.config.traces import Traces
from r1pipe.rollout.groups import SampleGroup, plan_groups
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.sampling import SamplingJob, read_samples, sample_and_score
from r1pipe.sft import rejection
from r1pipe.types import Problem, Rollout, Score

NUM_SAMPLES, NUM_TOKENS, MAX_PER_PROBLEM = 16, 500, 2
PROBLEMS = [
    Problem(id=str(n), kind="math", prompt=[{"role": "user", "content": "?"}], answer="1")
    for n in range(40)
]


class Source:
    """Gives samples one problem after the other, and holds them all, as an engine does."""

    def share(self, items: list[Problem]) -> list[Problem]:
        return items

    def generate_groups(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        *,
        journal: SampleJournal,
    ) -> Iterator[SampleGroup]:
        rng = random.Random(0)
        groups = plan_groups(problems, num_samples, seed_parts)
        for group in groups:
            for number in range(num_samples):
                ids = [rng.randrange(1000, 150_000) for _ in range(NUM_TOKENS)]
                logprobs = [-rng.random() for _ in ids]
                words = " ".join(rng.choice(("so", "and", "then", "three")) for _ in ids)
                rollout = Rollout(group.problem.id, number, [1], ids, logprobs, words, "stop")
                journal.add_sample(rollout)
                group.samples[number] = rollout
            yield group


@pytest.fixture
def job(tmp_path: Path) -> SamplingJob:
    return SamplingJob(
        problems=PROBLEMS,
        num_samples=NUM_SAMPLES,
        sampling=Sampling(max_completion_length=NUM_TOKENS),
        seed_parts=(0,),
        rewards=[Reward(function="reward_of_tests.always_one")],
        origin="weights",
        folder=tmp_path,
        label="test",
    )


def keep_figures(problem: Problem, rollouts: list[Rollout], scores: list[Score]) -> list:
    """What evaluation keeps."""
    for rollout in rollouts:
        rollout.empty()
    return list(zip(rollouts, scores))


def keep_traces(problem: Problem, rollouts: list[Rollout], scores: list[Score]) -> list[str]:
    """What reject and distill keep: the texts of a few."""
    settings = Traces(
        num_generations=NUM_SAMPLES,
        max_per_problem=MAX_PER_PROBLEM,
        sampling={"max_completion_length": NUM_TOKENS},
    )
    kept = rejection.select_samples(rollouts, scores, settings, rejection.Counter())
    texts = [rollout.completion for rollout in kept]
    for rollout in rollouts:
        rollout.empty()
    return texts


def measure(job: SamplingJob, keep: Callable) -> tuple[float, float]:
    """Bytes for each sampled token, that stay and at the peak."""
    # Once before, for what is imported on the way.
    sample_and_score(replace(job, problems=PROBLEMS[:1], folder=job.folder / "first"), Source, keep)
    tracemalloc.start()
    try:
        kept = sample_and_score(job, Source, keep)
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == len(PROBLEMS)
    tokens = len(PROBLEMS) * NUM_SAMPLES * NUM_TOKENS
    return stays / tokens, peak / tokens


@pytest.mark.parametrize(
    ("keep", "limit"),
    [(keep_figures, 2.0), pytest.param(keep_traces, 3.0, marks=pytest.mark.slow)],
)
def test_bytes_a_token(
    keep: Callable, limit: float, job: SamplingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokens, their log-probabilities and the text, all of it, 46 stay; the peak is
    that of the few groups that wait for their scores. Here a sample is 500 tokens: of longer ones
    the figures weigh less."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "pipeline")
    monkeypatch.setattr("r1pipe.rollout.scoring.MAX_WAITING", 2)
    stays, peak = measure(job, keep)
    print(f"{keep.__name__}: {stays:.2f} bytes a token stay, {peak:.2f} at the peak")
    assert stays < limit
    assert peak < 20
    # Found again on the disk: nothing more in memory.
    stays, peak = measure(job, keep)
    assert stays < limit
    assert peak < 10


def test_texts_are_read_back_in_order(job: SamplingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "pipeline")
    sample_and_score(job, Source, keep_figures)
    rows = list(read_samples(job))
    assert [(p.id, r.sample) for p, r, _ in rows] == [
        (problem.id, n) for problem in PROBLEMS for n in range(NUM_SAMPLES)
    ]
    assert all(r.num_tokens == NUM_TOKENS and r.completion for _, r, _ in rows)
    assert {score.total for _, _, score in rows} == {1.0}
