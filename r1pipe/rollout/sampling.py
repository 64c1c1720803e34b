"""Samples of many problems, scored as they come: shared by evaluation and rejection sampling.

Finished samples go into a journal in the stage's folder, from which a killed stage resumes. Every
sample has its own seed, so the result is the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Protocol, TypeVar

from r1pipe.config.base import Environment, Reward, Sampling
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.scoring import Scorer, ScoringThread
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.jsonl import dump_row, replace_nan
from r1pipe.utils.progress import StageProgress, log_line

T = TypeVar("T")
Keep = Callable[[Problem, list[Rollout], list[Score]], T]
"""From one problem's samples and scores to what the caller needs of them. It should `empty` the
rollouts: they are held until the last one is sampled."""


class SampleSource(Protocol):
    """Where samples come from: engine.Sampler, which explains the methods, or
    teacher.TeacherClient."""

    def share(self, items: list[Problem]) -> list[Problem]: ...

    def generate_groups(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        *,
        journal: SampleJournal,
    ) -> Iterator[SampleGroup]: ...


@dataclass(frozen=True)
class SamplingJob:
    """What to sample and how to score it. Problem ids must be unique."""

    problems: list[Problem]
    num_samples: int
    """Per problem."""
    sampling: Sampling
    seed_parts: tuple[object, ...]
    rewards: list[Reward]
    origin: object
    """Identifies the source, such as a checkpoint and its weights."""
    folder: Path
    """The journal's, the same for every rank."""
    label: str
    environment: Environment | None = None
    """In which the source's samples are episodes."""

    def digest(self) -> str:
        """Hash of everything that decides what the samples and their scores are."""
        settings = [
            self.origin,
            self.num_samples,
            self.sampling.model_dump(),
            self.seed_parts,
            [reward.decisive() for reward in self.rewards],
            *([self.environment.model_dump()] if self.environment else []),
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for problem in self.problems:
            digest.update(dump_row(problem).encode())
        return digest.hexdigest()


def sample_and_score(
    job: SamplingJob, open_source: Callable[[], SampleSource], keep: Keep[T]
) -> list[T]:
    """What `keep` returns for each problem, in the order of the problems.

    Samples in the journal are not sampled again; if it is complete, the source is not opened. Each
    rank samples and scores its share, and all get what was kept of every share: other texts and
    tokens never leave the rank and the journal.
    """
    scorer = Scorer(job.rewards, job.environment.weight if job.environment else None)
    journal = SampleJournal(job.folder, job.digest())
    journal.read()
    if journal.places:
        total = len(job.problems) * job.num_samples
        log_line(f"{job.label}: {len(journal.places)} of {total} samples are on disk already")
    numbers = range(job.num_samples)
    complete, missing = [], []
    for problem in job.problems:
        found = all((problem.id, n) in journal.places for n in numbers)
        (complete if found and problem.id in journal.scores else missing).append(problem)
    kept: dict[str, T] = {}
    for problem in complete[
        distributed.cut(len(complete), distributed.rank(), distributed.world_size())
    ]:
        rollouts = list(journal.find_samples(problem.id, job.num_samples).values())
        kept[problem.id] = keep(problem, rollouts, journal.scores[problem.id])
    if missing:
        source = open_source()
        with journal:
            kept |= sample_missing(job, missing, source, journal, scorer, keep)
    by_id = {name: value for part in distributed.gather(kept) for name, value in part.items()}
    return [by_id[problem.id] for problem in job.problems]


def read_samples(job: SamplingJob) -> Iterator[tuple[Problem, Rollout, Score]]:
    """All samples of a finished job, one at a time, in the order of the problems, without prompts
    and log-probabilities. For the first rank."""
    journal = SampleJournal(job.folder, job.digest())
    places, scores = journal.find()
    for problem in job.problems:
        for number, score in enumerate(scores[problem.id]):
            yield problem, journal.load(places[problem.id, number]), score


def sample_missing(
    job: SamplingJob,
    problems: list[Problem],
    source: SampleSource,
    journal: SampleJournal,
    scorer: Scorer,
    keep: Keep[T],
) -> dict[str, T]:
    """What `keep` returns for this rank's groups, by the problem's id. Samples and scores go into
    the journal at once."""

    def score(groups: list[SampleGroup]) -> Iterator[T]:
        owners = [group.problem for group in groups for _ in group.rollouts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        # A NaN is no verdict; where it is trained on, the breaker looks at it.
        scores = map(without_nonfinite, scorer.score(owners, rollouts))
        for group in groups:
            own = [next(scores) for _ in group.rollouts]
            journal.add_scores(group.problem.id, own)
            yield keep(group.problem, group.rollouts, own)

    samples = product((problem.id for problem in source.share(problems)), range(job.num_samples))
    num_new = sum(sample not in journal.places for sample in samples)
    with (
        StageProgress(job.label, num_new) as progress,
        ScoringThread(score, batched=True) as scoring,
    ):
        for group in source.generate_groups(
            problems, job.num_samples, job.sampling, job.seed_parts, journal=journal
        ):
            for rollout in group.rollouts:
                rollout.prompt_ids, rollout.logprobs = [], []
            scoring.add(group)
            if journal.num_added > progress.done:
                progress.advance(journal.num_added - progress.done)
    return {problems[index].id: value for index, value in scoring.results.items()}


def without_nonfinite(score: Score) -> Score:
    rewards = {name: replace_nan(value) for name, value in score.rewards.items()}
    return replace(score, rewards=rewards, total=replace_nan(score.total))


def identify_weights(checkpoint: str, dtype: str) -> object:
    """Changes with a checkpoint folder's weights, or a hub id, and with the sampler's dtype."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [checkpoint, weights, dtype]
