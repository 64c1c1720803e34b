"""The records that stages hand to each other: Problem, Rollout, Score. Imports no torch."""

import json
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. Its columns are what a reward function sees (data/README.md has the schema)."""

    id: str
    kind: str
    prompt: list[dict[str, str]]
    answer: str | None = None
    tests: Any = None
    solution: str | list[dict[str, Any]] | None = None
    source: str = ""
    category: str = ""
    extra: dict[str, Any] | None = None
    """Further columns by name, which rewards are given beside the others."""

    @property
    def question(self) -> str:
        """The user's messages as one text: what decontamination compares."""
        return "\n".join(m["content"] for m in self.prompt if m["role"] == "user")

    @property
    def trace(self) -> list[dict[str, Any]]:
        """The solution as messages: one answer, or several turns with what tools said between."""
        if isinstance(self.solution, str):
            return [{"role": "assistant", "content": self.solution}]
        return self.solution or []

    @property
    def trace_text(self) -> str:
        """What the policy says in the solution, calls of tools as JSON."""
        parts = []
        for message in self.trace:
            if message["role"] == "assistant":
                calls = [call["function"] for call in message.get("tool_calls") or ()]
                written = [json.dumps(call, separators=(",", ":")) for call in calls]
                parts.append("\n".join(filter(None, [message["content"], *written])))
        return "\n\n".join(parts)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """JSON schemas that the trace's prompt shows: the column `tools`."""
        return (self.extra or {}).get("tools")


@dataclass(slots=True)
class Episode:
    """What a rollout in an environment has beyond one of a single turn. Plain values, as in JSON.

    `given` are the spans `[start, stop)` of `completion_ids` that the environment put in: prompts
    of later turns, which nothing is learnt from. `messages` are the policy's and the environment's
    after the prompt. `reward` is the sum of what the environment gave, None if it gave nothing.
    `ended` says what ended it: "done", or a limit, "turns", "tokens" or "tool_time"; or "error",
    the environment's exception, whose text is `error`. `prompt` are the environment's own first
    messages, None where they are the problem's.
    """

    given: list[list[int]]
    messages: list[dict[str, Any]]
    reward: float | None = None
    ended: str = "done"
    error: str | None = None
    num_tool_calls: int = 0
    num_malformed_calls: int = 0
    """Answers that look like a call and cannot be read as one."""
    prompt: list[dict[str, Any]] | None = None

    @property
    def num_turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.messages)


@dataclass(slots=True)
class Rollout:
    """One sampled completion of one problem, or in an `episode` all that follows the prompt.

    `logprobs[t]` is the sampler's log-probability (natural log, at the sampling temperature) of
    `completion_ids[t]`, 0 where an environment gave it. `finish_reason` is vLLM's: "stop" or
    "length", which a limit of an episode is as well. `routes`, if they were asked for, are the
    experts that the sampler chose for every token that it read (all but the last), an integer array
    `[prompt + completion - 1, mixture-of-experts layers, experts per token]`.
    """

    problem_id: str
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    completion: str
    finish_reason: str
    routes: Any = field(default=None, repr=False, compare=False)
    versions: list[int] | None = field(default=None, repr=False, compare=False)
    """From a sampler that takes weights while it samples: whose sampled each of `completion_ids`,
    as the number of a fleet's sync, in a batch as the step that they were the first for."""
    num_tokens: int = -1
    """Sampled tokens of the completion, also after `empty` has dropped `completion_ids`."""
    episode: Episode | None = None

    def __post_init__(self) -> None:
        if isinstance(self.episode, dict):  # from a file
            self.episode = Episode(**self.episode)
        if self.num_tokens < 0:
            self.num_tokens = len(self.pick_sampled(self.completion_ids))

    @property
    def sampled_spans(self) -> list[tuple[int, int]]:
        """Of `completion_ids`: all but what an environment gave."""
        given = self.episode.given if self.episode else []
        borders = [0, *chain.from_iterable(given), len(self.completion_ids)]
        return list(zip(borders[::2], borders[1::2], strict=True))

    def pick_sampled(self, values: list[T]) -> list[T]:
        """Of a list with a value for each of `completion_ids`, those of sampled tokens."""
        if self.episode is None:
            return values
        return [value for start, stop in self.sampled_spans for value in values[start:stop]]

    def describe_episode(self) -> dict[str, Any] | None:
        """For a file; `Rollout` takes it back."""
        if self.episode is None:
            return None
        values = asdict(self.episode)
        if self.episode.prompt is None:
            del values["prompt"]
        return values

    def empty(self) -> None:
        """Let go of text and tokens, once nothing but figures is asked for."""
        self.prompt_ids, self.completion_ids, self.logprobs = [], [], []
        self.completion, self.routes, self.versions = "", None, None
        if self.episode:
            self.episode.given, self.episode.messages, self.episode.prompt = [], [], None

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
        **({"episode": rollout.describe_episode()} if rollout.episode else {}),
    }
