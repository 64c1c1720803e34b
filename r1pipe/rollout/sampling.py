"""Samples of many problems, judged as they come and kept as they are judged: what evaluation and
rejection sampling have in common.

What is finished goes into a journal in the stage's folder, so that a stage that is killed goes on
with what it has. Every sample has a seed of its own, so the result is the same.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from r1pipe.config.base import Reward, Sampling
from r1pipe.rollout.journal import SampleJournal, Samples
from r1pipe.rollout.scoring import Scorer
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.jsonl import dump_row, replace_nan
from r1pipe.utils.progress import StageProgress, log_line

T = TypeVar("T")
Keep = Callable[[Problem, list[Rollout], list[Score]], T]
"""Given one problem's samples and their scores, returns what is asked of them. It should `empty`
the rollouts: they are held until the last one is sampled."""

MAX_WAITING = 256
"""Groups that may wait for their scores before sampling waits for the graders."""


class SampleSource(Protocol):
    """Where samples come from: rollout.Sampler, or teacher.Teacher. Its methods are explained at
    the former."""

    def own_part(self, num_problems: int) -> slice: ...

    def kept_part(self, num_problems: int) -> slice: ...

    def generate(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        on_group: Callable[[int, list[Rollout]], None],
        *,
        part: slice,
        on_sample: Callable[[Rollout], None],
        have: Samples,
    ) -> list[Rollout]: ...


@dataclass(frozen=True)
class SamplingJob:
    """What is to be sampled, and how it is judged. No two problems may have the same id."""

    problems: list[Problem]
    num_samples: int
    """Of each problem."""
    sampling: Sampling
    seed_parts: tuple[object, ...]
    rewards: list[Reward]
    origin: object
    """Tells the samples of one source from another's: a checkpoint and its weights."""
    folder: Path
    """Of the journal: the same for every rank."""
    label: str

    def digest(self) -> str:
        """Of everything that decides what the samples and their scores are."""
        settings = [
            self.origin,
            self.num_samples,
            self.sampling.model_dump(),
            self.seed_parts,
            [reward.model_dump() for reward in self.rewards],
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for problem in self.problems:
            digest.update(dump_row(problem).encode())
        return digest.hexdigest()


def sample_and_score(
    job: SamplingJob, open_source: Callable[[], SampleSource], keep: Keep[T]
) -> list[T]:
    """What `keep` makes of each problem's samples, in the order of the problems.

    What the journal has is not sampled again; if that is everything the source is not opened. Of
    several ranks each samples and scores its share, and all get what was kept of every share:
    texts and tokens of the rest never leave the rank and the journal.
    """
    scorer = Scorer(job.rewards)
    journal = SampleJournal(job.folder, job.digest())
    places, scores = journal.read()
    if places:
        total = len(job.problems) * job.num_samples
        log_line(f"{job.label}: {len(places)} of {total} samples are there from before")
    numbers = range(job.num_samples)

    def is_whole(problem: Problem) -> bool:
        return problem.id in scores and all((problem.id, n) in places for n in numbers)

    whole = [problem for problem in job.problems if is_whole(problem)]
    own = distributed.cut(len(whole), distributed.rank(), distributed.world_size())
    kept: dict[str, T] = {}
    for problem in whole[own]:
        rollouts = [journal.load(places[problem.id, n]) for n in numbers]
        kept[problem.id] = keep(problem, rollouts, scores[problem.id])
    missing = [problem for problem in job.problems if not is_whole(problem)]
    if missing:
        source = open_source()
        part = missing[source.own_part(len(missing))]
        have = {
            (problem.id, n): journal.load(places[problem.id, n])
            for problem in part
            for n in numbers
            if (problem.id, n) in places
        }
        with journal:
            kept |= sample_missing(job, missing, have, source, Judge(scorer, journal, keep))
    by_id = {name: value for part in distributed.gather(kept) for name, value in part.items()}
    return [by_id[problem.id] for problem in job.problems]


def read_samples(job: SamplingJob) -> Iterator[tuple[Problem, Rollout, Score]]:
    """All samples of a job that is done, one at a time, in the order of the problems; without
    prompts and log-probabilities. For the first rank."""
    journal = SampleJournal(job.folder, job.digest())
    places, scores = journal.find()
    for problem in job.problems:
        for number, score in enumerate(scores[problem.id]):
            yield problem, journal.load(places[problem.id, number]), score


def sample_missing(
    job: SamplingJob,
    problems: list[Problem],
    have: Samples,
    source: SampleSource,
    judge: "Judge[T]",
) -> dict[str, T]:
    """What is kept of this rank's groups: samples go into the journal at once, scores as soon as
    they are judged."""
    part = source.own_part(len(problems))
    problems_here = problems[part]
    kept = problems_here[source.kept_part(len(problems_here))]
    kept_ids = {problem.id for problem in kept}
    num_new = len(problems_here) * job.num_samples - len(have)
    with StageProgress(job.label, num_new) as progress, judge:

        def on_sample(rollout: Rollout) -> None:
            if rollout.problem_id in kept_ids:
                judge.journal.add_sample(rollout)
            progress.advance()

        def on_group(index: int, rollouts: list[Rollout]) -> None:
            if problems_here[index].id in kept_ids:
                judge.take(problems_here[index], rollouts)
            else:
                for rollout in rollouts:
                    rollout.empty()

        source.generate(
            problems,
            job.num_samples,
            job.sampling,
            job.seed_parts,
            on_group,
            part=part,
            on_sample=on_sample,
            have=have,
        )
    return judge.kept


class Judge(Generic[T]):
    """Scores groups in a thread while others are being sampled: at a time all that have piled up,
    so that the graders' processes always have work. Use as a context manager."""

    def __init__(self, scorer: Scorer, journal: SampleJournal, keep: Keep[T]):
        self._scorer, self.journal, self._keep = scorer, journal, keep
        self.kept: dict[str, T] = {}
        """By the problem's id, what `keep` has made of its samples."""
        self._waiting: deque[tuple[Problem, list[Rollout]]] = deque()
        self._thread = ThreadPoolExecutor(1, "judge")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> "Judge[T]":
        return self

    def take(self, problem: Problem, rollouts: list[Rollout]) -> None:
        """Raises what an earlier call of the rewards has raised."""
        for rollout in rollouts:
            rollout.prompt_ids, rollout.logprobs = [], []
        self._waiting.append((problem, rollouts))
        self._running.append(self._thread.submit(self._judge))
        # Each call takes all that wait, so those behind the first one find little or nothing.
        while self._running and (self._running[0].done() or len(self._running) > MAX_WAITING):
            self._running.popleft().result()

    def _judge(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        owners = [problem for problem, rollouts in batch for _ in rollouts]
        rollouts = [rollout for _, group in batch for rollout in group]
        # What is no number is no verdict either; where it is trained on, the breaker looks at it.
        scores = map(without_nonfinite, self._scorer.score(owners, rollouts))
        for problem, group in batch:
            of_group = [next(scores) for _ in group]
            self.journal.add_scores(problem.id, of_group)
            self.kept[problem.id] = self._keep(problem, group, of_group)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            for call in self._running:
                call.result()


def without_nonfinite(score: Score) -> Score:
    rewards = {name: replace_nan(value) for name, value in score.rewards.items()}
    return replace(score, rewards=rewards, total=replace_nan(score.total))


def identify_weights(checkpoint: str, dtype: str) -> object:
    """Changes when a checkpoint folder's weights do, of a hub id the id; and with the sampler's
    dtype."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [checkpoint, weights, dtype]
