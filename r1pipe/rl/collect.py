"""One step's experience: rollouts of groups, judged while others are still being sampled."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from r1pipe.config.rl import OnPolicy
from r1pipe.rl.advantages import compute_advantages, find_silent_groups
from r1pipe.rl.batch import Batch, Group, gather_groups
from r1pipe.rl.curriculum import PassRates, Prompts, compute_pass_rate, find_reward
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import SampleGroup
from r1pipe.rollout.scoring import Scorer, ScoringThread
from r1pipe.types import Problem
from r1pipe.utils import distributed
from r1pipe.utils.progress import Interrupt

T = TypeVar("T")


class Collector:
    """Draws prompts, samples and judges them, one batch after the other.

    Every rank draws the same prompts, and samples and judges its share of them; whole groups, so
    that an advantage needs nobody else's rewards.
    """

    def __init__(
        self,
        stage: OnPolicy,
        sampler: Sampler,
        scorer: Scorer,
        problems: list[Problem],
        seed: int,
        pass_rates: PassRates | None = None,
    ):
        self.stage, self.sampler, self.scorer, self.seed = stage, sampler, scorer, seed
        self.sampling = stage.sampling
        self.prompts = Prompts(problems, seed, stage.difficulty, pass_rates)

    def collect(self, step: int, policy_step: int) -> Batch:
        """`prompts_per_step` groups; under dynamic sampling, of those whose rewards differ."""
        stage = self.stage
        groups, rounds = [], 0
        missing = stage.prompts_per_step
        seconds = {"sample": 0.0, "score": 0.0}
        while not rounds or (
            stage.dynamic_sampling and missing > 0 and rounds < stage.max_sampling_rounds
        ):
            problems = self.prompts.draw(missing)
            seed_parts = (self.seed, stage.name, step) + ((f"round {rounds}",) if rounds else ())
            groups += self._sample(
                problems, stage.num_generations, seed_parts, seconds, step, stage.routing_replay
            )
            if stage.dynamic_sampling:
                drop_zero_variance_groups(groups)
            taking_part = [group for group in groups if group.used]
            missing = stage.prompts_per_step - sum(distributed.gather(len(taking_part), "sampling"))
            rounds += 1
        if stage.scale_rewards:
            give_advantages(taking_part, stage.scale_rewards)
        for group in groups:
            group.advantages = group.advantages or [0.0] * len(group.rollouts)
        everything = gather_groups(groups)
        if stage.difficulty and stage.difficulty.refresh_steps:
            self.prompts.note(self._measure(everything))
        return Batch(step, policy_step, everything, groups, rounds, seconds)

    def refresh_difficulty(self, step: int) -> PassRates:
        """Choose the prompts anew: by the rollouts since the last time and, of problems that had
        none, by samples of the policy as the sampler has it. Returns the rates."""
        difficulty = self.stage.difficulty
        stale = [p for p in self.prompts.problems if p.id not in self.prompts.noted]
        seed_parts = (self.seed, self.stage.name, "difficulty", step)
        seconds = {"sample": 0.0, "score": 0.0}
        num_samples = difficulty.num_samples
        groups = self._sample(stale, num_samples, seed_parts, seconds, step) if stale else []
        rates = {**self.prompts.noted, **self._measure(gather_groups(groups))}
        self.prompts.refresh(rates)
        return rates

    def _describe_state(self, step: int) -> dict[str, float]:
        """For rewards that change as training goes on."""
        drawn = (step - 1) * self.stage.prompts_per_step
        return {
            "global_step": step - 1,
            "max_steps": self.stage.max_steps,
            "epoch": drawn / len(self.prompts.problems),
        }

    def _measure(self, groups: list[Group]) -> PassRates:
        reward = find_reward(self.stage.difficulty, self.stage.rewards)
        return {group.problem.id: compute_pass_rate(group.scores, reward) for group in groups}

    def state_dict(self) -> dict[str, Any]:
        return self.prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state)

    def warm_up(self) -> None:
        """Before a run goes on that samples beside the training; the weights are synced after it.

        vLLM compiles when it first samples, one sequence and then several. While it does so in one
        thread `torch.compiler.is_compiling()` is true in all, and torch's AdamW then computes its
        bias correction in float32: other last bits than in the run that was not interrupted.
        """
        if self.stage.async_steps:
            sampling = self.sampling.model_copy(update={"max_completion_length": 2})
            for count in (1, 4):
                self.sampler.generate(
                    self.prompts.problems[:1],
                    count,
                    sampling,
                    (self.seed, "warm-up"),
                    with_routes=self.stage.routing_replay,
                )

    def _sample(
        self,
        problems: list[Problem],
        num_samples: int,
        seed_parts: tuple,
        seconds: dict[str, float],
        step: int,
        with_routes: bool = False,
    ) -> list[Group]:
        """Groups of this rank's share of these problems, each judged as soon as it is complete."""
        state = self._describe_state(step)

        def score(sampled: list[SampleGroup]) -> list[Group]:
            (one,) = sampled
            owners = [one.problem] * num_samples
            return [
                Group(one.problem, one.rollouts, self.scorer.score(owners, one.rollouts, state))
            ]

        started = time.perf_counter()
        with ScoringThread(score, batched=False) as scoring:
            for group in self.sampler.generate_groups(
                problems, num_samples, self.sampling, seed_parts, with_routes=with_routes
            ):
                Interrupt.check()
                scoring.add(group)
            sampled = time.perf_counter()
        seconds["sample"] += sampled - started
        seconds["score"] += time.perf_counter() - sampled  # what was left of it
        return [scoring.results[index] for index in sorted(scoring.results)]


class Prefetcher:
    """Batches in order. With `async_steps` 1 the next one is sampled while the caller trains.

    Sampling then runs in a thread of its own, and float sums may come out in another order where
    arithmetic has more than one thread.
    """

    def __init__(self, collect: Callable[[int, int], Batch], num_steps: int, async_steps: int):
        self._collect, self._num_steps, self._async_steps = collect, num_steps, async_steps
        self._thread = ThreadPoolExecutor(1, "sampler")
        self._next: Future[Batch] | None = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of `step`; begins with the one after it, on the sampler's present weights."""
        batch = self._next.result() if self._next else self._collect(step, step)
        self._next = None
        if self._async_steps and step < self._num_steps:
            self._next = self._thread.submit(run_at, find_place(), self._collect, step + 1, step)
        return batch

    @property
    def ahead(self) -> Batch | None:
        """What was sampled ahead, once it is there."""
        self.wait()
        return self._next.result() if self._next and not self._next.exception() else None

    def wait(self) -> None:
        """Until nothing is being sampled: weights must not change meanwhile."""
        if self._next:
            self._next.exception()

    def state_dict(self) -> dict[str, Any]:
        """The batch that was sampled ahead: the policy that sampled it is gone by now."""
        return {"ahead": self._next.result().state_dict() if self._next else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait()
        self._next = None
        if state["ahead"]:
            self._next = Future()
            self._next.set_result(Batch.from_state(state["ahead"]))


def find_place() -> tuple[int, Any] | None:
    """The GPU and the stream that this thread works on: both are a thread's own."""
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device(), torch.cuda.current_stream()


def run_at(place: tuple[int, Any] | None, function: Callable[..., T], *arguments: Any) -> T:
    """Call it from another thread as from the one of that place. vLLM's graphs and copies belong to
    the stream that the engine was first used on; on another they would be read half-written."""
    if place is not None:
        device, stream = place
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)
    return function(*arguments)


def drop_zero_variance_groups(groups: list[Group]) -> None:
    """Those that can teach nothing: DAPO's dynamic sampling (arXiv:2503.14476, eq. 11), where
    rewards need not be 0 or 1."""
    if groups:
        silent = find_silent_groups(torch.tensor([group.rewards for group in groups]))
        for group, is_silent in zip(groups, silent.tolist()):
            group.used = not is_silent


def give_advantages(groups: list[Group], scale_rewards: str) -> None:
    """Over all ranks' groups: `scale_rewards` may ask for the whole batch's spread."""
    by_rank = distributed.gather([group.rewards for group in groups], "sampling")
    first = sum(map(len, by_rank[: distributed.rank()]))
    if groups:
        rewards_NG = torch.tensor([rewards for part in by_rank for rewards in part])
        advantages_NG = compute_advantages(rewards_NG, scale_rewards)[first:]
        for group, advantages in zip(groups, advantages_NG.tolist()):
            group.advantages = advantages
