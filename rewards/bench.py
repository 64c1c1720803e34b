"""Measure the graders on labelled pairs: how often they are wrong, and how fast they are.

    python -m rewards.bench PAIRS.jsonl [--json] [--compare] [--limit SECONDS] [--show N]

Rows are ``{"gold", "pred", "label", "kind"}``: ``label`` says whether ``pred`` is right, ``kind``
whether it is a final ``answer`` (the default) or a ``completion`` that the answer is taken from.
Rows are judged one after another in one worker process, which is started beforehand; times are
wall-clock times of single judgements. ``--compare`` judges the same rows by math-verify too.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rewards import workers
from rewards.extract import find_answer
from rewards.mathematics import judge_math, judge_pairs

KINDS = ("answer", "completion")
PEER = "rewards.symbolic:judge_as_peer"
IMPORT_LIMIT_S = 120.0


class RowError(ValueError):
    """A row of the input that cannot be used."""


def read_rows(path: Path) -> list[dict]:
    """Return the labelled rows of a JSONL file; raise ``RowError`` naming the line at fault."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_read_row(line, f"{path.name}, line {number}"))
    if not rows:
        raise RowError(f"{path.name}: no rows")
    return rows


def _read_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError(f"{where}: not an object")
    kind = row.setdefault("kind", "completion" if "completion" in row else "answer")
    if kind not in KINDS:
        raise RowError(f"{where}: kind is {kind!r}, not one of {', '.join(KINDS)}")
    row.setdefault("pred", row.get("completion"))
    for key in ("gold", "pred"):
        if not isinstance(row.get(key), str):
            raise RowError(f"{where}: {key!r} must be a string")
    if not isinstance(row.get("label"), bool):
        raise RowError(f"{where}: 'label' must be true or false")
    return row


def judge_ours(row: dict) -> str:
    if row["kind"] == "completion":
        return judge_math([row["pred"]], [row["gold"]])[0].status
    return judge_pairs([(row["pred"], row["gold"])])[0]


def judge_peer(row: dict) -> str:
    """Judge by math-verify; its answer in our words, ``none`` if it could not parse the gold."""
    item = (row["pred"], row["gold"], row["kind"] == "completion")
    (result,) = workers.run_task(PEER, [item])
    if result.status != workers.OK:
        return "timed_out" if result.status == workers.TIMED_OUT else "none"
    return {True: "right", False: "wrong", None: "none"}[result.value]


def measure(rows: list[dict], judge: Callable[[dict], str]) -> tuple[dict, list[str]]:
    """Judge every row; return the measurements and the verdicts."""
    verdicts, seconds = [], []
    for row in rows:
        start = time.perf_counter()
        verdicts.append(judge(row))
        seconds.append(time.perf_counter() - start)
    wrong = [(row["label"], v) for row, v in zip(rows, verdicts, strict=True)]
    ordered = sorted(seconds)
    return {
        "n": len(rows),
        "positives": sum(row["label"] for row in rows),
        "false_negatives": sum(label and verdict != "right" for label, verdict in wrong),
        "false_positives": sum(not label and verdict == "right" for label, verdict in wrong),
        "unparseable": verdicts.count("unparseable"),
        "none": sum(v in ("none", "bad_gold", "timed_out", "failed") for v in verdicts),
        "timeouts": verdicts.count("timed_out"),
        "pairs_per_s": round(len(rows) / sum(seconds), 1),
        "p50_ms": round(1000 * _percentile(ordered, 0.50), 3),
        "p99_ms": round(1000 * _percentile(ordered, 0.99), 3),
        "max_s": round(ordered[-1], 3),
    }, verdicts


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def warm_up(compare: bool) -> None:
    """Start the worker and let it import what it needs, so that no row pays for that."""
    judge_pairs([("x + 1", "1 + x")])
    if compare:
        item = ("x + 1", "1 + x", False)
        workers.run_task(PEER, [item], limit_s=IMPORT_LIMIT_S)


def print_table(results: dict[str, dict]) -> None:
    names = list(results)
    keys = list(results[names[0]])
    width = max(len(name) for name in names) + 2
    print(" " * 18 + "".join(name.rjust(width) for name in names))
    for key in keys:
        print(key.ljust(18) + "".join(str(results[name][key]).rjust(width) for name in names))


def print_errors(rows: list[dict], verdicts: list[str], limit: int) -> None:
    wrong = [(r, v) for r, v in zip(rows, verdicts, strict=True) if (v == "right") != r["label"]]
    for row, verdict in wrong[:limit]:
        answer = row["pred"]
        if row["kind"] == "completion":
            found = find_answer(answer)
            answer = f"...{answer[-60:]} -> {found.answer if found else None}"
        label = "right" if row["label"] else "wrong"
        print(f"{verdict}, labelled {label}: gold {row['gold'][:80]!r}, pred {answer[:160]!r}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rewards.bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("pairs", type=Path, help="JSONL file of labelled pairs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compare", action="store_true", help="judge by math-verify, too")
    parser.add_argument("--limit", type=float, default=workers.DEFAULT_LIMIT_S, help="s per item")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong verdicts")
    options = parser.parse_args(argv)
    try:
        rows = read_rows(options.pairs)
    except (OSError, RowError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    workers.configure_workers(num_workers=1, limit_s=options.limit)
    warm_up(options.compare)
    results = {}
    results["rewards"], verdicts = measure(rows, judge_ours)
    if options.compare:
        results["math-verify"], _ = measure(rows, judge_peer)
    if options.json:
        print(json.dumps(results if options.compare else results["rewards"]))
    else:
        print_table(results)
        print_errors(rows, verdicts, options.show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
