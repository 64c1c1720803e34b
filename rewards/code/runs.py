"""Run a candidate against its tests, in a worker process; the sandbox does the running.

``judge_program`` and ``judge_function`` are tasks of ``rewards.workers.pool``: JSON in, JSON out,
an outcome of the form ``{"status", "passed", "total", "detail"}``. Each worker has a fork-server of
its own, which is started when it is first needed and ends with the worker.
"""

import json
import os
import re
import socket
import time
from typing import Any, TypedDict

from rewards.sandbox.client import (
    Ending,
    Limits,
    SandboxError,
    Server,
    get_server,
    make_memory_file,
)
from rewards.sandbox.inside.protocol import Message


class Outcome(TypedDict):
    status: str
    passed: int
    total: int
    detail: str


RIGHT, WRONG, CRASHED, TIMED_OUT = "right", "wrong", "crashed", "timed_out"
BAD_TESTS, FAILED = "bad_tests", "failed"

_WORD = re.compile(r"[^ \t]+")
_OTHER_BLANK = re.compile(r"[^\S \t\n]")  # white space to str.split, a character like others here


def probe(mechanism: str) -> dict[str, str]:
    """Run a program in the sandbox; return ``{"description"}``, or ``{"error"}`` if it fails."""
    try:
        server = get_server(mechanism)
        ending = run_program(server, "print(int(input()) * 7)", "6\n", Limits(seconds=10))
    except (SandboxError, OSError) as error:
        return {"error": str(error)}
    if ending.code != 0 or ending.output != b"42\n":
        return {"error": f"a program ended with {ending.code} and printed {ending.output[:80]!r}"}
    return {"description": server.description}


def run_program(server: Server, code: str, text: str, limits: Limits) -> Ending:
    """Run ``code`` as a script that reads ``text``; what it prints is in the ending."""
    stdin = make_memory_file(text.encode("utf-8", "surrogatepass"))
    reader, writer = os.pipe()
    try:
        run = server.start("program", {"code": code}, limits, stdin=stdin, stdout=writer)
    except SandboxError:
        os.close(reader)
        raise
    finally:
        os.close(stdin)
        os.close(writer)
    return run.wait(reader)


def judge_program(
    mechanism: str,
    code: str,
    inputs: list[str],
    outputs: list[str],
    limits: list[Any],
    stop: bool,
    budget_s: float,
) -> Outcome:
    """Run a program on every input and compare what it prints; ``stop`` at the first failure."""
    server, most = get_server(mechanism), Limits(*limits)
    deadline = time.monotonic() + budget_s
    passed = 0
    first: tuple[str, str] | None = None
    for number, (text, expected) in enumerate(zip(inputs, outputs), 1):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            first = first or (TIMED_OUT, f"no time left for test {number}")
            break
        num_bytes = len(expected.encode("utf-8", "surrogatepass"))
        one = most._replace(
            seconds=min(most.seconds, left_s), output_bytes=max(most.output_bytes, 2 * num_bytes)
        )
        failure = _compare(run_program(server, code, text, one), expected)
        passed += failure is None
        if failure and first is None:
            first = (failure[0], f"test {number}: {failure[1]}")
            if stop:
                break
    status, detail = first or (RIGHT, "")
    return {"status": status, "passed": passed, "total": len(inputs), "detail": detail}


def _compare(ending: Ending, expected: str) -> tuple[str, str] | None:
    """Return the status and reason of a failure, None if the program did as expected."""
    if ending.timed_out:
        return TIMED_OUT, "out of time"
    if ending.overflowed:
        return CRASHED, "too much output"
    if ending.code != 0:
        return CRASHED, f"exit status {ending.code}"
    printed = ending.output.decode("utf-8", "replace")
    return None if is_same_output(printed, expected) else (WRONG, "wrong output")


def is_same_output(printed: str, expected: str) -> bool:
    """Compare two outputs line by line, spaces and tabs around and between words aside.

    Lines end with a newline, with or without a carriage return, and nothing else; blank ones at the
    ends do not count. Words are compared as text; where the expected one is a decimal fraction, a
    number within 1e-6 (absolute or relative) will do, as contests have it, and within 1e-12 if it
    is itself below 1e-6.
    """
    if printed == expected:
        return True
    lines, wanted = _split(printed), _split(expected)
    return len(lines) == len(wanted) and all(map(_is_same_line, lines, wanted))


def _split(text: str) -> list[list[str]]:
    text = text.replace("\r\n", "\n").strip(" \t\n")
    lines = text.split("\n")
    if _OTHER_BLANK.search(text):
        return [_WORD.findall(line) for line in lines]
    return [line.split() for line in lines]


def _is_same_line(words: list[str], wanted: list[str]) -> bool:
    return len(words) == len(wanted) and all(map(_is_same_word, words, wanted))


def _is_same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if "." not in wanted or "_" in word or len(word) > 400 or not word.isascii():
        return False
    try:
        number, goal = float(word), float(wanted)
    except ValueError:
        return False
    is_tiny = 0 < abs(goal) < 1e-6
    return abs(number - goal) <= (1e-12 if is_tiny else 1e-6 * max(1.0, abs(goal)))


def judge_function(
    mechanism: str, code: str, tests: Message, num_asserts: int, limits: list[Any], stop: bool
) -> Outcome:
    """Run the tests' code in one process and the candidate in another, connected by a socket."""
    server, most = get_server(mechanism), Limits(*limits)
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    runs = []
    try:
        candidate = server.start("candidate", {"code": code}, most, channel=ours.fileno())
        runs.append(candidate)
        payload = {**tests, "stop_at_failure": stop}
        # Its limit ends later, so that a hanging candidate times out first.
        patient = most._replace(seconds=most.seconds + 0.5)
        checker = server.start("checker", payload, patient, channel=theirs.fileno(), report=writer)
        runs.append(checker)
    finally:
        ours.close()
        theirs.close()
        os.close(writer)
    try:
        ending = checker.wait(reader)
        report = _read_report(ending)
        # Its channel is closed: it has ended or is about to time out.
        candidate_ending = candidate.wait() if report.get("gone") else None
    finally:
        for run in runs:
            run.stop()
    status = _name_status(ending, report, candidate_ending)
    done = report.get("passed", 0) + report.get("failed", 0)
    total = max(num_asserts, done + (not report.get("completed")))
    passed = total if status == RIGHT else report.get("passed", 0)
    detail = report.get("bad_tests") or report.get("error") or ""
    return {"status": status, "passed": passed, "total": total, "detail": detail}


def _read_report(ending: Ending) -> Message:
    report: Message = json.loads(ending.output) if ending.output and ending.code == 0 else {}
    return report


def _name_status(ending: Ending, report: Message, candidate: Ending | None) -> str:
    if report.get("bad_tests"):
        return BAD_TESTS
    if report.get("completed") and not report["failed"] and not report["gone"]:
        return RIGHT
    if ending.timed_out or (candidate and candidate.timed_out):
        return TIMED_OUT
    return CRASHED if candidate or not report.get("started") else WRONG
