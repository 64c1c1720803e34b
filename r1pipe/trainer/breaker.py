"""The circuit breaker of a stage that trains on its own samples: holds every step to the checks of
checks.py, and acts.

    warn      a line on the terminal, and one in the stage's events.jsonl as for all others
    skip      the update is not applied: the whole step's, or one optimizer step for its gradient
    stop      the stage ends, exit code 2, with its newest checkpoint
    rollback  the stage ends with the newest checkpoint that made good rollouts

Every rank makes every check, on the same numbers, and so decides alike.
"""

import math
from collections import deque
from pathlib import Path
from typing import Any, Protocol

from r1pipe.config.breaker import Limit
from r1pipe.config.checks import CHECKS, Facts, Moment
from r1pipe.config.rl import OnPolicy
from r1pipe.runs.logs import JsonlLog
from r1pipe.utils.errors import Tripped
from r1pipe.utils.jsonl import read_jsonl
from r1pipe.utils.progress import log_line

ENDS = ("stop", "rollback")


class EventLog(JsonlLog):
    """`events.jsonl` of a stage: one object for each time that a check tripped."""

    def __init__(self, folder: Path):
        super().__init__(folder / "events.jsonl")

    def cut(self, position: int | None) -> None:
        """What ended the stage stays: it is why the stage goes on from an earlier step."""
        later = [row for _, row in read_jsonl(self.path, growing=True, begin=position or 0)]
        super().cut(position)
        self.write(*(event for event in later if event["action"] in ENDS))


class ExaminedBatch(Protocol):
    """What the breaker asks of a step's rollouts."""

    step: int
    policy_step: int

    def describe(self) -> Facts:
        """Facts beyond the batch's metrics (r1pipe.rl.batch.describe_batch)."""


class Breaker:
    """Call `examine_batch`, then `examine_update` before each optimizer step, then `close_step`.

    The first two say whether the update is to be skipped. All write down what trips, and raise
    Tripped if the stage must end. `folder`: the stage's, for a person to look at.
    """

    def __init__(self, stage: OnPolicy, log: EventLog, folder: Path):
        self.stage, self.settings, self.log, self.folder = stage, stage.breaker, log, folder
        self.batch: ExaminedBatch | None = None
        """What is being examined: for a person to read if a check ends the stage."""
        self._facts: Facts = {}
        self._past: deque[Facts] = deque(maxlen=self.settings.window)
        self._told: set[str] = set()
        """What tripped in the step before already, and so is no news on the terminal."""
        self._tripped: set[str] = set()
        self._skips = self._skips_in_a_row = 0

    def examine_batch(self, batch: ExaminedBatch, metrics: Facts) -> bool:
        self.batch = batch
        self._facts = {**metrics, **batch.describe()}
        return self._examine(find_checks("rollouts"), self._facts, batch.step)

    def examine_update(self, metrics: Facts) -> bool:
        """`metrics`: of the optimizer step at hand, over all ranks."""
        name = "sampler/logprob_diff_mean"
        if self.batch.policy_step != self.batch.step and name in metrics:
            # A stale sampler differs from the trainer by a step of learning, not by an error: it is
            # held to the policy that it was then.
            metrics = {key: value for key, value in metrics.items() if key != name}
            if self.batch.logprob_diff is not None:
                metrics[name] = self.batch.logprob_diff
        return self._examine(find_checks("update"), metrics, self.batch.step)

    def examine_sync(self, logprob_diff: float, step: int) -> None:
        """Of a probe after a weight sync: what will be sampled with it can still be skipped."""
        self._examine(["logprob_diff"], {"sampler/logprob_diff_mean": logprob_diff}, step)

    def close_step(self, metrics: Facts) -> None:
        """`metrics`: the whole step's."""
        step = self.batch.step
        metrics = {**metrics, "steps_in_vain": self._count_vain_steps(metrics)}
        self._examine(find_checks("step"), metrics, step)
        self._past.append({**self._facts, **metrics})
        if self._skips and self._skips_in_a_row >= self.settings.max_skips:
            raise self._end(
                f"{self.stage.name}, step {step}: the update was skipped in "
                f"{self._skips_in_a_row + 1} steps in a row (breaker.max_skips "
                f"{self.settings.max_skips}): {', '.join(sorted(self._tripped))}",
                step,
                rollback=True,
            )
        self._skips_in_a_row = self._skips_in_a_row + 1 if self._skips else 0
        self._told, self._tripped, self._skips = self._tripped, set(), 0

    def state_dict(self) -> dict[str, Any]:
        """At the end of a step."""
        return {
            "past": list(self._past),
            "told": sorted(self._told),
            "skips_in_a_row": self._skips_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past = deque(state["past"], maxlen=self.settings.window)
        self._told, self._skips_in_a_row = set(state["told"]), state["skips_in_a_row"]

    def _count_vain_steps(self, metrics: Facts) -> int:
        """Steps in a row, up to this one, in which there was nothing to learn. One that was skipped
        had something. A KL term trains on groups without spread, too, but learns no reward."""
        if metrics.get("updates_skipped"):
            return 0
        silent = self.stage.learns_from_rewards and metrics.get("groups_without_spread") == 1.0
        if metrics["tokens_trained"] and not silent:
            return 0
        return 1 + (self._past[-1].get("steps_in_vain", 0) if self._past else 0)

    def _examine(self, names: list[str], facts: Facts, step: int) -> bool:
        """Make these checks; whether one of them asks to skip."""
        past = tuple(self._past) if 2 * len(self._past) >= self.settings.window else ()
        skips, ends = False, []
        for name in names:
            check, limit = CHECKS[name], getattr(self.settings, name)
            value = None if limit.action == "ignore" else check.measure(facts, past)
            if value is None or not check.trips(value, limit.limit):
                continue
            event = describe_event(name, step, value, limit)
            self.log.write(event)
            line = say_event(self.stage.name, event)
            if limit.action in ENDS:
                ends.append((line, limit.action == "rollback"))
            elif name not in self._told | self._tripped:
                log_line(f"{limit.action}: {line}")
            self._tripped.add(name)
            skips = skips or limit.action == "skip"
        if ends:
            raise self._end(ends[0][0], step, rollback=any(rollback for _, rollback in ends))
        self._skips += skips
        return skips

    def _end(self, line: str, step: int, rollback: bool) -> Tripped:
        look = f"r1pipe rollouts {self.folder} --step {step}"
        return Tripped(f"{line}; look at the step's rollouts: {look}", rollback)

    @property
    def first_suspect(self) -> int:
        """The step that made the policy of the rollouts at hand: a checkpoint from there on may be
        as bad as they are. Steps that were skipped have made nothing."""
        return self.batch.policy_step - 1 - self._skips_in_a_row


def describe_event(name: str, step: int, value: float, limit: Limit) -> dict[str, Any]:
    """A row of events.jsonl."""
    check = CHECKS[name]
    bound = "at least " if check.floor else ""
    return {
        "step": step,
        "check": name,
        "value": value if math.isfinite(value) else str(value),
        "limit": limit.limit,
        "action": limit.action,
        "says": f"{check.says.format(value=value)} (breaker.{name} {bound}{limit.limit:g})",
        "hint": check.hint,
    }


def say_event(label: str, event: dict[str, Any]) -> str:
    return f"{label}, step {event['step']}: {event['says']}; {event['hint']}"


def stop_unless_finite(label: str, step: int, grad_norm: float, log: EventLog) -> None:
    """For supervised stages, whose gradient is NaN or infinite if the loss is. Raises Tripped."""
    if not math.isfinite(grad_norm):
        event = describe_event("nonfinite", step, grad_norm, Limit(limit=0.0, action="stop"))
        log.write(event)
        raise Tripped(say_event(label, event), rollback=False)


def find_checks(moment: Moment) -> list[str]:
    return [name for name, check in CHECKS.items() if check.at == moment]
