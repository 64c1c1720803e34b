"""One step's experience: rollouts of groups, judged while others are still being sampled."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from r1pipe import distributed
from r1pipe.config import OnPolicy, Sampling
from r1pipe.difficulty import PassRates, compute_pass_rate, find_reward
from r1pipe.grpo.advantage import compute_advantages, find_silent_groups
from r1pipe.grpo.packing import Sample
from r1pipe.grpo.prompts import Prompts
from r1pipe.progress import Interrupt
from r1pipe.records import Problem, Rollout, Score, describe_rollout
from r1pipe.rollout import Sampler
from r1pipe.scoring import Scorer, mean, reward_metrics

T = TypeVar("T")


@dataclass
class Group:
    """The samples of one prompt and their scores."""

    problem: Problem
    rollouts: list[Rollout]
    scores: list[Score]
    advantages: list[float] = field(default_factory=list)
    takes_part: bool = True
    """False where dynamic sampling has put it aside."""

    @property
    def rewards(self) -> list[float]:
        """Totals, NaN where no reward could judge."""
        return [float("nan") if s.total is None else s.total for s in self.scores]

    def state_dict(self) -> dict[str, Any]:
        return {
            "problem": asdict(self.problem),
            "rollouts": [flatten_rollout(rollout) for rollout in self.rollouts],
            "scores": [asdict(score) for score in self.scores],
            "advantages": self.advantages,
            "takes_part": self.takes_part,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Group":
        return cls(
            Problem(**state["problem"]),
            [restore_rollout(rollout) for rollout in state["rollouts"]],
            [Score(**score) for score in state["scores"]],
            state["advantages"],
            state["takes_part"],
        )

    def records(self) -> list[dict]:
        return [
            {
                **describe_rollout(self.problem, rollout, score),
                "advantage": advantage,
                "takes_part": self.takes_part,
                "prompt_ids": rollout.prompt_ids,
                "completion_ids": rollout.completion_ids,
                "logprobs": rollout.logprobs,
                "routes": rollout.routes,
            }
            for rollout, score, advantage in zip(
                self.rollouts, self.scores, self.advantages, strict=True
            )
        ]


BATCH_FACTS = ("step", "made_at", "rounds", "seconds", "logprob_diff")


@dataclass
class Batch:
    """What one step trains on, and what it took to get."""

    step: int
    made_at: int
    """The step before which the sampling policy was the current one: `step`, or one less."""
    groups: list[Group]
    """All that were sampled, by every rank; what others sampled lacks prompts and log-probs."""
    own_groups: list[Group]
    """This rank's part of them, whole."""
    rounds: int
    seconds: dict[str, float]
    logprob_diff: float | None = None
    """If it was sampled ahead: mean |sampler - trainer| log-probability of some of it, by the
    policy that sampled it."""

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @cached_property
    def samples(self) -> list[Sample]:
        """Of this rank's groups that take part."""
        return [
            Sample(rollout, advantage)
            for group in self.own_groups
            if group.takes_part
            for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        ]

    def metrics(self) -> dict[str, Any]:
        """Rewards and lengths of everything that was sampled: dynamic sampling hides nothing."""
        rollouts = self.rollouts
        num_tokens = sum(len(r.completion_ids) for r in rollouts)
        return {
            **self.reward_metrics(),
            "groups_sampled": len(self.groups),
            "sampling_rounds": self.rounds,
            "staleness": self.step - self.made_at,
            **({} if (d := self.logprob_diff) is None else {"sampler/logprob_diff_ahead": d}),
            "tokens_sampled": num_tokens,
            "completions/mean_length": num_tokens / len(rollouts),
            "completions/truncated": mean([float(r.truncated) for r in rollouts]),
            **{f"seconds/{phase}": value for phase, value in self.seconds.items()},
            "tokens_per_s/sample": num_tokens / self.seconds["sample"],
        }

    def reward_metrics(self) -> dict[str, float]:
        """Nothing in a stage without rewards."""
        scores = [score for group in self.groups for score in group.scores]
        if not scores[0].rewards:
            return {}
        silent_N = find_silent_groups(torch.tensor([group.rewards for group in self.groups]))
        return {**reward_metrics(scores), "groups_without_spread": float(silent_N.float().mean())}

    def state_dict(self) -> dict[str, Any]:
        """As plain values and tensors, of a batch that has not been trained on."""
        return {
            **{name: getattr(self, name) for name in BATCH_FACTS},
            "groups": [group.state_dict() for group in self.groups],
            "own_groups": [group.state_dict() for group in self.own_groups],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Batch":
        groups, own_groups = (
            [Group.from_state(group) for group in state[name]] for name in ("groups", "own_groups")
        )
        return cls(**{**state, "groups": groups, "own_groups": own_groups})

    def facts(self) -> dict[str, int]:
        """What is kept with the rows of `records`."""
        return {"made_at": self.made_at, "rounds": self.rounds}

    def records(self) -> list[dict]:
        """The step's rows of rollout_files, of all ranks' groups on the first rank and none on
        the others. Every rank must call it."""
        by_rank = distributed.gather_to_first([group.records() for group in self.own_groups])
        groups = [group for part in by_rank for group in part]
        return [{"group": i, **row} for i, group in enumerate(groups) for row in group]


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
        self.sampling = sampling_of(stage)
        self.prompts = Prompts(problems, seed, stage.difficulty, pass_rates)

    def collect(self, step: int, made_at: int) -> Batch:
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
                put_aside_silent(groups)
            taking_part = [group for group in groups if group.takes_part]
            missing = stage.prompts_per_step - sum(distributed.gather(len(taking_part), "sampling"))
            rounds += 1
        if stage.scale_rewards:
            give_advantages(taking_part, stage.scale_rewards)
        for group in groups:
            group.advantages = group.advantages or [0.0] * len(group.rollouts)
        everything = gather_groups(groups)
        if stage.difficulty and stage.difficulty.refresh_steps:
            self.prompts.note(self._measure(everything))
        return Batch(step, made_at, everything, groups, rounds, seconds)

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
        part = self.sampler.own_part(len(problems))
        problems_here = problems[part]
        kept = range(len(problems_here))[self.sampler.kept_part(len(problems_here))]
        started = time.perf_counter()
        scores: dict[int, Future[list[Score]]] = {}
        state = self._describe_state(step)
        with ThreadPoolExecutor(1, "judge") as judge:

            def on_group(index: int, rollouts: list[Rollout]) -> None:
                Interrupt.check()
                if index in kept:
                    owners = [problems_here[index]] * len(rollouts)
                    scores[index] = judge.submit(self.scorer.score, owners, rollouts, state)

            rollouts = self.sampler.generate(
                problems,
                num_samples,
                self.sampling,
                seed_parts,
                on_group,
                with_routes=with_routes,
                part=part,
            )
            sampled = time.perf_counter()
            groups = [
                Group(
                    problems_here[i],
                    rollouts[i * num_samples : (i + 1) * num_samples],
                    scores[i].result(),
                )
                for i in kept
            ]
        seconds["sample"] += sampled - started
        seconds["score"] += time.perf_counter() - sampled  # what was left of it
        return groups


class Lookahead:
    """Batches in order. With `async_steps` 1 the next one is sampled while the caller trains.

    Sampling then runs in a thread of its own, and float sums may come out in another order where
    arithmetic has more than one thread.
    """

    def __init__(self, collect: Callable[[int, int], Batch], num_steps: int, async_steps: int):
        self._collect, self._num_steps, self._async_steps = collect, num_steps, async_steps
        self._thread = ThreadPoolExecutor(1, "sampler")
        self._next: Future[Batch] | None = None

    def __enter__(self) -> "Lookahead":
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


def put_aside_silent(groups: list[Group]) -> None:
    """Those that can teach nothing: DAPO's dynamic sampling (arXiv:2503.14476, eq. 11), where
    rewards need not be 0 or 1."""
    if groups:
        silent = find_silent_groups(torch.tensor([group.rewards for group in groups]))
        for group, is_silent in zip(groups, silent.tolist()):
            group.takes_part = not is_silent


def give_advantages(groups: list[Group], scale_rewards: str) -> None:
    """Over all ranks' groups: `scale_rewards` may ask for the whole batch's spread."""
    by_rank = distributed.gather([group.rewards for group in groups], "sampling")
    first = sum(map(len, by_rank[: distributed.rank()]))
    if groups:
        rewards_NG = torch.tensor([rewards for part in by_rank for rewards in part])
        advantages_NG = compute_advantages(rewards_NG, scale_rewards)[first:]
        for group, advantages in zip(groups, advantages_NG.tolist()):
            group.advantages = advantages


def gather_groups(groups: list[Group]) -> list[Group]:
    """All ranks' groups, for the log: without what only the update of the rank that has sampled
    them needs, which is most of their size."""
    if distributed.alone():
        return groups
    light = [
        replace(
            group,
            rollouts=[replace(r, prompt_ids=[], logprobs=[], routes=None) for r in group.rollouts],
        )
        for group in groups
    ]
    return [group for part in distributed.gather(light, "sampling") for group in part]


def flatten_rollout(rollout: Rollout) -> dict[str, Any]:
    values = {entry.name: getattr(rollout, entry.name) for entry in fields(rollout)}
    routes = values.pop("routes")
    return {**values, "routes": None if routes is None else torch.from_numpy(routes)}


def restore_rollout(values: dict[str, Any]) -> Rollout:
    routes = values["routes"]
    return Rollout(**{**values, "routes": None if routes is None else routes.numpy()})


def sampling_of(stage: OnPolicy) -> Sampling:
    return Sampling(
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
        max_completion_length=stage.max_completion_length,
    )
