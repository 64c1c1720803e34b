"""Measure the graders on labelled pairs: how often they are wrong, and how fast they are.

    python -m rewards.bench PAIRS.jsonl [--json] [--compare] [--by FIELD] [--limit S] [--show N]

Rows are ``{"gold", "pred", "label", "kind"}``: ``label`` says whether ``pred`` is right, ``kind``
whether it is a final ``answer`` (the default) or a ``completion`` that the answer is taken from.
Programs are rows ``{"completion", "tests", "label", "kind": "code"}``; their verdicts ``crashed``
and ``timed_out`` are wrong ones. Rows are judged one after another in one worker process, which is
started beforehand; times are wall-clock times of single judgements. ``--compare`` judges answers
by math-verify, too.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rewards.code.judge import judge_code
from rewards.math.verify import judge_math, judge_pairs
from rewards.sandbox.choice import sandbox_in_use
from rewards.sandbox.client import SandboxError
from rewards.text.answers import find_answer
from rewards.workers import pool

_SUMMARY = __doc__.split("\n")[0]
NO_VERDICT = {"none", "bad_gold", "bad_tests", "failed"}
KINDS = ("answer", "completion", "code")
PEER = "rewards.math.fallback:judge_as_peer"
IMPORT_LIMIT_S = 120.0


Row = dict[str, Any]  # one JSON object of the file


class RowError(ValueError):
    """A row of the input that cannot be used."""


def read_rows(path: Path) -> list[Row]:
    """Return the labelled rows of a JSONL file; raise ``RowError`` naming the line at fault."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_read_row(line, f"{path.name}, line {number}"))
    if not rows:
        raise RowError(f"{path.name}: no rows")
    return rows


def _read_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError(f"{where}: not an object")
    guess = "code" if "tests" in row else "completion" if "completion" in row else "answer"
    kind = row.setdefault("kind", guess)
    if kind not in KINDS:
        raise RowError(f"{where}: kind is {kind!r}, not one of {', '.join(KINDS)}")
    row.setdefault("pred", row.get("completion"))
    if kind == "code" and "tests" not in row:
        raise RowError(f"{where}: a row of kind 'code' needs 'tests'")
    for key in ("pred",) if kind == "code" else ("gold", "pred"):
        if not isinstance(row.get(key), str):
            raise RowError(f"{where}: {key!r} must be a string")
    if not isinstance(row.get("label"), bool):
        raise RowError(f"{where}: 'label' must be true or false")
    return row


def judge_ours(row: Row) -> str:
    if row["kind"] == "code":
        return judge_code([row["pred"]], [row["tests"]])[0].status
    if row["kind"] == "completion":
        return judge_math([row["pred"]], [row["gold"]])[0].status
    return judge_pairs([(row["pred"], row["gold"])])[0]


def judge_peer(row: Row) -> str:
    """Judge by math-verify; its answer in our words, ``none`` if it could not parse the gold."""
    item = (row["pred"], row["gold"], row["kind"] == "completion")
    (result,) = pool.run_task(PEER, [item])
    if result.status != pool.OK:
        return "timed_out" if result.status == pool.TIMED_OUT else "none"
    return {True: "right", False: "wrong", None: "none"}[result.value]


class Judged(NamedTuple):
    """One row, what it was judged to be, and how long that took."""

    row: Row
    verdict: str
    seconds: float


def judge_rows(rows: list[Row], judge: Callable[[Row], str]) -> list[Judged]:
    """Judge the rows one by one and time each."""
    judged = []
    for row in rows:
        start = time.perf_counter()
        verdict = judge(row)
        judged.append(Judged(row, verdict, time.perf_counter() - start))
    return judged


def summarize(judged: list[Judged]) -> dict[str, float]:
    """Return the figures. A false negative is a row labelled right and not judged right."""
    verdicts = [j.verdict for j in judged]
    seconds = sorted(j.seconds for j in judged)
    return {
        "n": len(judged),
        "positives": sum(j.row["label"] for j in judged),
        "false_negatives": sum(j.row["label"] and j.verdict != "right" for j in judged),
        "false_positives": sum(not j.row["label"] and j.verdict == "right" for j in judged),
        "unparseable": verdicts.count("unparseable"),
        "none": sum(map(is_no_verdict, judged)),
        "timeouts": verdicts.count("timed_out"),
        "pairs_per_s": round(len(judged) / sum(seconds), 1),
        "p50_ms": round(1000 * _percentile(seconds, 0.50), 3),
        "p99_ms": round(1000 * _percentile(seconds, 0.99), 3),
        "max_s": round(seconds[-1], 3),
    }


def summarize_by(judged: list[Judged], field: str | None) -> dict[str, dict[str, float]]:
    """Return the figures of all rows, and of the rows with each value of ``field``."""
    figures = {"": summarize(judged)}
    if field:
        for value in sorted({str(j.row.get(field)) for j in judged}):
            figures[value] = summarize([j for j in judged if str(j.row.get(field)) == value])
    return figures


def is_no_verdict(judged: Judged) -> bool:
    """Say whether the reward would be None. A program that timed out is wrong."""
    is_late = judged.verdict == "timed_out" and judged.row["kind"] != "code"
    return is_late or judged.verdict in NO_VERDICT


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def warm_up(rows: list[Row]) -> None:
    """Start the worker and what it needs before the clock runs."""
    if any(row["kind"] == "code" for row in rows):
        sandbox_in_use()
    if all(row["kind"] == "code" for row in rows):
        return
    pool.run_task(PEER, [("x + 1", "1 + x", False)], limit_s=IMPORT_LIMIT_S)


def print_table(figures: dict[str, dict[str, float]]) -> None:
    """Print one line for each grader, one column for each figure."""
    keys = list(next(iter(figures.values())))
    first = max(len(name) for name in figures)
    print(" " * first + "".join(f"  {key}" for key in keys))
    for name, numbers in figures.items():
        print(name.ljust(first) + "".join(f"  {numbers[key]:>{len(key)}}" for key in keys))


def print_errors(judged: list[Judged], limit: int) -> None:
    wrong = [j for j in judged if (j.verdict == "right") != j.row["label"]]
    for row, verdict, _ in wrong[:limit]:
        answer = row["pred"]
        if row["kind"] == "completion":
            found = find_answer(answer)
            answer = f"...{answer[-60:]} -> {found.answer if found else None}"
        label = "right" if row["label"] else "wrong"
        if row["kind"] == "code":
            print(f"{verdict}, labelled {label}: tests {str(row['tests'])[:80]!r}")
            continue
        print(f"{verdict}, labelled {label}: gold {row['gold'][:80]!r}, pred {answer[:160]!r}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.bench", description=_SUMMARY)
    parser.add_argument("pairs", type=Path, help="JSONL file of labelled pairs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compare", action="store_true", help="judge by math-verify, too")
    parser.add_argument("--by", metavar="FIELD", help="figures for each value of this field, too")
    parser.add_argument("--limit", type=float, default=pool.DEFAULT_LIMIT_S, help="s per item")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong verdicts")
    options = parser.parse_args(argv)
    try:
        rows = read_rows(options.pairs)
    except (OSError, RowError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.compare and any(row["kind"] == "code" for row in rows):
        print("bench: math-verify judges no code; leave out --compare", file=sys.stderr)
        return 2
    pool.configure_workers(num_workers=1, limit_s=options.limit)
    try:
        warm_up(rows)
    except (SandboxError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    judges = {"rewards": judge_ours} | ({"math-verify": judge_peer} if options.compare else {})
    figures: dict[str, dict[str, float]] = {}
    ours: list[Judged] = []
    for name, judge in judges.items():
        judged = judge_rows(rows, judge)
        ours = ours or judged
        for value, numbers in summarize_by(judged, options.by).items():
            figures[f"{name} {value}".strip()] = numbers
    if options.json:
        print(json.dumps(figures if len(figures) > 1 else figures["rewards"]))
    else:
        print_table(figures)
        print_errors(ours, options.show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
