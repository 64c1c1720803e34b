"""One step's experience: groups of rollouts, scored while others are still being sampled."""

import time
from collections.abc import Mapping
from typing import Any

from r1pipe.config.rl import OnPolicy
from r1pipe.envs.driver import Source
from r1pipe.rl.batch import Batch, Group, gather_groups
from r1pipe.rl.curriculum import Prompts
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.scoring import Scorer, ScoringThread
from r1pipe.runs.logs import JsonlLog
from r1pipe.types import Problem
from r1pipe.utils.progress import Interrupt


class Collector:
    """Draws prompts, samples and scores them, one batch after another.

    Every rank draws the same prompts, and samples and scores its share of them, in whole groups:
    group-relative advantages need no other rank's rewards.
    """

    logs: Mapping[str, JsonlLog] = {}
    """Its own log files by name, to be cut back on resume."""

    def __init__(self, stage: OnPolicy, sampler: Source, scorer: Scorer, prompts: Prompts):
        self.stage, self.sampler, self.scorer, self.prompts = stage, sampler, scorer, prompts
        self.sampling, self.seed = stage.sampling, prompts.seed
        self._first_sync = 0
        """The number, of the sampler's syncs, of the one before step 0."""

    def draw(self, policy_step: int) -> list[Problem]:
        """The next batch's prompts. The sampler has the weights of this step's start."""
        self._first_sync = self.sampler.version - policy_step
        return self.prompts.draw(self.stage.prompts_per_step)

    def collect(self, step: int, policy_step: int, problems: list[Problem]) -> Batch:
        """The groups of these problems, all of them used. `policy_step`: from which on the policy's
        weights sample them."""
        seconds = {"sample": 0.0, "score": 0.0}
        self.sampler.drafts.clear()
        groups = self._sample_round(step, 0, problems, seconds)
        acceptance = self.sampler.drafts.acceptance()
        return Batch(step, policy_step, gather_groups(groups), groups, 1, seconds, acceptance)

    def begin(self) -> None:
        """Called before the first step, but not on resume."""

    def end_step(self, step: int) -> dict[str, float]:
        """Called after the weight sync; further metrics of the step."""
        return {}

    def _sample_round(
        self, step: int, number: int, problems: list[Problem], seconds: dict[str, float]
    ) -> list[Group]:
        """Groups of these problems; `number`: of the round within the step."""
        seed_parts = (self.seed, self.stage.name, step) + ((f"round {number}",) if number else ())
        return self._sample(
            problems,
            self.stage.num_generations,
            seed_parts,
            seconds,
            step,
            self.stage.routing_replay,
        )

    def _describe_state(self, step: int) -> dict[str, float]:
        """The trainer_state that rewards are given."""
        drawn = (step - 1) * self.stage.prompts_per_step
        return {
            "global_step": step - 1,
            "max_steps": self.stage.max_steps,
            "epoch": drawn / len(self.prompts.problems),
        }

    def _find_steps(self, syncs: list[int] | None) -> list[int] | None:
        """The steps that began with the weights of these syncs; None where weights do not change
        while a batch is sampled."""
        if syncs is None or not self.stage.in_flight:
            return None
        return [sync - self._first_sync for sync in syncs]

    def state_dict(self) -> dict[str, Any]:
        return self.prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state)

    def _sample(
        self,
        problems: list[Problem],
        num_samples: int,
        seed_parts: tuple[object, ...],
        seconds: dict[str, float],
        step: int,
        with_routes: bool = False,
    ) -> list[Group]:
        """Groups of this rank's share of these problems, each scored as soon as it is complete."""
        state = self._describe_state(step)

        def score(sampled: list[SampleGroup]) -> list[Group]:
            (one,) = sampled
            owners = [one.problem] * num_samples
            return [
                Group(one.problem, one.rollouts, self.scorer.score(owners, one.rollouts, state))
            ]

        started = time.perf_counter()
        num_threads = self.scorer.num_threads
        with ScoringThread(score, batched=False, num_threads=num_threads) as scoring:
            for group in self.sampler.generate_groups(
                problems, num_samples, self.sampling, seed_parts, with_routes=with_routes
            ):
                Interrupt.check()
                for rollout in group.rollouts:
                    rollout.versions = self._find_steps(rollout.versions)
                scoring.add(group)
            sampled = time.perf_counter()
        seconds["sample"] += sampled - started
        seconds["score"] += time.perf_counter() - sampled  # what sampling did not hide
        return [scoring.results[index] for index in sorted(scoring.results)]
