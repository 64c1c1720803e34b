"""Calls reward functions on rollouts, weights their values, and counts what none could judge.

The contract is TRL's (1.16, GRPOTrainer._calculate_rewards): plain functions, callable objects, and
`async` functions of these, called by keyword with

    prompts, completions, completion_ids   one entry per rollout; completions are strings, or with
                                           `conversational` lists of messages; in an environment
                                           they are the sampled parts, or with `conversational` the
                                           environment's messages as well
    id, kind, answer, tests, solution, ... every column of the problem, one entry per rollout
    trainer_state                          transformers.TrainerState: global_step, max_steps, epoch
    log_extra(column, values)              a value per rollout, kept with it
    log_metric(name, value)                a number, averaged over the step into metrics.jsonl

A function without `**kwargs` gets only what it names. Each returns a number or None for every
rollout: a list, a NumPy array or a tensor.
"""

import asyncio
import functools
import inspect
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Generic, TypeVar

from r1pipe.config.base import ENVIRONMENT, Reward
from r1pipe.rollout.groups import SampleGroup
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils.errors import OutOfBudget, UserError
from r1pipe.utils.imports import describe_failure, find_reward
from r1pipe.utils.phases import phase
from rewards import JudgeBudgetError, JudgeError, SandboxError
from rewards.judges.judge import find_judge
from rewards.judges.settings import OPTIONS
from rewards.workers.pool import WorkerError

T = TypeVar("T")

MAX_WAITING = 256
"""Groups that may wait for their scores before sampling waits for the graders."""

ASKED_AT_ONCE = 32
"""Groups whose async rewards run at the same time: each waits for a server's answers."""

COLUMNS = tuple(f.name for f in fields(Problem) if f.name not in ("prompt", "extra"))


def name_rewards(rewards: Iterable[Reward]) -> list[str]:
    """Names for the log: the function's, with a number from its second use on."""
    seen: Counter[str] = Counter()
    names = []
    for reward in rewards:
        seen[reward.function] += 1
        number = seen[reward.function]
        names.append(reward.function if number == 1 else f"{reward.function}#{number}")
    return names


class Scorer:
    """The reward functions of a stage, looked up once.

    With `environment_weight`, the weight of an environment's own rewards, these count as one more
    function, `environment`. A rollout whose environment failed has no total.

    Raises UserError for a function that does not exist or does not take its `options`.
    """

    def __init__(self, rewards: list[Reward], environment_weight: float | None = None):
        self.environment_weight = environment_weight
        names = name_rewards(rewards)
        self.calls = [Call(*pair) for pair in zip(names, rewards, strict=True)]
        self._one_at_a_time = threading.Lock()

    @property
    def num_threads(self) -> int:
        """Threads that may call `score` to some use."""
        return ASKED_AT_ONCE if any(call.is_async for call in self.calls) else 1

    @phase("scoring")
    def score(
        self,
        problems: list[Problem],
        rollouts: list[Rollout],
        trainer_state: Mapping[str, float] | None = None,
    ) -> list[Score]:
        """One Score per rollout; `problems[i]` is the problem of `rollouts[i]`. The functions
        get `trainer_state` as transformers' TrainerState; without it, that of step 0.

        Raises UserError for a function that raises, or returns anything but a number or None for
        each.
        """
        scores = [Score() for _ in rollouts]
        if not rollouts:
            return scores
        given = (problems, rollouts, trainer_state or {}, scores)
        with self._one_at_a_time:  # users' functions need not be safe for threads
            values = {call: call.run(*given) for call in self.calls if not call.is_async}
        if waiting := [call for call in self.calls if call.is_async]:

            async def run_all() -> list[list[float | None]]:
                return await asyncio.gather(*(call.run_async(*given) for call in waiting))

            running = asyncio.run_coroutine_threadsafe(run_all(), start_event_loop())
            values |= zip(waiting, running.result(), strict=True)
        columns = [(call.name, call.reward.weight, values[call]) for call in self.calls]
        if (weight := self.environment_weight) is not None:
            own = [rollout.episode.reward if rollout.episode else None for rollout in rollouts]
            columns.append((ENVIRONMENT, weight, own))
        for name, weight, column in columns:
            for score, value in zip(scores, column, strict=True):
                score.rewards[name] = value
                if value is not None:
                    score.total = (score.total or 0.0) + weight * value
        for score, rollout in zip(scores, rollouts, strict=True):
            if rollout.episode and rollout.episode.error:
                score.total = None
                score.extra = {**(score.extra or {}), "environment_error": rollout.episode.error}
        return scores


class Call:
    """A reward of a recipe with its name in the log and its function."""

    def __init__(self, name: str, reward: Reward):
        self.name, self.reward, self.function = name, reward, find_reward(reward.function)
        inner = self.function
        while isinstance(inner, functools.partial):
            inner = inner.func
        self.is_async = any(map(inspect.iscoroutinefunction, (inner, inner.__call__)))
        parameters = inspect.signature(self.function).parameters.values()
        self.takes = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        # Our own ignore what they do not name, and need no transformers.
        is_ours = getattr(inner, "__module__", "").partition(".")[0] == "rewards"
        self.takes_all = not is_ours and len(self.takes) < len(parameters)
        known = OPTIONS if reward.is_judge else self.takes
        for option in reward.options:
            if option not in known:
                near = get_close_matches(option, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f'reward "{reward.function}": no option "{option}"{hint}')
        if reward.is_judge:
            try:
                find_judge(reward.options)
            except Exception as error:
                raise self.explain(error) from error

    def run(self, *given: Any) -> list[float | None]:
        try:
            return self.read(self.function(**self.arguments(*given)), len(given[0]))
        except (Exception, SystemExit) as error:
            raise self.explain(error) from error

    async def run_async(self, *given: Any) -> list[float | None]:
        try:
            return self.read(await self.function(**self.arguments(*given)), len(given[0]))
        except (Exception, SystemExit) as error:
            raise self.explain(error) from error

    def arguments(
        self,
        problems: list[Problem],
        rollouts: list[Rollout],
        trainer_state: Mapping[str, float],
        scores: list[Score],
    ) -> dict[str, Any]:
        """The keyword arguments that the function takes; copies of what the caller still needs."""
        columns = {
            name: partial(lambda name: [getattr(p, name) for p in problems], name)
            for name in COLUMNS
        }
        for name in {name for p in problems for name in p.extra or ()}:
            columns[name] = partial(
                lambda name: [(p.extra or {}).get(name) for p in problems], name
            )
        given: dict[str, Callable[[], Any]] = {
            **columns,
            "prompts": lambda: [[dict(message) for message in p.prompt] for p in problems],
            "completions": lambda: [self.shape_completion(r) for r in rollouts],
            "completion_ids": lambda: [list(r.pick_sampled(r.completion_ids)) for r in rollouts],
            "trainer_state": lambda: make_trainer_state(trainer_state),
            "log_extra": lambda: partial(self.log_extra, scores),
            "log_metric": lambda: partial(self.log_metric, scores),
        }
        values = {n: make() for n, make in given.items() if self.takes_all or n in self.takes}
        return {**values, **self.reward.options}

    def shape_completion(self, rollout: Rollout) -> str | list[dict[str, Any]]:
        if not self.reward.conversational:
            return rollout.completion
        if rollout.episode:
            return [dict(message) for message in rollout.episode.messages]
        return [{"role": "assistant", "content": rollout.completion}]

    def explain(self, error: BaseException) -> UserError:
        if isinstance(error, UserError):
            return error
        if isinstance(error, JudgeBudgetError):
            return OutOfBudget(f'reward "{self.name}": {error}')
        if isinstance(error, SandboxError | WorkerError | JudgeError):
            return UserError(f'reward "{self.name}": {error}')
        hint = ""
        if isinstance(error, TypeError) and "string indices" in str(error):
            hint = "; completions are strings; lists of messages with conversational: true"
        elif isinstance(error, TypeError) and "required" in str(error):
            known = ", ".join(("prompts", "completions", "completion_ids", *COLUMNS))
            hint = f"; a reward is given {known} and its options"
        return UserError(f'reward "{self.name}" raised {describe_failure(error)}{hint}')

    def read(self, result: Any, count: int) -> list[float | None]:
        """A function's return value as numbers."""
        values = result.tolist() if hasattr(result, "tolist") else result
        what = ""
        if not isinstance(values, list | tuple):
            what = "None" if values is None else f"one value, {values!r:.60}"
        elif len(values) != count:
            what = f"{len(values)} values for {count} completions"
        else:
            # Single values of NumPy and torch have tolist(), too.
            values = [v.tolist() if hasattr(v, "tolist") else v for v in values]
            odd = [v for v in values if not isinstance(v, int | float | None) or is_infinite(v)]
            what = f"{odd[0]!r:.60} as a value" if odd else ""
        if what:
            raise UserError(
                f'reward "{self.name}" returned {what}: a reward returns a list with a number, or '
                "None where it cannot judge, for each completion"
            )
        return [None if value is None else float(value) for value in values]

    def log_extra(self, scores: list[Score], column: str, values: Iterable[Any]) -> None:
        values = list(values)
        if len(values) != len(scores):
            raise UserError(
                f'reward "{self.name}": log_extra("{column}") has {len(values)} values for '
                f"{len(scores)} completions"
            )
        for score, value in zip(scores, values, strict=True):
            value = value.tolist() if hasattr(value, "tolist") else value
            plain = value if isinstance(value, str | int | float | None) else str(value)
            score.extra = {**(score.extra or {}), str(column): plain}

    def log_metric(self, scores: list[Score], name: str, value: Any) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f'reward "{self.name}": log_metric("{name}"): {value!r} is no number'
            ) from error
        metrics = scores[0].metrics or {}
        scores[0].metrics = {**metrics, name: [*metrics.get(name, ()), number]}


class ScoringThread(Generic[T]):
    """Scores groups in a thread while others are being sampled. Use as a context manager, which
    waits for the last one; `results` then has, by the group's index, what `score` gave for it.

    `score` is called with one group, by `num_threads` at a time; `batched`, with all that have
    piled up, so that the graders' processes always have work.
    """

    def __init__(
        self,
        score: Callable[[list[SampleGroup]], Iterable[T]],
        *,
        batched: bool,
        num_threads: int = 1,
    ):
        self._score, self._batched = score, batched
        self.results: dict[int, T] = {}
        self._waiting: deque[SampleGroup] = deque()
        self._thread = ThreadPoolExecutor(num_threads, "judge")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> "ScoringThread[T]":
        return self

    def add(self, group: SampleGroup) -> None:
        """Raises what an earlier call of the rewards has raised."""
        self._waiting.append(group)
        self._running.append(self._thread.submit(self._score_waiting))
        # A batched call takes all that wait: those behind it find little or nothing.
        while self._running and (self._running[0].done() or len(self._running) > MAX_WAITING):
            self._running.popleft().result()

    def _score_waiting(self) -> None:
        count = len(self._waiting) if self._batched else 1
        groups = [self._waiting.popleft() for _ in range(count)]
        for group, result in zip(groups, self._score(groups), strict=True):
            self.results[group.index] = result

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            for call in self._running:
                call.result()


def is_infinite(value: float | None) -> bool:
    """An infinite reward would make every advantage of its group NaN."""
    return isinstance(value, float) and math.isinf(value)


def make_trainer_state(facts: Mapping[str, float]) -> Any:
    """Where nothing trains, the first of one step: functions divide by max_steps."""
    from transformers import TrainerState

    return TrainerState(**{"max_steps": 1, "epoch": 0.0, **facts})


@functools.cache
def start_event_loop() -> asyncio.AbstractEventLoop:
    """One for the process, in its own thread: a client's connections, which async rewards keep
    open, belong to the loop that opened them."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async rewards").start()
    return loop


def reward_metrics(scores: list[Score]) -> dict[str, float]:
    """Per function the mean over judged rollouts and the share that could not be judged; and the
    means of what functions logged with `log_metric`."""
    metrics = {}
    for name in scores[0].rewards if scores else ():
        judged = [s.rewards[name] for s in scores if s.rewards[name] is not None]
        metrics[f"rewards/{name}/mean"] = mean(judged)
        metrics[f"rewards/{name}/unjudged"] = 1 - len(judged) / len(scores)
    totals = [s.total for s in scores if s.total is not None]
    metrics["reward"] = mean(totals)
    metrics["reward_unjudged"] = 1 - len(totals) / max(1, len(scores))
    logged: dict[str, list[float]] = {}
    for score in scores:
        for name, values in (score.metrics or {}).items():
            logged.setdefault(name, []).extend(values)
    return {**{name: mean(values) for name, values in logged.items()}, **metrics}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
