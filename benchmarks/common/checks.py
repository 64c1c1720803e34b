"""Checks that run one after another in one process, and none keeps the others from running.

Each has a time limit, and its rows are on the screen and on the disk as soon as they are known.
What ends a check:

- an exception, out of memory included: a row, its memory is freed, the next check runs;
- its time limit: SIGALRM raises TimedOut in the main thread;
- a C call that does not return, where no signal's handler runs: a thread replaces the process by a
  new one of the same command (`execv`, so it stays one process), which runs the checks that are
  left. So does a lost CUDA context, which after an illegal memory access fails every later call.

Checks that the overall limit leaves no time for are listed as not reached.
"""

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE_S = 15.0
"""How long an interrupted check has to come to its end before the process is replaced."""
CLEAN_S = 20.0
"""How long freeing a check's memory may take."""
LEAST_S = 5.0
"""A check with less time than this is not begun."""


class TimedOut(BaseException):
    """Raised in the main thread. No Exception: libraries catch those."""


@dataclass
class Row:
    figure: str
    measured: float | str
    unit: str = ""
    goal: str = ""
    met: bool | None = None

    @property
    def text(self) -> str:
        value = self.measured
        return f"{value if isinstance(value, str) else format_number(value)} {self.unit}".strip()


@dataclass
class Check:
    """`run` is called with the check itself, and adds rows to it."""

    number: int
    title: str
    limit_s: float
    run: Callable[["Check"], None] = field(repr=False)
    state: str = "not reached"
    error: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    listener: Callable[[], None] = field(default=lambda: None, repr=False)

    def add(
        self,
        figure: str,
        measured: float | str,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A row of the table. A goal counts where a number was measured; NaN does not meet it."""
        row = Row(figure, measured, unit)
        for sign, limit in (("≤", at_most), ("≥", at_least)):
            if limit is not None:
                row.goal = f"{sign} {format_number(limit)} {unit}".strip()
                if not isinstance(measured, str):
                    row.met = measured <= limit if sign == "≤" else measured >= limit
        self.rows.append(row)
        verdict = "" if row.met is None else f" ({row.goal}: {'met' if row.met else 'NOT MET'})"
        print(f"  {self.number} {figure}: {row.text}{verdict}", flush=True)
        self.listener()

    def record(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in RECORDED}
        return {**values, "rows": [asdict(row) for row in self.rows]}


RECORDED = ("number", "title", "limit_s", "state", "error", "seconds")


class Runner:
    """Runs checks, and writes NAME.json and NAME.md into `folder` after every row.

    `began`: when the command began, as time.time(); `limit_s` counts from there. With `resume` the
    checks that are in NAME.json as done are not run again.
    """

    def __init__(
        self,
        name: str,
        checks: list[Check],
        folder: Path,
        *,
        limit_s: float,
        began: float,
        resume: bool = False,
        clean: Callable[[Check], None] = lambda check: None,
    ):
        self.name, self.checks, self.folder, self.clean = name, checks, folder, clean
        self.limit_s, self.began = limit_s, began
        self._lock = threading.Lock()
        self._deadline: float | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            self._restore()
        for check in checks:
            check.listener = self.write

    @property
    def left_s(self) -> float:
        return self.began + self.limit_s - time.time()

    @property
    def summary(self) -> str:
        goals = [(check, row) for check in self.checks for row in check.rows if row.met is not None]
        missed = [f"{check.number} {row.figure.strip()}" for check, row in goals if not row.met]
        lines = [f"goals met: {len(goals) - len(missed)} of {len(goals)}"]
        if missed:
            lines.append("not met: " + "; ".join(missed))
        for state in ("failed", "stopped", "not reached"):
            if numbers := [str(c.number) for c in self.checks if c.state == state]:
                lines.append(f"{state}: {', '.join(numbers)}")
        return ". ".join(lines)

    def run(self) -> bool:
        """Whether every check came to its end."""
        # Where the interpreter itself is held no thread runs: the last resort is in C.
        faulthandler.dump_traceback_later(self.left_s + 4 * GRACE_S, exit=True)
        previous = signal.signal(signal.SIGALRM, raise_timed_out)
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), name="checks", daemon=True).start()
        try:
            for check in self.checks:
                if check.state == "not reached" and self.left_s >= LEAST_S:
                    self._run_one(check)
                    if check.error and is_card_lost():
                        self._replace_process()
        finally:
            ended.set()
            signal.signal(signal.SIGALRM, previous)
            faulthandler.cancel_dump_traceback_later()
        self.write()
        print(self.summary)
        return all(check.state == "done" for check in self.checks)

    def _run_one(self, check: Check) -> None:
        limit = min(check.limit_s, self.left_s)
        print(f"[{time.time() - self.began:4.0f} s] {check.number} {check.title}", flush=True)
        check.state = "running"
        self.write()
        started = time.monotonic()
        try:
            with self._alarm(limit):
                check.run(check)
            check.state = "done"
        except TimedOut:
            whose = "its limit" if limit == check.limit_s else f"the limit of {self.limit_s:.0f} s"
            check.state, check.error = "stopped", f"{whose} was over after {limit:.0f} s"
        except (Exception, SystemExit) as error:
            check.state, check.error = "failed", describe(error)
        with contextlib.suppress(TimedOut, Exception), self._alarm(CLEAN_S):
            self.clean(check)
            free_memory()
        check.seconds = round(time.monotonic() - started, 1)
        if check.error:
            print(f"  {check.number} {check.state}: {check.error}", flush=True)
        self.write()

    @contextlib.contextmanager
    def _alarm(self, seconds: float) -> Iterator[None]:
        self._deadline = time.monotonic() + seconds
        # Again and again: the first may be raised where Python ignores exceptions, as in __del__.
        signal.setitimer(signal.ITIMER_REAL, seconds, GRACE_S / 3)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._deadline = None

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline + GRACE_S:
                faulthandler.dump_traceback(all_threads=True)
                for check in self.checks:
                    if check.state == "running":
                        check.state, check.error = "stopped", "hung in a C call: see its stack"
                self._replace_process()

    def _replace_process(self) -> None:
        self.write()
        print("  a new process goes on with the checks that are left", flush=True)
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)  # execv keeps it, and the handler not
        arguments = [a for a in sys.argv if not a.startswith("--resume-from=")]
        arguments.append(f"--resume-from={self.began}")
        os.execv(sys.executable, [sys.executable, *arguments])

    def write(self) -> None:
        with self._lock:
            record = {
                "seconds": round(time.time() - self.began, 1),
                "limit_s": self.limit_s,
                "summary": self.summary,
                "checks": [check.record() for check in self.checks],
            }
            replace_text(self.folder / f"{self.name}.json", json.dumps(record, indent=1) + "\n")
            replace_text(self.folder / f"{self.name}.md", "\n".join(self._markdown()) + "\n")

    def _restore(self) -> None:
        record = json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
        before = {values["number"]: values for values in record["checks"]}
        for check in self.checks:
            values = before.get(check.number)
            if values and values["state"] != "not reached":
                check.state, check.error = values["state"], values["error"]
                check.seconds = values["seconds"]
                check.rows = [Row(**row) for row in values["rows"]]

    def _markdown(self) -> Iterator[str]:
        yield f"# {self.name}\n\n{self.summary}"
        for check in self.checks:
            spent = f" ({check.seconds:.0f} s)" if check.seconds else ""
            state = "" if check.state == "done" else f": {check.state}"
            yield f"\n## {check.number}. {check.title}{state}{spent}\n"
            if check.rows:
                yield "| figure | measured | goal | met |\n|---|---|---|---|"
            for row in check.rows:
                met = {None: "", True: "yes", False: "**no**"}[row.met]
                yield f"| {row.figure} | {row.text.replace('|', '/')} | {row.goal} | {met} |"
            if check.error:
                yield f"\n{check.state}: {check.error}"


def raise_timed_out(number: int, frame: object) -> None:
    raise TimedOut


def describe(error: BaseException) -> str:
    """Type and first lines of the message, and where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{where}"


def free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def is_card_lost() -> bool:
    """Whether CUDA answers no more, or a check that failed has left most of the card taken."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.ones(8, device="cuda").sum().item()
        free, total = torch.cuda.mem_get_info()
    except Exception:
        return True
    return free < 0.6 * total


def format_number(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def replace_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
