"""Difficulty: how often a policy solves each problem, measured, kept, and used to choose.

    runs/<name>/<stage>/difficulty.jsonl
      {"problem_id", "problem", "checkpoint", "protocol", "step", "num_samples", "pass_rate"}

`problem`, `checkpoint` and `protocol` are hashes, of what is asked, of the policy's files, and of
how it was sampled and judged: a later stage that asks the same of the same policy takes the rate
from there. Rows with a `step` above 0 are of the policy in training, after that step. `pass_rate`
is null where no sample could be judged.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from r1pipe.config.base import Sampling
from r1pipe.config.rl import Difficulty, Grpo
from r1pipe.context import StageContext
from r1pipe.rl.curriculum import PassRates, choose_problems, compute_pass_rate, find_reward
from r1pipe.rollout.sampling import SampleSource, SamplingJob, identify_weights, sample_and_score
from r1pipe.rollout.scoring import mean
from r1pipe.runs.folder import JOURNAL
from r1pipe.runs.lineage import hash_checkpoint
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_jsonl
from r1pipe.utils.progress import log_line

FILE = "difficulty.jsonl"


def measure_difficulty(
    stage: Grpo,
    context: StageContext,
    problems: list[Problem],
    sampling: Sampling,
    open_source: Callable[[], SampleSource],
) -> tuple[PassRates, list[dict[str, Any]]]:
    """The pass rate of every problem under the policy that the stage starts from, and the rows of
    difficulty.jsonl; nothing if the stage does not choose by it.

    What an earlier stage of the run has measured is not measured again. Raises UserError if no
    problem is within the stage's limits.
    """
    settings = stage.difficulty
    if settings is None:
        return {}, []
    reward = find_reward(settings, stage.rewards)
    seed_parts = (context.recipe.seed, "difficulty")
    weights = distributed.on_first_rank(
        lambda: digest(hash_checkpoint(stage.from_, context.run.path))
    )
    protocol = digest(
        [settings.num_samples, sampling.model_dump(), reward.model_dump(), seed_parts]
    )
    known = distributed.on_first_rank(lambda: read_known(context, weights, protocol))
    keys = {problem.id: digest(asdict(problem)) for problem in problems}
    missing = [problem for problem in problems if keys[problem.id] not in known]
    if missing:
        job = SamplingJob(
            problems=missing,
            num_samples=settings.num_samples,
            sampling=sampling,
            seed_parts=seed_parts,
            rewards=[reward],
            origin=identify_weights(context.checkpoint(stage.from_), context.recipe.dtype),
            folder=context.shared_folder / JOURNAL / "difficulty",
            label=f"{stage.name}: difficulty",
        )

        def keep(problem: Problem, rollouts: list[Rollout], scores: list[Score]) -> float | None:
            for rollout in rollouts:
                rollout.empty()
            return compute_pass_rate(scores, reward)

        for problem, rate in zip(missing, sample_and_score(job, open_source, keep), strict=True):
            known[keys[problem.id]] = rate
    rates = {problem.id: known[keys[problem.id]] for problem in problems}
    check_choice(context, settings, rates, len(choose_problems(problems, rates, settings)))
    return rates, [
        {
            "problem_id": problem.id,
            "problem": keys[problem.id],
            "checkpoint": weights,
            "protocol": protocol,
            "step": 0,
            "num_samples": settings.num_samples,
            "pass_rate": rates[problem.id],
        }
        for problem in problems
    ]


def check_choice(
    context: StageContext, settings: Difficulty, rates: PassRates, num_chosen: int
) -> None:
    """Say and note how many problems are chosen. Raises UserError if none are."""
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


def read_known(context: StageContext, weights: str, protocol: str) -> PassRates:
    """What finished stages of the run have measured of this policy in this way, by the hash of the
    problem."""
    known: PassRates = {}
    for stage in context.recipe.stages:
        path = context.run.stage_dir(stage.name) / FILE
        for _, row in read_jsonl(path, missing_ok=True):
            if row["step"] == 0 and (row["checkpoint"], row["protocol"]) == (weights, protocol):
                known[row["problem"]] = row["pass_rate"]
    return known


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
