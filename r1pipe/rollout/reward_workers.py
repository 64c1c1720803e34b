"""Reward functions in Ray's actors, on any machine of the cluster."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from r1pipe.config.base import Reward
from r1pipe.config.recipe import SamplerPlace
from r1pipe.config.rl import OnPolicy
from r1pipe.rollout.placement import begin_apart
from r1pipe.rollout.scoring import Scorer
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.phases import phase

MAX_LOSSES = 3
"""How often a worker may die over the same samples."""


class RewardWorker(Scorer):
    """In an actor's process. `path`: see placement.begin_apart."""

    def __init__(self, path: list[str], *arguments: Any):
        """`arguments`: Scorer's."""
        begin_apart(path)
        super().__init__(*arguments)


class RayScorer(Scorer):
    """Has `num_workers` Scorers in actors, each with its own graders' processes. Ray replaces one
    that dies, which scores again what was lost. Needs the Ray that a fleet has started or joined.
    """

    def __init__(
        self, rewards: list[Reward], num_workers: int, environment_weight: float | None = None
    ):
        # Tells what is wrong with a reward, here and now.
        super().__init__(rewards, environment_weight)
        self.rewards, self.num_workers = rewards, num_workers
        self.workers: list[Any] = []
        self._free: SimpleQueue[Any] = SimpleQueue()

    @property
    def num_threads(self) -> int:
        return self.num_workers * super().num_threads

    def _start(self) -> None:
        import ray

        # Without a core: graders wait for most of their time, and engines have all cores.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": MAX_LOSSES}
        options["max_concurrency"] = super().num_threads
        remote = ray.remote(**options)(RewardWorker)
        arguments = (sys.path, self.rewards, self.environment_weight)
        self.workers = [remote.remote(*arguments) for _ in range(self.num_workers)]
        for _ in range(super().num_threads):
            for worker in self.workers:
                self._free.put(worker)

    @phase("scoring")
    def score(
        self,
        problems: list[Problem],
        rollouts: list[Rollout],
        trainer_state: Mapping[str, float] | None = None,
    ) -> list[Score]:
        import ray

        with self._one_at_a_time:
            if not self.workers:
                self._start()
        worker = self._free.get()
        try:
            # What rewards are not given.
            light = [replace(rollout, logprobs=[], routes=None) for rollout in rollouts]
            return ray.get(worker.score.remote(problems, light, trainer_state))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise UserError(f"sampler.reward_workers: {first_line(error)}") from error
        finally:
            self._free.put(worker)


def open_scorer(stage: OnPolicy, place: SamplerPlace) -> Scorer:
    """As the recipe's sampler says. Raises UserError as Scorer does."""
    weight = stage.environment.weight if stage.environment else None
    if place.reward_workers and stage.rewards:
        num_workers = place.reward_workers // distributed.world_size()
        return RayScorer(stage.rewards, num_workers, weight)
    return Scorer(stage.rewards, weight)
