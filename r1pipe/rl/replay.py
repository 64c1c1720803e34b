"""Training on rollouts from disk, without a sampler: `r1pipe grpo CONFIG --replay STEPS`."""

import time
from collections.abc import Iterable
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from r1pipe.config.rl import OnPolicy
from r1pipe.context import StageContext
from r1pipe.models.weights import save_checkpoint
from r1pipe.rl.batch import Batch, Group
from r1pipe.rl.loop import BestMetric, show, train
from r1pipe.rl.update import Updater
from r1pipe.rollout.store import TEXT, TOKENS, read_facts, read_rollouts
from r1pipe.trainer.breaker import Breaker, EventLog
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line


class ReplayBatches:
    """Batches as Prefetcher gives them, from the rollout files of a stage.

    `has_old_weights`: another policy sampled them, as with a stale sampler.
    """

    def __init__(self, stage_dir: Path, *, needs_routes: bool, has_old_weights: bool):
        self.stage_dir = stage_dir
        self.needs_routes, self.has_old_weights = needs_routes, has_old_weights

    def take(self, step: int) -> Batch:
        """Raises UserError if the step is missing, or lacks the routes that the stage replays."""
        started = time.perf_counter()
        columns = [*TEXT, *TOKENS]
        if self.has_old_weights:
            columns.remove("versions")
        rows = read_rollouts(self.stage_dir, [step], columns)
        groups = [make_group(list(group)) for _, group in groupby(rows, lambda row: row["group"])]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        routed = all(r.routes is not None for r in rollouts if r.num_tokens)
        if self.needs_routes and not routed:
            raise UserError(
                f"{self.stage_dir}: the rollouts of step {step} were kept without routes "
                "(rollouts.routes): replay with routing_replay=false"
            )
        facts = read_facts(self.stage_dir, step)
        own = distributed.cut(len(groups), distributed.rank(), distributed.world_size())
        return Batch(
            step=step,
            policy_step=step - 1 if self.has_old_weights else facts["policy_step"],
            groups=groups,
            own_groups=groups[own],
            rounds=facts["rounds"],
            seconds={"sample": time.perf_counter() - started, "score": 0.0},
        )

    ahead = None

    def wait(self) -> None:
        """Nothing is sampled: nothing to wait for."""


class NoSampler:
    """In the place of a sampler: weight syncs do nothing."""

    sleep_level = lora_rank = 0

    def sleep(self) -> None:
        """There is no engine."""

    def load_weights(self, weights: Iterable[Any]) -> None:
        """Does not even read them: they are put together on reading."""

    def load_adapter(self, folder: str) -> None:
        """Not called: it has no rank."""


def make_group(rows: list[dict[str, Any]]) -> Group:
    """From the rows of one prompt. The problem has only what was kept."""
    first = rows[0]
    prompt = [{"role": "user", "content": first["prompt"]}]
    names = [column.name for column in fields(Rollout)]
    return Group(
        problem=Problem(first["problem_id"], "", prompt, first["answer"]),
        rollouts=[Rollout(**{name: row[name] for name in names if name in row}) for row in rows],
        scores=[Score(row["rewards"], row["reward"]) for row in rows],
        advantages=[row["advantage"] for row in rows],
        used=first["used"],
    )


def replay_steps(
    stage: OnPolicy,
    context: StageContext,
    updater: Updater,
    goal: BestMetric,
    source: Path,
    steps: range,
) -> dict[str, Any]:
    """Train on the rollouts that the stage in the folder `source` kept of these steps, from the
    checkpoint that the stage starts from; write checkpoint and metrics.jsonl.

    From step 1 on, losses and weights are those of the original run. A replay that starts later
    lacks the weights that sampled its steps: it trains on them as if by a stale sampler.
    """
    has_old_weights = steps[0] > 1
    if has_old_weights:
        log_line(f"{stage.name}: starts at step {steps[0]} with the weights from before step 1")
    batches = ReplayBatches(
        source, needs_routes=stage.routing_replay, has_old_weights=has_old_weights
    )
    # The updater keeps the learning rate schedule of the whole stage.
    part = stage.model_copy(update={"max_steps": steps[-1], "verify_sync": False})
    breaker = Breaker(stage, EventLog(context.folder), context.shared_folder)
    log = context.open_log()
    with context.open_progress(stage.name, len(steps)) as progress:
        for metrics, _ in train(part, updater, NoSampler(), batches, breaker, steps[0]):
            log.write(metrics)
            show(progress, metrics, goal)
    tokenizer = context.tokenizer(context.checkpoint(stage.policy))
    save_checkpoint(updater.model, tokenizer, context.folder)
    return {"replayed": str(source), "optimizer_steps": len(steps)}
