"""Samples of many problems, judged as they come and kept as they are judged: what evaluation and
rejection sampling have in common.

What is finished goes into a journal in the stage's folder, so that a stage that is killed goes on
with what it has. Every sample has a seed of its own, so the result is the same.
"""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from r1pipe import distributed
from r1pipe.config import Reward, Sampling
from r1pipe.progress import StageProgress, say
from r1pipe.records import Problem, Rollout, Score, dump_row, replace_nan
from r1pipe.scoring import Scorer

Samples = dict[tuple[str, int], Rollout]
"""By the problem's id and the sample's number."""
Group = tuple[list[Rollout], list[Score]]
"""The samples of one problem and their scores."""


class Source(Protocol):
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


class Journal:
    """Samples and their scores on disk, a line each, as soon as they are there; a file per rank.

    `digest` is of everything that decides what the samples are. A journal of another one is thrown
    away; so is a last line that a kill has cut.
    """

    def __init__(self, folder: Path, digest: str):
        self.folder = folder
        self._header = {"journal": digest}
        self._lock = threading.Lock()
        self._file: TextIO | None = None

    def read(self) -> tuple[Samples, dict[str, list[Score]]]:
        """Samples, and by the problem's id the scores of all its samples; the same on all ranks."""
        return distributed.on_first_rank(self._read)

    def _read(self) -> tuple[Samples, dict[str, list[Score]]]:
        samples: Samples = {}
        scores: dict[str, list[Score]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            rows = read_whole_lines(path)
            if rows[:1] != [self._header]:
                path.unlink()
                continue
            for row in rows[1:]:
                if "scores" in row:
                    scores[row["problem_id"]] = [Score(**score) for score in row["scores"]]
                else:
                    rollout = Rollout(prompt_ids=[], logprobs=[], **row)
                    samples[rollout.problem_id, rollout.sample] = rollout
        return samples, scores

    def __enter__(self) -> "Journal":
        """Begin a file of this rank and of this start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns()}-{distributed.rank()}.jsonl"
        self._file = (self.folder / name).open("w", encoding="utf-8")
        self._write(self._header)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add_sample(self, rollout: Rollout) -> None:
        self._write(
            {
                "problem_id": rollout.problem_id,
                "sample": rollout.sample,
                "completion_ids": rollout.completion_ids,
                "completion": rollout.completion,
                "finish_reason": rollout.finish_reason,
            }
        )

    def add_scores(self, problem_id: str, scores: list[Score]) -> None:
        self._write({"problem_id": problem_id, "scores": [asdict(score) for score in scores]})

    def _write(self, row: dict[str, Any]) -> None:
        with self._lock:  # scores come from another thread
            self._file.write(dump_row(row) + "\n")
            self._file.flush()


def read_whole_lines(path: Path) -> list[dict]:
    """The rows of a file whose writer may have been killed in the middle of the last one. What
    comes after a broken line is left out as well, and no error: it is sampled again."""
    rows = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


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
    job: SamplingJob, open_source: Callable[[], Source]
) -> tuple[list[Rollout], list[Score]]:
    """`num_samples` scored rollouts per problem, those of one problem next to each other; without
    prompts and log-probabilities.

    What the journal has is not sampled again; if that is everything the source is not opened. Of
    several ranks each samples and scores its share, and gets everything.
    """
    scorer = Scorer(job.rewards)
    journal = Journal(job.folder, job.digest())
    have, scores = journal.read()
    if have:
        total = len(job.problems) * job.num_samples
        say(f"{job.label}: {len(have)} of {total} samples are there from before")
    numbers = range(job.num_samples)
    groups: dict[str, Group] = {
        problem_id: ([have[problem_id, n] for n in numbers], scores_of_problem)
        for problem_id, scores_of_problem in scores.items()
        if all((problem_id, n) in have for n in numbers)
    }
    missing = [problem for problem in job.problems if problem.id not in groups]
    if missing:
        source = open_source()
        with journal:
            new = sample_missing(job, missing, have, source, scorer, journal)
        for part in distributed.gather(new):
            groups |= part
    ordered = [groups[problem.id] for problem in job.problems]
    return [r for rollouts, _ in ordered for r in rollouts], [s for _, ss in ordered for s in ss]


def sample_missing(
    job: SamplingJob,
    problems: list[Problem],
    have: Samples,
    source: Source,
    scorer: Scorer,
    journal: Journal,
) -> dict[str, Group]:
    """This rank's groups: samples in the journal at once, scores as soon as they are judged."""
    part = source.own_part(len(problems))
    problems_here = problems[part]
    kept = problems_here[source.kept_part(len(problems_here))]
    kept_ids = {problem.id for problem in kept}
    num_new = sum((p.id, n) not in have for p in problems_here for n in range(job.num_samples))
    groups: dict[str, Group] = {}
    with StageProgress(job.label, num_new) as progress, Judge(scorer, journal, groups) as judge:

        def on_sample(rollout: Rollout) -> None:
            if rollout.problem_id in kept_ids:
                journal.add_sample(rollout)
            progress.advance()

        def on_group(index: int, rollouts: list[Rollout]) -> None:
            if problems_here[index].id in kept_ids:
                judge.take(problems_here[index], rollouts)

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
    return groups


class Judge:
    """Scores groups in a thread while others are being sampled: at a time all that have piled up,
    so that the graders' processes always have work. Use as a context manager."""

    def __init__(self, scorer: Scorer, journal: Journal, groups: dict[str, Group]):
        self._scorer, self._journal, self._groups = scorer, journal, groups
        self._waiting: deque[tuple[Problem, list[Rollout]]] = deque()
        self._thread = ThreadPoolExecutor(1, "judge")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> "Judge":
        return self

    def take(self, problem: Problem, rollouts: list[Rollout]) -> None:
        """Raises what an earlier call of the rewards has raised."""
        self._waiting.append((problem, rollouts))
        self._running.append(self._thread.submit(self._judge))
        while self._running and self._running[0].done():
            self._running.popleft().result()

    def _judge(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        owners = [problem for problem, rollouts in batch for _ in rollouts]
        rollouts = [rollout for _, group in batch for rollout in group]
        # What is no number is no verdict either; where it is trained on, the breaker looks at it.
        scores = map(without_nonfinite, self._scorer.score(owners, rollouts))
        for problem, group in batch:
            for rollout in group:
                rollout.prompt_ids, rollout.logprobs = [], []
            self._groups[problem.id] = (group, [next(scores) for _ in group])
            self._journal.add_scores(problem.id, self._groups[problem.id][1])

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
