"""Kept rollouts in the place of a sampler: what `r1pipe grpo CONFIG --replay STEPS` trains on."""

import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from r1pipe import distributed
from r1pipe.errors import UserError
from r1pipe.grpo.collect import Batch, Group
from r1pipe.records import Problem, Rollout, Score
from r1pipe.rollout_files import TEXT, TOKENS, read_facts, read_rollouts


class KeptBatches:
    """Batches in order, as collect.Lookahead gives them, from the files of a stage.

    `has_old_weights`: the policy is not the one that has sampled, as with a stale sampler.
    """

    def __init__(self, stage_dir: Path, *, needs_routes: bool, has_old_weights: bool):
        self.stage_dir = stage_dir
        self.needs_routes, self.has_old_weights = needs_routes, has_old_weights

    def take(self, step: int) -> Batch:
        """Raises UserError if the step is not kept, or lacks the routes that the stage replays."""
        started = time.perf_counter()
        rows = read_rollouts(self.stage_dir, [step], (*TEXT, *TOKENS))
        groups = [make_group(list(group)) for _, group in groupby(rows, lambda row: row["group"])]
        routed = all(rollout.routes is not None for group in groups for rollout in group.rollouts)
        if self.needs_routes and not routed:
            raise UserError(
                f"{self.stage_dir}: the rollouts of step {step} were kept without routes "
                "(rollouts.routes): replay with routing_replay=false"
            )
        facts = read_facts(self.stage_dir, step)
        own = distributed.cut(len(groups), distributed.rank(), distributed.world_size())
        return Batch(
            step=step,
            made_at=step - 1 if self.has_old_weights else facts["made_at"],
            groups=groups,
            own_groups=groups[own],
            rounds=facts["rounds"],
            seconds={"sample": time.perf_counter() - started, "score": 0.0},
        )

    ahead = None

    def wait(self) -> None:
        """Nothing is sampled."""


class NoSampler:
    """Takes the weights after each step, and leaves them."""

    def load_weights(self, weights: Iterable[Any]) -> None:
        """They are not even put together."""


def make_group(rows: list[dict[str, Any]]) -> Group:
    """Of the rows of one prompt. Of the problem there is what was kept."""
    first = rows[0]
    prompt = [{"role": "user", "content": first["prompt"]}]
    return Group(
        problem=Problem(first["problem_id"], "", prompt, first["answer"]),
        rollouts=[
            Rollout(
                problem_id=row["problem_id"],
                sample=row["sample"],
                prompt_ids=row["prompt_ids"],
                completion_ids=row["completion_ids"],
                logprobs=row["logprobs"],
                completion=row["completion"],
                finish_reason=row["finish_reason"],
                routes=row["routes"],
            )
            for row in rows
        ],
        scores=[Score(row["rewards"], row["reward"]) for row in rows],
        advantages=[row["advantage"] for row in rows],
        takes_part=first["takes_part"],
    )
