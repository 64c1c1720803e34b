"""Roll out -> score -> advantage -> update -> sync: the loop of the stages that train a model on
its own samples, and the checks that stop it if sampler and trainer disagree.

`grpo` learns from advantages, `on_policy_distill` from the divergence from a teacher.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from r1pipe.config.base import Sampling
from r1pipe.config.rl import OnPolicy
from r1pipe.context import StageContext
from r1pipe.envs.driver import Source
from r1pipe.models.adapter import describe, save_adapter
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rl.batch import Batch
from r1pipe.rl.collect import Collector
from r1pipe.rl.prefetch import Prefetcher
from r1pipe.rl.update import Updater
from r1pipe.rollout.groups import cover_engines
from r1pipe.rollout.store import RolloutFiles
from r1pipe.runs.folder import find_steps
from r1pipe.trainer.breaker import Breaker, EventLog
from r1pipe.trainer.checkpoints import AppendOnlyLog, Checkpoints, Stateful
from r1pipe.trainer.packing import Sample
from r1pipe.types import Problem
from r1pipe.utils import distributed, timeline
from r1pipe.utils.errors import OutOfBudget, Tripped
from r1pipe.utils.progress import Interrupt, StageProgress, log_line

PROBE_PROMPTS, PROBE_TOKENS = 4, 16
"""Size of the probe after a weight sync: reaches every layer in prefill and decoding."""


class BatchSource(Protocol):
    """Where `train` gets its batches: Prefetcher, or ReplayBatches."""

    def take(self, step: int) -> Batch:
        """The step's batch, scored, with advantages."""

    def wait(self) -> None:
        """Return when weights may change."""

    @property
    def ahead(self) -> Batch | None:
        """The batch that was sampled ahead, if there is one."""


class WeightReceiver(Protocol):
    """What `train` syncs: the collector's sampler, or NoSampler."""

    @property
    def sleep_level(self) -> int:
        """0: it is always awake."""

    @property
    def lora_rank(self) -> int:
        """0: it takes weights; else an adapter."""

    def sleep(self) -> None:
        """Leave the memory of a shared GPU to the trainer."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Also wakes it."""

    def load_adapter(self, folder: str) -> None:
        """Also wakes it."""


class BestMetric(NamedTuple):
    """The metric that is shown and by which the best checkpoint is kept."""

    metric: str
    is_cost: bool = False

    def score(self, metrics: Mapping[str, Any]) -> float | None:
        """Higher is better; None if the update was skipped before it was known."""
        value = metrics.get(self.metric)
        return -value if self.is_cost and value is not None else value


def run_steps(
    stage: OnPolicy,
    context: StageContext,
    updater: Updater,
    collector: Collector,
    goal: BestMetric,
) -> dict[str, Any]:
    """Take all steps, or those that an interrupted run has left; write checkpoint, metrics.jsonl
    and rollouts. Returns facts for stage.json."""
    sampler = collector.sampler
    breaker = Breaker(stage, EventLog(context.folder), context.shared_folder)
    rollout_files = RolloutFiles(context.folder, context.recipe.rollouts)
    metrics_log = context.open_log()
    problems = collector.prompts.problems
    with (
        Prefetcher(collector, stage) as batches,
        Interrupt.deferred(stage.save_grace_s),
        context.open_progress(stage.name, stage.max_steps) as progress,
    ):
        parts: dict[str, Stateful] = {"updater": updater, "batches": batches, "breaker": breaker}
        logs: dict[str, AppendOnlyLog] = {"metrics": metrics_log, "rollouts": rollout_files}
        logs |= {"events": breaker.log, **collector.logs}
        checkpoints = Checkpoints(context.shared_folder, stage, stage.name, parts, logs)
        if done := checkpoints.restore_last_good():
            progress.start_at(done)
        if done or sampler.asleep or stage.fp8:
            sync(updater, sampler)
            if sampler.sleep_level or stage.fp8:
                probe_sync(stage, updater, sampler, breaker, problems, done)
        if not done:
            collector.begin()
        steps = train(stage, updater, sampler, batches, breaker, done + 1)
        steps = save_at_budget(steps, stage, collector, checkpoints)
        try:
            for metrics, batch in steps:
                metrics |= collector.end_step(metrics["step"])
                metrics_log.write(metrics)
                rollout_files.write(batch.step, batch.records(), batch.facts())
                show(progress, metrics, goal)
                checkpoints.end_step(metrics["step"], goal.score(metrics))
        except Tripped as error:
            batch = cast("Batch", breaker.batch)
            rollout_files.write(batch.step, batch.records(), batch.facts())
            if error.rollback:
                checkpoints.discard_from(breaker.first_suspect)
            raise
    final = check_last_sync(stage, updater, sampler, breaker, problems)
    save_checkpoint(updater.model, sampler.tokenizer, context.folder)
    return {
        "train_rows": len(problems),
        "optimizer_steps": stage.max_steps,
        **describe(updater.model),
        **checkpoints.facts(),
        **final,
    }


def save_at_budget(
    steps: Iterator[tuple[dict[str, Any], Batch]],
    stage: OnPolicy,
    collector: Collector,
    checkpoints: Checkpoints,
) -> Iterator[tuple[dict[str, Any], Batch]]:
    """The steps. If a judge's budget is used up while the next batch is scored, the last step is
    saved, as it was before that batch was drawn. Not with `max_staleness`, where the policy that
    has sampled it is gone, nor of several processes, of which the others still sample: those resume
    from the last of `save_steps`."""
    last = 0
    while True:
        state = collector.state_dict()
        try:
            metrics, batch = next(steps)
        except StopIteration:
            return
        except OutOfBudget:
            saved = last in find_steps(checkpoints.folder)
            if last and not saved and not stage.max_staleness and distributed.alone():
                collector.load_state_dict(state)
                checkpoints.save(last)
            raise
        yield metrics, batch
        last = metrics["step"]


def show(progress: StageProgress, metrics: dict[str, Any], goal: BestMetric) -> None:
    nothing = float("nan")
    progress.advance(
        **{goal.metric: metrics.get(goal.metric, nothing)},
        length=metrics["completions/mean_length"],
        dlogp=metrics.get("sampler/logprob_diff_mean", nothing),
        **({"mfu": metrics["mfu"]} if "mfu" in metrics else {}),
    )


def train(
    stage: OnPolicy,
    updater: Updater,
    sampler: WeightReceiver,
    batches: BatchSource,
    breaker: Breaker,
    first_step: int,
) -> Iterator[tuple[dict[str, Any], Batch]]:
    """The algorithm. Yields each step's metrics and batch after the weight sync."""
    for step in range(first_step, stage.max_steps + 1):
        clock = Clock()
        batch = batches.take(step)
        clock.lap("wait")
        sampler.sleep()
        updater.enter_device()
        clock.lap("sync")
        compares = stage.max_staleness and not stage.in_flight
        before = updater.copy_weights() if compares else {}  # the sampler's

        metrics = {"step": step, **batch.metrics()}
        if breaker.examine_batch(batch, metrics):
            metrics |= {"updates_skipped": updater.num_updates, "tokens_trained": 0}
        else:
            metrics |= updater.step(batch.samples, step, breaker.examine_update)
        updater.end_step(step)
        clock.lap("update")

        batches.wait()
        clock.lap("wait")
        if ahead := batches.ahead:
            ahead.logprob_diff = compare_ahead(updater, before, ahead)
        sync(updater, sampler)
        if stage.verifies_sync or sampler.sleep_level:
            asked = [group.problem for group in batch.groups]
            metrics |= probe_sync(
                stage, updater, cast("Source", sampler), breaker, asked, batch.step
            )
        clock.lap("sync")
        breaker.close_step(metrics)
        metrics |= clock.metrics(metrics["tokens_trained"])
        yield metrics | updater.utilization.take(clock.seconds["update"]), batch


def sync(updater: Updater, sampler: WeightReceiver) -> None:
    """Merged weights, or an adapter alone."""
    updater.leave_device()
    if sampler.lora_rank:
        with TemporaryDirectory() as folder:
            save_adapter(updater.model, Path(folder))
            sampler.load_adapter(folder)
    else:
        sampler.load_weights(export_weights(updater.model, fp8=updater.settings.samples_in_fp8))


def compare_ahead(updater: Updater, weights: dict[str, Tensor], batch: Batch) -> float | None:
    """Mean |sampler - trainer| log-probability of some samples of a batch that was sampled ahead,
    under the weights that sampled it: the policy that trains on it is a step further. Every rank
    must call it."""
    groups = batch.own_groups[:PROBE_PROMPTS]
    samples = [Sample(group.rollouts[0], 0.0) for group in groups if group.rollouts[0].num_tokens]
    with updater.computing_as_sampler():
        metrics = updater.evaluate_with(weights, updater.share_in_team(samples)).metrics()
    return metrics.get("sampler/logprob_diff_mean")


def check_last_sync(
    stage: OnPolicy, updater: Updater, sampler: Source, breaker: Breaker, problems: list[Problem]
) -> dict[str, float]:
    """Compare sampler and trainer once more, on the weights of the last sync: whole episodes in an
    environment."""
    group = problems[: stage.prompts_per_step]
    seed_parts = (updater.seed, stage.name, "last")
    samples = draw_samples(stage, sampler, group, stage.sampling, seed_parts)
    sampler.sleep()
    diff = measure_mismatch(updater, samples, sampler.num_engines)
    if diff is None:
        log_line(f"{stage.name}: no episode could begin: the last sync is not compared")
        return {}
    breaker.examine_sync(diff, stage.max_steps)
    log_line(f"{stage.name}: sampler = trainer after the last sync: mean |dlogp| {diff:.1e}")
    return {"last_sync/logprob_diff_mean": diff}


def probe_sync(
    stage: OnPolicy,
    updater: Updater,
    sampler: Source,
    breaker: Breaker,
    problems: list[Problem],
    step: int,
) -> dict[str, float]:
    """Sample a few tokens with the weights just synced, and compare with the trainer's.

    A checksum is not enough: vLLM repacks the weights, and syncs have failed after the tensors had
    arrived (stale kernels, a tied head; after sleep, tensors that are no weights: NeMo-RL#2631)."""
    length = min(PROBE_TOKENS, stage.max_completion_length)
    sampling = stage.sampling.model_copy(update={"max_completion_length": length})
    seed_parts = (updater.seed, stage.name, "probe", step)
    num_engines = sampler.num_engines * distributed.world_size()
    asked = cover_engines(problems[:PROBE_PROMPTS], num_engines)
    samples = draw_samples(stage, sampler, asked, sampling, seed_parts)
    diff = measure_mismatch(updater, samples, sampler.num_engines)
    if diff is None:
        return {}
    breaker.examine_sync(diff, step)
    return {"sync/logprob_diff_mean": diff}


def draw_samples(
    stage: OnPolicy,
    sampler: Source,
    problems: list[Problem],
    sampling: Sampling,
    seed_parts: tuple[object, ...],
) -> list[Sample]:
    """One fresh sample of each problem of this rank's share; none where no episode could begin."""
    groups = sampler.generate_groups(
        problems, 1, sampling, seed_parts, with_routes=stage.routing_replay
    )
    in_order = sorted(groups, key=lambda group: group.index)
    return [Sample(r, 0.0) for group in in_order for r in group.rollouts if r.num_tokens]


def measure_mismatch(updater: Updater, samples: list[Sample], num_engines: int = 1) -> float | None:
    """Mean |sampler - trainer| log-probability of the engine that is furthest off, the trainer's
    weights rounded as the sampler's; None without samples on any rank."""
    with updater.computing_as_sampler():
        parts = [updater.share_in_team(samples[i::num_engines]) for i in range(num_engines)]
        by_engine = [updater.evaluate(part) for part in parts]
    diffs = [part.metrics().get("sampler/logprob_diff_mean") for part in by_engine]
    return max((diff for diff in diffs if diff is not None), default=None)


class Clock:
    """Wall time of a step's phases. Sampling ahead is no phase: a step only waits for the rest."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        if phase != "wait":
            timeline.record("trainer", phase, self._last, now)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self, tokens_trained: float) -> dict[str, Any]:
        """Seconds per phase and of the step; prompt and completion tokens trained a second; who
        was idle. Every rank must call it."""
        own = timeline.describe_step(self._began, self._last)
        return {
            **timeline.join_ranks(distributed.gather_to_first(own) or [own]),
            **{f"seconds/{phase}": value for phase, value in self.seconds.items()},
            "seconds/step": sum(self.seconds.values()),
            "tokens_per_s/update": tokens_trained / self.seconds["update"],
        }
