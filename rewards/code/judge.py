"""Judge programs by running them. How they are confined is in ``rewards.sandbox.client``."""

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rewards.code.spec import BadTestsError, FunctionTests, ProgramTests, read_tests
from rewards.sandbox.choice import find_mechanism
from rewards.sandbox.client import Limits
from rewards.text.completions import Completion, completion_text
from rewards.workers import pool

RIGHT, WRONG, UNPARSEABLE, CRASHED = "right", "wrong", "unparseable", "crashed"
TIMED_OUT, BAD_TESTS, FAILED = "timed_out", "bad_tests", "failed"
CODE_STATUSES = (RIGHT, WRONG, UNPARSEABLE, CRASHED, TIMED_OUT, BAD_TESTS, FAILED)
REQUIREMENTS = ("all", "fraction")

MAX_BUDGET = 12  # a completion's time, in limits of a single run, however many tests there are
GRACE_S = 90.0  # for starting a fork-server; the sandbox keeps the clock of what it runs

_logger = logging.getLogger(__name__)


class CodeVerdict(NamedTuple):
    """The judgement of one completion.

    status: ``right`` (it passes every test); ``wrong``; ``unparseable`` (no code was found);
        ``crashed`` (it raised, ended early or broke a limit other than time); ``timed_out``;
        ``bad_tests`` (the tests cannot be used); ``failed`` (a defect of the judge, logged).
    passed, total: tests, as far as they were counted.
    detail: what went wrong first, for people.
    """

    status: str
    passed: int = 0
    total: int = 0
    detail: str = ""

    @property
    def score(self) -> float | None:
        """1.0 if right; 0.0 if not, whatever the reason; None if it cannot be judged."""
        return None if self.status in (BAD_TESTS, FAILED) else float(self.status == RIGHT)

    @property
    def fraction(self) -> float | None:
        """The share of tests that it passes, 1.0 only if right; None if it cannot be judged."""
        if self.score is None or self.status == RIGHT or not self.total:
            return self.score
        return min(self.passed, self.total - 1) / self.total


def code_passes(
    completions: Sequence[Completion],
    tests: Sequence[object],
    *,
    require: str = "all",
    limit_s: float | None = None,
    memory_mb: int = Limits().memory_mb,
    **kwargs: object,
) -> list[float | None]:
    """Return 1.0 where a completion's code passes the row's ``tests``, else 0.0.

    ``completions`` are strings or message lists, ``tests`` is the dataset's column, one per
    completion: a dict, or JSON of one. ``rewards.code.spec.read_tests`` says which forms there
    are, ``rewards.code.extract`` which part of a completion is its code. With
    ``require="fraction"`` the reward is the share of tests passed: of inputs, or of asserts.
    ``limit_s`` is wall-clock seconds for each run of the program (a function's tests are one run),
    by default the workers' limit of 5 s; ``memory_mb`` is its address space. Settings are bound
    by ``functools.partial``. Other keyword arguments are ignored.

    0.0 also where there is no code, or it crashes or runs out of time. None where the tests cannot
    be used (missing, not JSON, not of a known form): see ``judge_code`` for the reason.

    Raises ``ValueError`` if the lists differ in length, ``TypeError`` naming the row if a
    completion is of another type, and ``rewards.SandboxError`` if no sandbox works here: model
    code is never run unconfined unless ``configure_sandbox("none")`` or ``REWARDS_SANDBOX=none``
    says so.
    """
    if require not in REQUIREMENTS:
        raise ValueError(f"require is {require!r}, not one of {', '.join(REQUIREMENTS)}")
    verdicts = judge_code(completions, tests, require=require, limit_s=limit_s, memory_mb=memory_mb)
    return [v.score if require == "all" else v.fraction for v in verdicts]


def judge_code(
    completions: Sequence[Completion],
    tests: Sequence[object],
    *,
    require: str = "all",
    limit_s: float | None = None,
    memory_mb: int = Limits().memory_mb,
    **kwargs: object,
) -> list[CodeVerdict]:
    """Judge completions as ``code_passes`` does, and say how each came out.

    With ``require="all"`` a completion's tests end at the first failure, so that ``passed`` counts
    those before it.
    """
    if len(completions) != len(tests):
        raise ValueError(f"{len(completions)} completions but {len(tests)} tests")
    limits = Limits(pool.get_limit() if limit_s is None else limit_s, memory_mb)
    if min(limits.seconds, limits.memory_mb) <= 0:
        raise ValueError(f"limit_s and memory_mb must be positive, not {limit_s} and {memory_mb}")
    rows = [_read_row(c, t, row) for row, (c, t) in enumerate(zip(completions, tests))]
    # Samples of one problem repeat each other: duplicates are judged once.
    texts = list(dict.fromkeys(row for row in rows if isinstance(row, _Text)))
    programs = dict(zip(texts, _find_programs(texts), strict=True))
    jobs = list(dict.fromkeys(p for p in programs.values() if isinstance(p, _Program)))
    judged = dict(zip(jobs, _judge_programs(jobs, limits, require == "all"), strict=True))
    found = [programs[row] if isinstance(row, _Text) else row for row in rows]
    return [judged[each] if isinstance(each, _Program) else each for each in found]


def count_code_verdicts(verdicts: Iterable[CodeVerdict]) -> dict[str, int]:
    """Count verdicts by status, every status included, for logging."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {status: counts[status] for status in CODE_STATUSES}


class _Text(NamedTuple):
    text: str
    tests: FunctionTests | ProgramTests


class _Program(NamedTuple):
    code: str
    tests: FunctionTests | ProgramTests


def _read_row(completion: Completion, tests: object, row: int) -> _Text | CodeVerdict:
    try:
        text = completion_text(completion)
    except TypeError as error:
        raise TypeError(f"row {row}: {error}") from error
    try:
        return _Text(text, _read_tests(tests) if isinstance(tests, str) else read_tests(tests))
    except BadTestsError as error:
        return CodeVerdict(BAD_TESTS, detail=str(error))


def _find_programs(texts: list[_Text]) -> list[_Program | CodeVerdict]:
    """Extract the programs in the workers: a hostile text may hang or crash a parser."""
    items = [(text, tests.called, tests.prompt, tests.setup) for text, tests in texts]
    results = pool.run_task("rewards.code.extract:extract_code", items)
    programs: list[_Program | CodeVerdict] = []
    for (_, tests), result in zip(texts, results, strict=True):
        if result.status == pool.FAILED:
            programs.append(_read_result(result))
        elif result.value is None:  # also where a worker died of the text
            programs.append(CodeVerdict(UNPARSEABLE))
        else:
            programs.append(_Program(result.value, tests))
    return programs


@functools.lru_cache(maxsize=64)  # a group's completions have the same tests
def _read_tests(tests: str) -> FunctionTests | ProgramTests:
    return read_tests(tests)


def _judge_programs(jobs: list[_Program], limits: Limits, stop: bool) -> list[CodeVerdict]:
    if not jobs:
        return []
    mechanism = find_mechanism()
    verdicts: dict[int, CodeVerdict] = {}
    made = [_make_item(job, limits, stop) for job in jobs]
    for path in sorted({path for path, _ in made}):
        chosen = [index for index, (task, _) in enumerate(made) if task == path]
        items = [(mechanism, *made[index][1]) for index in chosen]
        seconds = MAX_BUDGET * limits.seconds + GRACE_S
        results = pool.run_task(path, items, seconds)
        verdicts |= {index: _read_result(result) for index, result in zip(chosen, results)}
    return [verdicts[index] for index in range(len(jobs))]


def _make_item(job: _Program, limits: Limits, stop: bool) -> tuple[str, tuple[object, ...]]:
    """The task that judges a program, and its arguments after the sandbox's name."""
    tests = job.tests
    if isinstance(tests, FunctionTests):
        given = tests._asdict()
        del given["setup"]  # extraction has already added it
        return "rewards.code.runs:judge_function", (
            job.code, given, tests.num_asserts, limits, stop,
        )  # fmt: skip
    budget_s = limits.seconds * min(MAX_BUDGET, len(tests.inputs))
    return "rewards.code.runs:judge_program", (
        job.code, tests.inputs, tests.outputs, limits, stop, budget_s,
    )  # fmt: skip


def _read_result(result: pool.Result) -> CodeVerdict:
    if result.status == pool.OK:
        return CodeVerdict(**result.value)
    message = str(result.value or f"a worker {result.status}")
    report_failure(message)
    return CodeVerdict(FAILED, detail=message)


@functools.cache  # each message once
def report_failure(message: str) -> None:
    _logger.error("a program could not be judged: %s", message)
