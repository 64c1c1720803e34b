"""What a run costs: time, devices and money, lost work included.

`runs/<name>/ledger.jsonl` is append-only: a line when a stage begins, for each step, and when it
ends. So it also has killed attempts, steps done twice and stages made again. Each stage's folder
gets its own `ledger.jsonl` (a line per step) and `ledger.json`, and the run a `ledger.json`.

A killed attempt writes no end: a thread keeps the file's modification time current, and the next
attempt takes that as the end. Imports no torch.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from r1pipe.config.recipe import Recipe
from r1pipe.utils import distributed
from r1pipe.utils.jsonl import dump_row, read_jsonl, write_jsonl, write_text
from r1pipe.utils.threads import threads_in_use
from r1pipe.utils.timeline import find_idle

SECONDS_BETWEEN_TOUCHES = 5.0
"""How exactly the end of a killed attempt is known."""
LEDGER, SUMMARY = "ledger.jsonl", "ledger.json"


@dataclass(frozen=True)
class Hardware:
    """What the run occupies, over all its processes: GPUs, or CPU cores."""

    unit: str
    count: int

    @classmethod
    def here(cls, recipe: Recipe, device_type: str) -> "Hardware":
        """`device_type` is torch's, "cuda" or "cpu"."""
        processes = distributed.world_size()
        if device_type == "cpu":
            # A fleet samples while the trainer waits.
            return cls("core", max(processes * threads_in_use(), recipe.sampler.engines))
        # A process has one GPU; alone it has those that its engine asks for.
        per_process = recipe.engine.tensor_parallel_size if distributed.alone() else 1
        engines = recipe.sampler.engines if recipe.sampler.kind == "fleet" else 0
        return cls("GPU", processes * per_process + engines)


class Ledger:
    """Writes a run's ledger. A no-op on ranks other than 0."""

    def __init__(self, run_dir: Path, recipe: Recipe, hardware: Hardware):
        self.run_dir, self.hardware = run_dir, hardware
        self.price, self.currency = recipe.price_per_device_hour, recipe.currency
        self._journal = LedgerFile(run_dir / LEDGER)
        self._stage = ""
        self._count_judged: Callable[[], dict[str, Any] | None] = lambda: None
        self._began = self._last = 0.0
        self._spent_before_s = 0.0
        self._noted = {"tokens_sampled": 0, "tokens_trained": 0}

    @contextmanager
    def stage(
        self, name: str, count_judged: Callable[[], dict[str, Any] | None] = lambda: None
    ) -> Iterator["Ledger"]:
        """Books time to the stage `name`; without `finish`, as a stopped attempt. `count_judged`:
        what its judges have asked and cost in all attempts."""
        if not distributed.is_first():
            yield self
            return
        self._journal.close_last_attempt()
        self._spent_before_s = sum(a.wall_s for a in read_attempts(self.run_dir) if a.stage == name)
        self._stage, self._count_judged = name, count_judged
        self._noted = dict.fromkeys(self._noted, 0)
        self._began = self._last = time.monotonic()
        self._journal.write(
            event="begin",
            stage=name,
            unit=self.hardware.unit,
            devices=self.hardware.count,
            price_per_device_hour=self.price,
            currency=self.currency,
            **self._judged(),
        )
        with self._journal.kept_current():
            try:
                yield self
            finally:
                if self._stage:
                    self._end("stopped", {})

    def finish(self, facts: dict[str, Any], folder: Path) -> None:
        """End the attempt and write the stage's ledger to its folder. `tokens_sampled` and
        `tokens_trained` of `facts`, its record's, count beyond what the steps have logged."""
        if not distributed.is_first():
            return
        name = self._stage
        self._end("finished", facts)
        attempts = [a for a in read_attempts(self.run_dir) if a.stage == name]
        write_jsonl(folder / LEDGER, kept_steps(attempts))
        write_text(folder / SUMMARY, dump(summarize(name, attempts)))
        write_text(self.run_dir / SUMMARY, dump(summarize_run(self.run_dir)))

    def note_step(self, metrics: dict[str, Any]) -> None:
        """A step, from a row of metrics.jsonl. The first one of an attempt takes its seconds from
        there, since the time since `stage` includes the start-up."""
        if not distributed.is_first():
            return
        now = time.monotonic()
        wall_s = now - self._last
        if self._last == self._began:
            wall_s = metrics.get("seconds/step", wall_s)
        sampled = metrics.get("tokens_sampled", 0)
        trained = metrics.get("tokens_trained", 0)
        self._noted["tokens_sampled"] += sampled
        self._noted["tokens_trained"] += trained
        self._journal.write(
            event="step",
            stage=self._stage,
            step=metrics["step"],
            wall_s=round(wall_s, 3),
            idle_s=find_idle_seconds(metrics),
            idle=find_idle(metrics),
            staleness=metrics.get("staleness/mean"),
            tokens_sampled=int(sampled),
            tokens_trained=int(trained),
            **self._judged(),
        )
        self._last = now

    def _end(self, outcome: str, facts: dict[str, Any]) -> None:
        self._journal.write(
            event="end",
            stage=self._stage,
            outcome=outcome,
            wall_s=round(time.monotonic() - self._began, 3),
            **{key: max(0, int(facts.get(key, 0)) - n) for key, n in self._noted.items()},
            **self._judged(),
        )
        self._stage = ""

    def _judged(self) -> dict[str, Any]:
        judged = self._count_judged()
        return {"judge": judged} if judged else {}

    def project(self, left_s: float) -> str:
        """The stage's cost now and in `left_s`, all attempts: for the progress line."""
        spent_s = self._spent_before_s + time.monotonic() - self._began
        hours = [s * self.hardware.count / 3600 for s in (spent_s, spent_s + left_s)]
        text = f"{hours[0]:.3g} of about {hours[1]:.3g} {self.hardware.unit}-hours"
        if self.price is None:
            return text
        return f"{text} ({hours[1] * self.price:.2f} {self.currency})"


def find_idle_seconds(metrics: dict[str, Any]) -> float | None:
    """Seconds of a step in which rank 0's device neither samples nor trains but waits for rewards
    or other ranks. None if the phases are not measured.

    Of a batch sampled beside the training of the one before, the wait is partly sampling: an upper
    bound is the time that its rewards took.
    """
    wait = metrics.get("seconds/wait")
    if wait is None:
        return None
    if metrics.get("staleness/max") or "staleness/tokens" in metrics:
        return round(min(wait, metrics["seconds/score"]), 3)
    return round(max(0.0, wait - metrics["seconds/sample"]), 3)


def dump(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


class LedgerFile:
    """The file of a run's ledger, opened for each line."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dump_row({"time": round(time.time(), 2), **row}) + "\n")

    def close_last_attempt(self) -> None:
        """Write the end of a killed attempt."""
        if not self.path.exists():
            return
        cut_torn_line(self.path)
        attempts = list(read_attempts(self.path.parent))
        if attempts and attempts[-1].outcome == "running":
            last = attempts[-1]
            self.write(event="end", stage=last.stage, outcome="killed", wall_s=last.wall_s)

    @contextmanager
    def kept_current(self) -> Iterator[None]:
        """Keep the file's modification time current."""
        stop = threading.Event()

        def touch() -> None:
            while not stop.wait(SECONDS_BETWEEN_TOUCHES):
                os.utime(self.path)

        thread = threading.Thread(target=touch, name="ledger", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def cut_torn_line(path: Path) -> None:
    """Drop a last line cut by a full disk or a power cut, keeping the file's times."""
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        times = path.stat()
        os.truncate(path, text.rfind(b"\n") + 1)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@dataclass
class Attempt:
    """One start of a stage."""

    stage: str
    began: float
    unit: str
    devices: int
    price: float | None
    currency: str
    steps: list[dict] = field(default_factory=list)
    outcome: str = "running"
    wall_s: float = 0.0
    rest: dict = field(default_factory=dict)
    """The end event: tokens that no step counted."""
    judged: dict | None = None
    """What the stage's judges had been asked and had cost by then, in all attempts."""

    def sum(self, key: str) -> float:
        """Over its steps and its end."""
        return sum(row.get(key, 0) for row in (*self.steps, self.rest))

    @property
    def device_hours(self) -> float:
        return self.wall_s * self.devices / 3600


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts of the run's stages; the last one may still be running."""
    path = run_dir / LEDGER
    attempts: list[Attempt] = []
    for _, row in read_jsonl(path, missing_ok=True, growing=True):
        if row["event"] == "begin":
            price, currency = row["price_per_device_hour"], row["currency"]
            attempts.append(
                Attempt(row["stage"], row["time"], row["unit"], row["devices"], price, currency)
            )
        elif row["event"] == "step":
            attempts[-1].steps.append(row)
        else:
            attempts[-1].outcome, attempts[-1].wall_s = row["outcome"], row["wall_s"]
            attempts[-1].rest = row
        attempts[-1].judged = row.get("judge", attempts[-1].judged)
    if attempts and attempts[-1].outcome == "running":
        attempts[-1].wall_s = round(path.stat().st_mtime - attempts[-1].began, 3)
    return attempts


def kept_steps(attempts: Iterable[Attempt]) -> list[dict]:
    """The steps in the stage's result: an attempt replaces the earlier ones from its first step on,
    because it resumed from the checkpoint before that."""
    kept: dict[int, dict] = {}
    for attempt in attempts:
        if attempt.steps:
            first = attempt.steps[0]["step"]
            kept = {step: row for step, row in kept.items() if step < first}
            kept |= {row["step"]: row for row in attempt.steps}
    return [kept[step] for step in sorted(kept)]


def summarize(stage: str, attempts: list[Attempt]) -> dict[str, Any]:
    """What a stage has cost in all its attempts.

    `lost_s`: wall time of all but the steps in its result and the last attempt's start and end.
    `staleness`: mean over those steps of how many steps behind the trainer their tokens were.
    """
    kept = kept_steps(attempts)
    last = attempts[-1]
    around_s = last.wall_s - sum(row["wall_s"] for row in last.steps)
    useful_s = sum(row["wall_s"] for row in kept) + around_s
    wall_s = sum(attempt.wall_s for attempt in attempts)
    timed = [r for a in attempts for r in a.steps if r["idle_s"] is not None]
    steps_s = sum(row["wall_s"] for row in timed)
    prices = [attempt.price for attempt in attempts]
    stale = [value for row in kept if (value := row.get("staleness")) is not None]
    return {
        "stage": stage,
        "attempts": len(attempts),
        "outcome": last.outcome,
        "steps": max((row["step"] for row in kept), default=0),
        "wall_s": round(wall_s, 1),
        "lost_s": round(max(0.0, wall_s - useful_s), 1),
        "unit": last.unit,
        "devices": last.devices,
        "device_hours": round(sum(a.device_hours for a in attempts), 5),
        "idle_share": round(sum(r["idle_s"] for r in timed) / steps_s, 4) if steps_s else None,
        "idle": average_idle([row for attempt in attempts for row in attempt.steps]),
        "staleness": round(fmean(stale), 3) if stale else None,
        "tokens_sampled": sum(a.sum("tokens_sampled") for a in attempts),
        "tokens_trained": sum(a.sum("tokens_trained") for a in attempts),
        "cost": (
            None if None in prices else round(sum(a.device_hours * a.price for a in attempts), 4)
        ),
        "currency": last.currency,
        **({"judge": last.judged} if last.judged else {}),
    }


def average_idle(steps: list[dict]) -> dict[str, float]:
    """Share of the steps' time in which the trainer, the judges and each engine did nothing."""
    average = {}
    for lane in sorted({lane for row in steps for lane in row.get("idle", {})}):
        rows = [row for row in steps if lane in row.get("idle", {})]
        idle_s = sum(row["wall_s"] * row["idle"][lane] for row in rows)
        average[lane] = round(idle_s / (sum(row["wall_s"] for row in rows) or 1.0), 4)
    return average


def summarize_run(run_dir: Path) -> list[dict[str, Any]]:
    """Each stage's summary, in the order of their first attempts."""
    by_stage: dict[str, list[Attempt]] = {}
    for attempt in read_attempts(run_dir):
        by_stage.setdefault(attempt.stage, []).append(attempt)
    return [summarize(stage, attempts) for stage, attempts in by_stage.items()]
