"""Rejection sampling: correct samples become traces. Used by reject and distill.

As in R1 (Guo et al. 2025, arXiv:2501.12948v1, section 2.3.3): several samples of each problem; the
correct ones are kept, except chains of thought with mixed languages, long paragraphs or code
blocks. The paper gives no thresholds; the recipe does.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from r1pipe.config.base import ENVIRONMENT, Environment
from r1pipe.config.sft import TraceFilters
from r1pipe.config.traces import Traces
from r1pipe.context import StageContext
from r1pipe.envs.base import make_environment
from r1pipe.rollout.sampling import SampleSource, SamplingJob, sample_and_score
from r1pipe.runs.folder import JOURNAL
from r1pipe.sft.filters import FLAWS, choose_diverse, choose_first, find_flaw
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line

REJECTIONS = ("truncated", "empty", "unjudged", "wrong")
"""Why a sample is not accepted."""
DROPS = ("too_hard", "too_easy", *FLAWS, "duplicate", "over_cap")
"""Why an accepted sample is dropped."""


def collect_traces(
    context: StageContext,
    origin: object,
    open_source: Callable[[], SampleSource],
    problems: list[Problem],
    settings: Traces,
    label: str,
) -> tuple[list[Problem], dict[str, Any]]:
    """Problems with a kept sample as `solution`, and counts of all samples by outcome. `origin`:
    see SamplingJob."""
    job = SamplingJob(
        problems=prepend_few_shot(problems, settings, context),
        num_samples=settings.num_generations,
        sampling=settings.sampling,
        seed_parts=(context.recipe.seed, context.stage_name),
        rewards=settings.rewards,
        origin=origin,
        folder=context.shared_folder / JOURNAL,
        label=label,
        environment=settings.environment,
    )
    originals = {problem.id: problem for problem in problems}

    def keep(
        asked: Problem, rollouts: list[Rollout], scores: list[Score]
    ) -> tuple[list[Problem], Counter[str]]:
        """One problem's traces, and counts of its samples by outcome."""
        counts: Counter[str] = Counter(tokens_sampled=sum(r.num_tokens for r in rollouts))
        kept = select_samples(rollouts, scores, settings, counts)
        problem = originals[asked.id]
        made = [make_trace(problem, rollout, settings.environment) for rollout in kept]
        for rollout in rollouts:
            rollout.empty()
        return made, counts

    traces: list[Problem] = []
    counts: Counter[str] = Counter()
    for made, counts_of_one in sample_and_score(job, open_source, keep):
        traces += made
        counts.update(counts_of_one)
    num_samples = len(problems) * settings.num_generations
    reasons = {reason: counts[reason] for reason in (*REJECTIONS, *DROPS)}
    log_line(f"{label}: {num_samples} samples, {describe_counts(reasons)}: {len(traces)} traces")
    return traces, {
        "samples": num_samples,
        "tokens_sampled": counts["tokens_sampled"],
        "samples_accepted": num_samples - sum(reasons[reason] for reason in REJECTIONS),
        **{f"dropped/{reason}": n for reason, n in reasons.items()},
        "problems_with_traces": counts["problems_with_traces"],
        "traces": len(traces),
    }


def make_trace(problem: Problem, rollout: Rollout, environment: Environment | None) -> Problem:
    """The problem with the sample as its solution. Of an episode: what the environment asked, the
    tools that it showed, and all messages up to the policy's last, its calls as it wrote them."""
    name, episode = f"{problem.id}#{rollout.sample}", rollout.episode
    if environment is None or episode is None:
        return replace(problem, id=name, solution=rollout.completion)
    turns = [
        {key: value for key, value in message.items() if not key.startswith("tool_call")}
        if message["role"] == "assistant"
        else message
        for message in episode.messages
    ]
    last = max(n for n, message in enumerate(turns) if message["role"] == "assistant")
    extra = {**(problem.extra or {})}
    if tools := list(make_environment(environment, problem).tools):
        extra["tools"] = tools
    return replace(
        problem,
        id=name,
        prompt=episode.prompt or problem.prompt,
        solution=turns[: last + 1],
        extra=extra or None,
    )


def drop_flawed(
    problems: list[Problem], filters: TraceFilters, context: StageContext
) -> list[Problem]:
    """The traces that pass the filters. Raises UserError if none does."""
    kept, counts = [], Counter()
    for problem in problems:
        if flaw := problem.solution and find_flaw(problem.trace_text, filters):
            counts[flaw] += 1
        else:
            kept.append(problem)
    dropped = describe_counts(counts)
    if not kept:
        raise UserError(f'stage "{context.stage_name}": no trace is left: {dropped}')
    if counts:
        log_line(f"{context.stage_name}: {len(problems)} traces, {dropped}: {len(kept)} left")
    context.facts |= {f"dropped/{flaw}": counts[flaw] for flaw in FLAWS}
    context.record_left("filters", len(kept))
    return kept


def describe_counts(counts: dict[str, int]) -> str:
    told = [f"{n} {reason.replace('_', ' ')}" for reason, n in counts.items() if n]
    return ", ".join(told) or "none dropped"


def prepend_few_shot(
    problems: list[Problem], settings: Traces, context: StageContext
) -> list[Problem]:
    """The problems as prompted: with the few-shot examples as earlier turns."""
    if settings.few_shot is None:
        return problems
    count = settings.few_shot.num_examples
    # One more than are shown, because no problem is shown its own solution.
    examples = [e for e in context.load_problems(settings.few_shot.data) if e.solution][: count + 1]
    if len(examples) < count:
        raise UserError(
            f"few_shot: {settings.few_shot.data.label} has no {count} solutions to show"
        )
    asked = []
    for problem in problems:
        shown = [example for example in examples if example.id != problem.id][:count]
        turns = [
            message
            for example in shown
            for message in (
                *(m for m in example.prompt if m["role"] != "system"),
                *example.trace,
            )
        ]
        system = [m for m in problem.prompt if m["role"] == "system"]
        rest = [m for m in problem.prompt if m["role"] != "system"]
        asked.append(replace(problem, prompt=[*system, *turns, *rest]))
    return asked


def select_samples(
    rollouts: list[Rollout], scores: list[Score], settings: Traces, counts: Counter[str]
) -> list[Rollout]:
    """The samples of one problem that become traces. Counts the others' reasons in `counts`."""
    left: dict[str, Rollout] = {}
    pairs = sorted(zip(rollouts, scores, strict=True), key=lambda pair: length_key(pair[0]))
    rejections = [find_rejection(rollout, score) for rollout, score in pairs]
    difficulty = judge_difficulty(rejections.count(None) / len(rejections), settings)
    for (rollout, _), rejection in zip(pairs, rejections):
        reason = rejection or difficulty or find_flaw(rollout.completion, settings.filters)
        if reason is None and rollout.completion in left:
            reason = "duplicate"
        if reason is None:
            left[rollout.completion] = rollout
        else:
            counts[reason] += 1
    choose = choose_diverse if settings.choose == "diverse" else choose_first
    kept = choose(list(left.values()), settings.max_per_problem)
    counts["over_cap"] += len(left) - len(kept)
    counts["problems_with_traces"] += bool(kept)
    return kept


def judge_difficulty(pass_rate: float, settings: Traces) -> str | None:
    """Why a problem is left out, whatever its accepted samples; None if it is not."""
    if pass_rate < settings.min_pass_rate:
        return "too_hard"
    return "too_easy" if pass_rate > settings.max_pass_rate else None


def length_key(rollout: Rollout) -> tuple[int, int, int]:
    """Sorts by tokens where the source counts them, then by characters."""
    return rollout.num_tokens, len(rollout.completion), rollout.sample


def find_rejection(rollout: Rollout, score: Score) -> str | None:
    """Why a sample is not accepted; None if it is complete, says something, and every function
    gives it the full reward. A reward of None is not accepted, but of an environment that gives
    none beside functions that do."""
    if rollout.truncated:
        return "truncated"
    if not rollout.completion:  # ended at once: no trace to train on
        return "empty"
    rewards, episode = dict(score.rewards), rollout.episode
    if episode and episode.error:
        return "unjudged"
    if episode and len(rewards) > 1 and rewards[ENVIRONMENT] is None:
        del rewards[ENVIRONMENT]
    values = rewards.values()
    if any(value is not None and value < 1.0 for value in values):
        return "wrong"
    return "unjudged" if None in values else None
