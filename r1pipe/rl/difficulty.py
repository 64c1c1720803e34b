"""Difficulty: how often a policy solves each problem. Measured once, kept, used to select problems.

    runs/<name>/<stage>/difficulty.jsonl
      {"problem_id", "problem", "checkpoint", "protocol", "step", "num_samples", "pass_rate"}

`problem`, `checkpoint` and `protocol` are hashes of the problem, of the policy's files, and of how
it was sampled and scored: a later stage with the same three reuses the rate. A `step` above 0 is
that of the policy in training. `pass_rate` is null where no sample could be judged.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from r1pipe.config.rl import Difficulty, Grpo
from r1pipe.context import StageContext
from r1pipe.rl.curriculum import PassRates, choose_problems, compute_pass_rate, find_passing
from r1pipe.rollout.sampling import SampleSource, SamplingJob, identify_weights, sample_and_score
from r1pipe.rollout.scoring import mean
from r1pipe.runs.folder import JOURNAL
from r1pipe.runs.lineage import hash_checkpoint
from r1pipe.runs.logs import JsonlLog
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_jsonl
from r1pipe.utils.progress import log_line

FILE = "difficulty.jsonl"


class DifficultyLog(JsonlLog):
    """A stage's difficulty.jsonl. `measured`: its rows of step 0."""

    def __init__(self, folder: Path, measured: list[dict[str, Any]]):
        super().__init__(folder / FILE)
        self.measured = measured

    @property
    def measured_rates(self) -> PassRates:
        return {row["problem_id"]: row["pass_rate"] for row in self.measured}


def measure_difficulty(
    stage: Grpo,
    context: StageContext,
    problems: list[Problem],
    open_source: Callable[[], SampleSource],
) -> DifficultyLog | None:
    """The pass rate of every problem under the policy that the stage starts from; None if the
    stage does not select by it.

    Rates that an earlier stage of the run measured are reused. Raises UserError if no
    problem is within the stage's limits.
    """
    settings = stage.difficulty
    if settings is None:
        return None
    job = make_job(stage, settings, context, problems)
    origin = distributed.on_first_rank(lambda: describe_origin(stage, context, job))
    known = distributed.on_first_rank(lambda: read_known(context, origin))
    keys = {problem.id: digest(asdict(problem)) for problem in problems}
    if missing := [problem for problem in problems if keys[problem.id] not in known]:
        name = find_passing(settings, stage)
        sampled = sample_pass_rates(replace(job, problems=missing), name, open_source)
        known |= {keys[problem.id]: rate for problem, rate in zip(missing, sampled, strict=True)}
    rates = {problem.id: known[keys[problem.id]] for problem in problems}
    check_choice(context, settings, rates, len(choose_problems(problems, rates, settings)))
    facts = {**origin, "step": 0, "num_samples": settings.num_samples}
    measured = [
        {"problem_id": name, "problem": keys[name], **facts, "pass_rate": rate}
        for name, rate in rates.items()
    ]
    return DifficultyLog(context.folder, measured)


def make_job(
    stage: Grpo, settings: Difficulty, context: StageContext, problems: list[Problem]
) -> SamplingJob:
    return SamplingJob(
        problems=problems,
        num_samples=settings.num_samples,
        sampling=stage.sampling,
        seed_parts=(context.recipe.seed, "difficulty"),
        rewards=[r for r in stage.rewards if r.function == find_passing(settings, stage)][:1],
        origin=identify_weights(context.checkpoint(stage.from_), context.recipe.dtype),
        folder=context.shared_folder / JOURNAL / "difficulty",
        label=f"{stage.name}: difficulty",
        environment=stage.environment,
    )


def describe_origin(stage: Grpo, context: StageContext, job: SamplingJob) -> dict[str, str]:
    """`checkpoint` and `protocol` of difficulty.jsonl."""
    judged_by = [part.model_dump() for part in (*job.rewards, job.environment) if part]
    protocol = [job.num_samples, job.sampling.model_dump(), *judged_by, job.seed_parts]
    weights = hash_checkpoint(stage.from_, context.run.path)
    return {"checkpoint": digest(weights), "protocol": digest(protocol)}


def sample_pass_rates(
    job: SamplingJob, reward: str, open_source: Callable[[], SampleSource]
) -> list[float | None]:
    """In the order of the job's problems."""

    def keep(problem: Problem, rollouts: list[Rollout], scores: list[Score]) -> float | None:
        for rollout in rollouts:
            rollout.empty()
        return compute_pass_rate(scores, reward)

    return sample_and_score(job, open_source, keep)


def check_choice(
    context: StageContext, settings: Difficulty, rates: PassRates, num_chosen: int
) -> None:
    """Log and record how many problems are selected. Raises UserError if none are."""
    name, low, high = context.stage_name, settings.min_pass_rate, settings.max_pass_rate
    known = [rate for rate in rates.values() if rate is not None]
    below, above = sum(rate < low for rate in known), sum(rate > high for rate in known)
    if not num_chosen:
        raise UserError(
            f'stage "{name}": no problem has a pass rate from {low:g} to {high:g} ({below} below, '
            f"{above} above): change difficulty.min_pass_rate, max_pass_rate, or the data"
        )
    pass_rate = mean(known)
    log_line(
        f"{name}: {num_chosen} of {len(rates)} problems have a pass rate from {low:g} to {high:g} "
        f"({below} below, {above} above, mean {pass_rate:.1%})"
    )
    context.record_left("difficulty", num_chosen)
    context.facts["pass_rate_before"] = round(pass_rate, 4)


def read_known(context: StageContext, origin: dict[str, str]) -> PassRates:
    """Rates that finished stages of the run measured with the same `origin`, by the hash of the
    problem."""
    known: PassRates = {}
    for stage in context.recipe.stages:
        path = context.run.stage_dir(stage.name) / FILE
        for _, row in read_jsonl(path, missing_ok=True):
            if row["step"] == 0 and row.items() >= origin.items():
                known[row["problem"]] = row["pass_rate"]
    return known


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
