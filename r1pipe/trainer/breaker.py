"""The circuit breaker of a stage that trains on its own samples: applies the checks of
config/checks.py to every step, and acts.

    warn      a line on the terminal; like every other action, a row in the stage's events.jsonl
    skip      the step's update, or one optimizer step for its gradient, is not applied
    stop      the stage ends, exit code 2, with its newest checkpoint
    rollback  the stage ends with the newest checkpoint that made good rollouts

All ranks make all checks on the same numbers, so they decide alike.
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
    """A stage's `events.jsonl`: one row each time a check trips."""

    def __init__(self, folder: Path):
        super().__init__(folder / "events.jsonl")

    def cut(self, position: int | None) -> None:
        """Keeps what ended the stage: it explains why it resumes from an earlier step."""
        later = [row for _, row in read_jsonl(self.path, growing=True, begin=position or 0)]
        super().cut(position)
        self.write(*(event for event in later if event["action"] in ENDS))


class ExaminedBatch(Protocol):
    """A step's rollouts, as the breaker sees them."""

    step: int
    policy_step: int

    def describe(self) -> Facts:
        """Facts beyond the batch's metrics (r1pipe.rl.batch.describe_batch)."""


class Breaker:
    """Call `examine_batch`, then `examine_update` before each optimizer step, then `close_step`.

    The first two return whether to skip the update. All log what trips, and raise Tripped if the
    stage must end. `folder`: the stage's, named in messages.
    """

    def __init__(self, stage: OnPolicy, log: EventLog, folder: Path):
        self.stage, self.settings, self.log, self.folder = stage, stage.breaker, log, folder
        self.batch: ExaminedBatch | None = None
        """The batch under examination, to be written if a check ends the stage."""
        self._facts: Facts = {}
        self._past: deque[Facts] = deque(maxlen=self.settings.window)
        self._told: set[str] = set()
        """Checks that tripped in the previous step, not to be printed again."""
        self._tripped: set[str] = set()
        self._skips = self._skips_in_a_row = 0

    def examine_batch(self, batch: ExaminedBatch, metrics: Facts) -> bool:
        self.batch = batch
        self._facts = {**metrics, **batch.describe()}
        return self._examine(find_checks("rollouts"), self._facts, batch.step)

    def examine_update(self, metrics: Facts) -> bool:
        """`metrics`: of the optimizer step at hand, over all ranks."""
        name = "sampler/logprob_diff_mean"
        is_apart = self.batch.policy_step != self.batch.step or self.stage.fp8
        if is_apart and name in metrics:
            # A batch sampled ahead differs from the trainer by a step of learning, one in FP8 by
            # rounding, not by an error: it is compared with the policy that sampled it.
            metrics = {key: value for key, value in metrics.items() if key != name}
            if self.batch.logprob_diff is not None:
                metrics[name] = self.batch.logprob_diff
        return self._examine(find_checks("update"), metrics, self.batch.step)

    def examine_sync(self, logprob_diff: float, step: int) -> None:
        """The probe after a weight sync: a skip drops the update on what it will sample."""
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
        """The state at the end of a step."""
        return {
            "past": list(self._past),
            "told": sorted(self._told),
            "skips_in_a_row": self._skips_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past = deque(state["past"], maxlen=self.settings.window)
        self._told, self._skips_in_a_row = set(state["told"]), state["skips_in_a_row"]

    def _count_vain_steps(self, metrics: Facts) -> int:
        """Consecutive steps, up to this one, with nothing to learn. Skipped ones had something. A
        KL term trains on groups without spread, but learns no reward from them."""
        if metrics.get("updates_skipped"):
            return 0
        silent = self.stage.learns_from_rewards and metrics.get("groups_without_spread") == 1.0
        if metrics["tokens_trained"] and not silent:
            return 0
        return 1 + (self._past[-1].get("steps_in_vain", 0) if self._past else 0)

    def _examine(self, names: list[str], facts: Facts, step: int) -> bool:
        """Run these checks; whether one of them asks to skip."""
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
        """The last step that changed the policy which sampled the rollouts at hand: checkpoints
        from there on may be as bad."""
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
    """For supervised stages: a NaN or infinite loss shows in the gradient. Raises Tripped."""
    if not math.isfinite(grad_norm):
        event = describe_event("nonfinite", step, grad_norm, Limit(limit=0.0, action="stop"))
        log.write(event)
        raise Tripped(say_event(label, event), rollback=False)


def find_checks(moment: Moment) -> list[str]:
    return [name for name, check in CHECKS.items() if check.at == moment]
