"""The records that stages hand to each other: Problem, Rollout, Score. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. Its columns are what a reward function sees (data/README.md has the schema)."""

    id: str
    kind: str
    prompt: list[dict[str, str]]
    answer: str | None = None
    tests: Any = None
    solution: str | None = None
    source: str = ""
    category: str = ""
    extra: dict[str, Any] | None = None
    """Further columns by name, which rewards are given beside the others."""

    @property
    def question(self) -> str:
        """The user's messages as one text: what decontamination compares."""
        return "\n".join(m["content"] for m in self.prompt if m["role"] == "user")


@dataclass(slots=True)
class Rollout:
    """One sampled completion of one problem.

    `logprobs[t]` is the sampler's log-probability (natural log, at the sampling temperature) of
    `completion_ids[t]`. `finish_reason` is vLLM's: "stop" or "length". `routes`, if they were asked
    for, are the experts that the sampler chose for every token that it read (all but the last), an
    integer array `[prompt + completion - 1, mixture-of-experts layers, experts per token]`.
    """

    problem_id: str
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    completion: str
    finish_reason: str
    routes: Any = field(default=None, repr=False, compare=False)
    num_tokens: int = -1
    """Tokens of the completion, also after `empty` has dropped `completion_ids`."""

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            self.num_tokens = len(self.completion_ids)

    def empty(self) -> None:
        """Let go of text and tokens, once nothing but figures is asked for."""
        self.prompt_ids, self.completion_ids, self.logprobs = [], [], []
        self.completion, self.routes = "", None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class Score:
    """The rewards of one rollout: one entry per reward function, None where it cannot judge.

    `total` is their weighted sum; None if no function could judge. `extra` is what functions have
    logged of this rollout, `metrics` what they have logged of all that were judged with it.
    """

    rewards: dict[str, float | None] = field(default_factory=dict)
    total: float | None = None
    extra: dict[str, Any] | None = None
    metrics: dict[str, list[float]] | None = None


def describe_rollout(problem: Problem, rollout: Rollout, score: Score) -> dict[str, Any]:
    """The readable fields of a rollout."""
    return {
        "problem_id": problem.id,
        "sample": rollout.sample,
        "prompt": problem.question,
        "answer": problem.answer,
        "completion": rollout.completion,
        "finish_reason": rollout.finish_reason,
        "num_tokens": rollout.num_tokens,
        "rewards": score.rewards,
        "reward": score.total,
        "extra": score.extra,
    }
