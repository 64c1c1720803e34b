"""A step's batch: groups of scored rollouts, on disk and in metrics."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import torch

from r1pipe.rl.advantages import find_silent_groups
from r1pipe.rollout.scoring import mean, reward_metrics
from r1pipe.rollout.store import rename
from r1pipe.trainer.packing import Sample
from r1pipe.types import Episode, Problem, Rollout, Score, describe_rollout
from r1pipe.utils import distributed

BATCH_FACTS = ("step", "policy_step", "rounds", "seconds", "logprob_diff", "acceptance")

MIN_PROMPTS = 4
"""With fewer, completions that are all the same may just fit the prompts."""


# --- Facts of a batch ---------------------------------------------------------------------------


def describe_batch(groups: "list[Group]") -> dict[str, float]:
    """Facts for the breaker's checks beyond the metrics:

    - `mean`, `stderr`, `low` and `high` of `reward`, the weighted total, and of each
      `rewards/FUNCTION`;
    - nonfinite_rewards: share of rollouts where any function gave NaN or infinity;
    - identical_groups: share of groups whose completions are all the same;
    - same_completion: share of rollouts that are the most frequent completion, over all prompts.
    """
    scores = [group.scores for group in groups]
    facts = {"nonfinite_rewards": share(map(has_nonfinite, chain.from_iterable(scores)))}
    facts |= describe_values("reward", [[s.total for s in part] for part in scores])
    for name in scores[0][0].rewards:
        values = [[s.rewards[name] for s in part] for part in scores]
        facts |= describe_values(f"rewards/{name}", values)
    texts = [[tuple(rollout.completion_ids) for rollout in group.rollouts] for group in groups]
    if any(len(part) > 1 for part in texts):
        facts["identical_groups"] = share(len(set(part)) == 1 for part in texts)
    if len({group.problem.id for group in groups}) >= MIN_PROMPTS:
        counts = Counter(chain.from_iterable(texts))
        facts["same_completion"] = max(counts.values()) / counts.total()
    return facts


def describe_values(name: str, by_group: list[list[float | None]]) -> dict[str, float]:
    """Over finite values; empty if there are none. The standard error is that of the group means,
    because samples of one prompt are not independent; infinite for a single group."""
    judged = [[v for v in part if v is not None and math.isfinite(v)] for part in by_group]
    means = [fmean(part) for part in judged if part]
    if not means:
        return {}
    values = list(chain.from_iterable(judged))
    return {
        f"{name}/mean": fmean(values),
        f"{name}/stderr": stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf,
        f"{name}/low": min(values),
        f"{name}/high": max(values),
    }


def describe_episodes(episodes: list[Episode]) -> dict[str, float]:
    """Mean turns and tool calls, the share that calls, and those that a limit or an error ended."""
    if not episodes:
        return {}
    return {
        "episodes/turns": fmean(episode.num_turns for episode in episodes),
        "episodes/tool_calls": fmean(episode.num_tool_calls for episode in episodes),
        "episodes/malformed_calls": fmean(episode.num_malformed_calls for episode in episodes),
        "episodes/calling": share(episode.num_tool_calls > 0 for episode in episodes),
        **{
            f"episodes/ended_by_{why}": share(episode.ended == why for episode in episodes)
            for why in ("turns", "tokens", "tool_time", "error")
        },
    }


def has_nonfinite(score: Score) -> bool:
    values = (*score.rewards.values(), score.total)
    return any(value is not None and not math.isfinite(value) for value in values)


def share(flags: Iterable[bool]) -> float:
    return fmean(map(float, flags))


@dataclass
class Group:
    """The samples of one prompt and their scores."""

    problem: Problem
    rollouts: list[Rollout]
    scores: list[Score]
    advantages: list[float] = field(default_factory=list)
    used: bool = True
    """False if dynamic sampling dropped it."""

    def __post_init__(self) -> None:
        self.advantages = self.advantages or [0.0] * len(self.rollouts)

    @property
    def rewards(self) -> list[float]:
        """Totals, NaN where no reward could judge."""
        return [float("nan") if s.total is None else s.total for s in self.scores]

    @property
    def versions(self) -> Iterator[int]:
        """Of its tokens, if weights change while they are sampled."""
        return (version for rollout in self.rollouts for version in rollout.versions or ())

    def state_dict(self) -> dict[str, Any]:
        return {
            "problem": asdict(self.problem),
            "rollouts": [flatten_rollout(rollout) for rollout in self.rollouts],
            "scores": [asdict(score) for score in self.scores],
            "advantages": self.advantages,
            "used": self.used,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Group":
        state = rename(state)
        return cls(
            Problem(**state["problem"]),
            [restore_rollout(rollout) for rollout in state["rollouts"]],
            [Score(**score) for score in state["scores"]],
            state["advantages"],
            state["used"],
        )

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                **describe_rollout(self.problem, rollout, score),
                "advantage": advantage,
                "used": self.used,
                "prompt_ids": rollout.prompt_ids,
                "completion_ids": rollout.completion_ids,
                "logprobs": rollout.logprobs,
                "versions": rollout.versions,
                "routes": rollout.routes,
            }
            for rollout, score, advantage in zip(
                self.rollouts, self.scores, self.advantages, strict=True
            )
        ]


@dataclass
class Batch:
    """The rollouts that one step trains on."""

    step: int
    policy_step: int
    """The step whose starting policy sampled it: `step`, or an earlier one if sampled ahead. Of a
    batch during which weights changed, that of its oldest token."""
    groups: list[Group]
    """From every rank; those of other ranks lack prompts and log-probs."""
    own_groups: list[Group]
    """Those of this rank, complete."""
    rounds: int
    seconds: dict[str, float]
    acceptance: float | None = None
    """Share of the drafted tokens that stood; None without engine.speculative."""
    logprob_diff: float | None = None
    """If sampled ahead: mean |sampler - trainer| log-probability of some samples under the policy
    that sampled them."""
    num_waiting: int = 0
    """Finished batches behind it when it was taken."""

    def __post_init__(self) -> None:
        versions = [version for group in self.groups for version in group.versions]
        self.policy_step = min(versions, default=self.policy_step)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @cached_property
    def samples(self) -> list[Sample]:
        """Those of this rank's used groups, without episodes that ended before the first token."""
        return [
            Sample(rollout, advantage)
            for group in self.own_groups
            if group.used
            for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
            if rollout.num_tokens
        ]

    def metrics(self) -> dict[str, Any]:
        """Rewards and lengths of all samples, including those that dynamic sampling dropped."""
        rollouts = self.rollouts
        num_tokens = sum(r.num_tokens for r in rollouts)
        return {
            **self.reward_metrics(),
            "groups_sampled": len(self.groups),
            "sampling_rounds": self.rounds,
            **self.describe_staleness(),
            **({} if (d := self.logprob_diff) is None else {"sampler/logprob_diff_ahead": d}),
            **({} if (a := self.acceptance) is None else {"sampler/acceptance": a}),
            "tokens_sampled": num_tokens,
            "completions/mean_length": num_tokens / len(rollouts),
            "completions/truncated": mean([float(r.truncated) for r in rollouts]),
            **describe_episodes([r.episode for r in rollouts if r.episode]),
            **{f"seconds/{phase}": value for phase, value in self.seconds.items()},
            "tokens_per_s/sample": num_tokens / self.seconds["sample"],
        }

    def describe_staleness(self) -> dict[str, Any]:
        """Steps from the policy that sampled to the one that trains. Where weights change while a
        batch is sampled: mean and maximum over its tokens, and how many are 0, 1, ... behind."""
        versions = Counter(version for group in self.groups for version in group.versions)
        if not versions:
            return dict.fromkeys(("staleness/mean", "staleness/max"), self.step - self.policy_step)
        behind = [versions[version] for version in range(self.step, self.policy_step - 1, -1)]
        return {
            "staleness/mean": sum(steps * n for steps, n in enumerate(behind)) / versions.total(),
            "staleness/max": self.step - self.policy_step,
            "staleness/tokens": behind,
            "staleness/batches_waiting": self.num_waiting,
        }

    def describe(self) -> dict[str, float]:
        """For the breaker: see `describe_batch`."""
        return describe_batch(self.groups)

    def reward_metrics(self) -> dict[str, float]:
        """Empty in a stage without rewards."""
        scores = [score for group in self.groups for score in group.scores]
        if not scores[0].rewards:
            return {}
        silent_N = find_silent_groups(torch.tensor([group.rewards for group in self.groups]))
        return {**reward_metrics(scores), "groups_without_spread": float(silent_N.float().mean())}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
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
        return cls(**{**rename(state), "groups": groups, "own_groups": own_groups})

    def facts(self) -> dict[str, int]:
        """Kept with the rows of `records`."""
        return {"policy_step": self.policy_step, "rounds": self.rounds}

    def records(self) -> list[dict[str, Any]]:
        """The rows for `RolloutFiles`: all ranks' on the first rank, none on the others. Every rank
        must call it."""
        by_rank = distributed.gather_to_first([group.records() for group in self.own_groups])
        groups = [group for part in by_rank for group in part]
        return [{"group": i, **row} for i, group in enumerate(groups) for row in group]


def gather_groups(groups: list[Group]) -> list[Group]:
    """All ranks' groups, for the log. Those of other ranks come without what only the update needs,
    which is most of their size."""
    if distributed.alone():
        return groups
    light = [
        replace(
            group,
            rollouts=[replace(r, prompt_ids=[], logprobs=[], routes=None) for r in group.rollouts],
        )
        for group in groups
    ]
    return [group for part in distributed.gather(light) for group in part]


def flatten_rollout(rollout: Rollout) -> dict[str, Any]:
    values = {entry.name: getattr(rollout, entry.name) for entry in fields(rollout)}
    routes, episode = values.pop("routes"), values.pop("episode")
    values |= {"routes": None if routes is None else torch.from_numpy(routes)}
    return {**values, "episode": rollout.describe_episode()} if episode else values


def restore_rollout(values: dict[str, Any]) -> Rollout:
    routes = values["routes"]
    return Rollout(**{**values, "routes": None if routes is None else routes.numpy()})
