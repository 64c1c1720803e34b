"""Batches for GRPO: advantages, dynamic sampling, prompts selected by difficulty."""

import torch

from r1pipe.config.rl import Difficulty, Grpo
from r1pipe.envs.driver import Source
from r1pipe.rl.advantages import compute_advantages, find_silent_groups
from r1pipe.rl.batch import Batch, Group, gather_groups
from r1pipe.rl.collect import Collector
from r1pipe.rl.curriculum import PassRates, Prompts, compute_pass_rate, find_passing
from r1pipe.rl.difficulty import DifficultyLog
from r1pipe.rollout.scoring import Scorer, mean
from r1pipe.types import Problem
from r1pipe.utils import distributed


class GrpoCollector(Collector):
    """A Collector that also computes advantages."""

    stage: Grpo

    def __init__(
        self,
        stage: Grpo,
        sampler: Source,
        scorer: Scorer,
        prompts: Prompts,
        difficulty_log: DifficultyLog | None = None,
    ):
        super().__init__(stage, sampler, scorer, prompts)
        self.difficulty_log = difficulty_log
        if difficulty_log:
            self.logs = {"difficulty": difficulty_log}

    def collect(self, step: int, policy_step: int, problems: list[Problem]) -> Batch:
        """The groups of these problems; under dynamic sampling, of further ones until there are as
        many whose rewards differ."""
        stage = self.stage
        max_rounds = stage.max_sampling_rounds if stage.dynamic_sampling else 1
        groups: list[Group] = []
        rounds, missing = 0, stage.prompts_per_step
        seconds = {"sample": 0.0, "score": 0.0}
        self.sampler.drafts.clear()
        while missing > 0 and rounds < max_rounds:
            problems = self.prompts.draw(missing) if rounds else problems
            groups += self._sample_round(step, rounds, problems, seconds)
            if stage.dynamic_sampling:
                drop_zero_variance_groups(groups)
            used = [group for group in groups if group.used]
            missing = stage.prompts_per_step - sum(distributed.gather(len(used)))
            rounds += 1
        acceptance = self.sampler.drafts.acceptance()
        give_advantages(used, stage.scale_rewards)
        everything = gather_groups(groups)
        if stage.difficulty and stage.difficulty.refresh_steps:
            self.prompts.note(self._measure(everything, stage.difficulty))
        return Batch(step, policy_step, everything, groups, rounds, seconds, acceptance)

    def begin(self) -> None:
        if self.difficulty_log:
            self.difficulty_log.write(*self.difficulty_log.measured)

    def end_step(self, step: int) -> dict[str, float]:
        """Every `refresh_steps`, select prompts by what the policy can solve now."""
        difficulty = self.stage.difficulty
        every = difficulty.refresh_steps if difficulty else None
        if not every or step % every or step == self.stage.max_steps:
            return {}
        rates = self.refresh_difficulty(step)
        if self.difficulty_log:
            self.difficulty_log.write(
                *({"problem_id": i, "step": step, "pass_rate": rate} for i, rate in rates.items())
            )
        return {
            "difficulty/prompts": self.prompts.num_chosen,
            "difficulty/mean_pass_rate": mean([r for r in rates.values() if r is not None]),
        }

    def refresh_difficulty(self, step: int) -> PassRates:
        """Select prompts by the rollouts since the last refresh and, for problems that had none, by
        new samples of the sampler's policy. Returns all rates."""
        difficulty = self.stage.difficulty
        if difficulty is None:
            return {}
        stale = [p for p in self.prompts.problems if p.id not in self.prompts.noted]
        seed_parts = (self.seed, self.stage.name, "difficulty", step)
        seconds = {"sample": 0.0, "score": 0.0}
        groups = (
            self._sample(stale, difficulty.num_samples, seed_parts, seconds, step) if stale else []
        )
        rates = {**self.prompts.noted, **self._measure(gather_groups(groups), difficulty)}
        self.prompts.refresh(rates)
        return rates

    def _measure(self, groups: list[Group], difficulty: Difficulty) -> PassRates:
        name = find_passing(difficulty, self.stage)
        return {group.problem.id: compute_pass_rate(group.scores, name) for group in groups}


def drop_zero_variance_groups(groups: list[Group]) -> None:
    """Mark groups whose rewards are all equal as unused: DAPO's dynamic sampling
    (arXiv:2503.14476, eq. 11), for rewards that need not be 0 or 1."""
    if groups:
        silent = find_silent_groups(torch.tensor([group.rewards for group in groups]))
        for group, is_silent in zip(groups, silent.tolist()):
            group.used = not is_silent


def give_advantages(groups: list[Group], scale_rewards: str) -> None:
    """Over all ranks' groups: `scale_rewards` may need the std of the whole batch."""
    by_rank = distributed.gather([group.rewards for group in groups])
    first = sum(map(len, by_rank[: distributed.rank()]))
    if groups:
        rewards_NG = torch.tensor([rewards for part in by_rank for rewards in part])
        advantages_NG = compute_advantages(rewards_NG, scale_rewards)[first:]
        for group, advantages in zip(groups, advantages_NG.tolist()):
            group.advantages = advantages
