"""Judge mathematical answers. ``rewards.math.grading`` defines what counts as equal."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from rewards.math.normalize import spell
from rewards.math.numbers import parse_number
from rewards.text.answers import Extraction, find_answer
from rewards.text.completions import Completion, completion_text
from rewards.text.units import WORDS
from rewards.workers.pool import (
    CRASHED,
    FAILED,
    OK,
    TIMED_OUT,
    Result,
    get_limit,
    preload,
    run_task,
)

RIGHT, WRONG, UNPARSEABLE = "right", "wrong", "unparseable"
BAD_GOLD, UNREAD_GOLD = "bad_gold", "unread_gold"
STATUSES = (RIGHT, WRONG, UNPARSEABLE, TIMED_OUT, BAD_GOLD, FAILED)

# Longer answers and golds can only be equal by being the same text.
MAX_CHARS = 20_000
MAX_SYMBOLIC_CHARS = 400
MAX_SYMBOLIC_DEPTH = 20

_MARK_RUN = re.compile(r"([^\w\s])\1{15}")
# Signs of a worked solution in place of an answer: sentences and a conclusion.
_PROSE_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
_SENTENCE_BREAK = re.compile(r"\n|[.!?]\s+\S|[。！？]\s*\S")
_FINAL_MARK = re.compile(r"\\boxed|\banswer\b|\btherefore\b|\bhence\b|答案|所以", re.IGNORECASE)

# Status by (text, gold).
Statuses = dict[tuple[str, str], str]

_AMOUNT = re.compile(r"(-?\d[\d,]*(?:\.\d+)?) ([a-z]{3,})")

_logger = logging.getLogger(__name__)

preload("rewards.math.grading")


class Verdict(NamedTuple):
    """The judgement of one completion.

    status: ``right``; ``wrong``; ``unparseable`` (no answer stated, or none that can be read);
        ``timed_out`` (the judge exceeded its time or memory); ``bad_gold`` (missing, a whole
        worked solution, or not readable and not the same text as the answer); ``failed``
        (a defect of the judge, logged).
    answer: the final answer that was found in the completion, None if there is none.
    """

    status: str
    answer: str | None = None

    @property
    def score(self) -> float | None:
        """1.0 if right, 0.0 if wrong or unparseable, None if it cannot be judged."""
        if self.status in (TIMED_OUT, BAD_GOLD, FAILED):
            return None
        return float(self.status == RIGHT)


def grade_answer(answer: str, gold: str) -> bool | None:
    """Say whether a final answer equals the gold answer; None if that cannot be judged.

    None means that the gold is empty or unreadable, or that the judge ran out of time or memory;
    an unreadable answer is False. Both are taken as they are: nothing is extracted from prose.

    In short (``rewards.math.grading`` has all of the conventions with their reasons): values are
    compared exactly; a decimal answer passes for an exact gold only as its correct rounding to
    at least 4 significant digits, so 0.33 is not 1/3, but 1/3 is right for the gold 0.33; a percent
    sign, degree sign, unit or currency on one side only does not count; tuples, vectors and
    intervals are ordered, lists and sets are not; ``x = 3`` says 3.

    Safe to call from any thread. Raises ``TypeError`` unless both are strings, and
    ``rewards.workers.pool.WorkerError`` if worker processes cannot be started.
    """
    for name, value in (("answer", answer), ("gold", gold)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    status = judge_pairs([(answer, gold)])[0]
    return None if status in (TIMED_OUT, BAD_GOLD, FAILED) else status == RIGHT


def math_correct(
    completions: Sequence[Completion], answer: Sequence[str | None], **kwargs: object
) -> list[float | None]:
    """Return 1.0 where a completion's final answer equals the row's ``answer``, else 0.0.

    ``completions`` are strings or message lists, ``answer`` is the dataset's column of golds, one
    per completion (numbers are taken as their text). None where the gold is missing or cannot be
    read, or the judge timed out. Other keyword arguments are ignored.

    Raises ``ValueError`` if the lists differ in length, ``TypeError`` naming the row if a
    completion or gold is of another type.
    """
    return [verdict.score for verdict in judge_math(completions, answer)]


def judge_math(
    completions: Sequence[Completion], answer: Sequence[str | None], **kwargs: object
) -> list[Verdict]:
    """Judge completions as ``math_correct`` does, and say how each came out.

    A completion that boxes several answers is right if together they are the gold, all of them in
    their order or those that stand side by side at the end, or if each of them is: hedging is not
    rewarded.
    """
    if len(completions) != len(answer):
        raise ValueError(f"{len(completions)} completions but {len(answer)} gold answers")
    golds = [_read_gold(gold, row) for row, gold in enumerate(answer)]
    found = [_find_answer(completion, row) for row, completion in enumerate(completions)]
    pairs: Statuses = {}
    rows = list(zip(found, golds, strict=True))
    _judge_new(pairs, [(e, gold, (e.answer, *e.others)) for e, gold in rows if e and gold])
    # Boxes that differ may each be all of the answer, or be its parts together.
    unsettled = [
        (e, gold, _list_ways(e, gold))
        for e, gold in rows
        if e and gold and (e.parts or e.others or e.option) and not _is_right(e, gold, pairs)
    ]
    _judge_new(pairs, unsettled)
    return [_conclude(e, gold, pairs) for e, gold in rows]


def _judge_new(pairs: Statuses, rows: Iterable[tuple[Extraction, str, Sequence[str]]]) -> None:
    """Judge the texts of each row against its gold, each pair once."""
    asked = dict.fromkeys((text, gold) for _, gold, texts in rows for text in texts)
    new = [pair for pair in asked if pair not in pairs]
    pairs.update(zip(new, judge_pairs(new), strict=True))


def count_verdicts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Count verdicts by status, every status included, for logging."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {status: counts[status] for status in STATUSES}


def judge_pairs(pairs: Sequence[tuple[str, str]], limit_s: float | None = None) -> list[str]:
    """Judge ``(answer, gold)`` pairs; return a status for each.

    ``limit_s`` is the wall-clock limit for each pair, by default that of the worker pool.
    """
    quick = [judge_quickly(answer, gold) for answer, gold in pairs]
    statuses = [status or "" for status in quick]
    slow = [index for index, status in enumerate(quick) if status is None]
    results = run_task(
        "rewards.math.grading:judge_answer", [pairs[index] for index in slow], limit_s
    )
    for index, result in zip(slow, results, strict=True):
        statuses[index] = _read_result(result)
        if statuses[index] == UNREAD_GOLD:
            statuses[index] = _judge_symbolically(pairs[index], limit_s, result.seconds)
    for index, (_, gold) in enumerate(pairs):
        if statuses[index] in (WRONG, UNPARSEABLE) and is_worked_solution(gold):
            statuses[index] = BAD_GOLD
    return statuses


def _read_result(result: Result) -> str:
    if result.status == OK:
        return str(result.value)
    if result.status == TIMED_OUT or result.status == CRASHED:
        return TIMED_OUT
    _report_failure(str(result.value))
    return FAILED


@functools.cache  # each message once
def _report_failure(message: str) -> None:
    _logger.error("the judge failed, which is a defect of rewards: %s", message)


def _judge_symbolically(pair: tuple[str, str], limit_s: float | None, spent_s: float) -> str:
    """Ask math-verify about a gold that our grammar cannot parse, within the time left.

    Only its yes counts: an unreadable gold makes no answer wrong.
    """
    left_s = (limit_s or get_limit()) - spent_s
    gold = pair[1]
    if left_s <= 0 or _is_broken(gold) or max(map(len, pair)) > MAX_SYMBOLIC_CHARS:
        return BAD_GOLD
    (result,) = run_task("rewards.math.fallback:judge_symbolically", [pair], left_s)
    return RIGHT if result.status == OK and result.value else BAD_GOLD


def _is_broken(gold: str) -> bool:
    """Say whether a gold cannot be mathematics: brackets that do not balance, one mark in a row."""
    if _MARK_RUN.search(gold):
        return True
    depth = deepest = 0
    for char in gold:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, abs(depth))
    return depth != 0 or deepest > MAX_SYMBOLIC_DEPTH


def judge_quickly(answer: str, gold: str) -> str | None:
    """Judge a pair at a cost linear in its length, in the caller's process; None if unable."""
    if not gold.strip():
        return BAD_GOLD
    if not answer.strip():
        return UNPARSEABLE
    if answer.strip() == gold.strip():
        return RIGHT
    if len(gold) > MAX_CHARS:
        return BAD_GOLD
    if len(answer) > MAX_CHARS:
        return UNPARSEABLE
    wanted = parse_number(gold)
    given = None if wanted is None else parse_number(answer)
    if given is None and wanted is not None and "$" not in gold:
        given = _read_amount(answer)
    if given is not None and wanted == given:
        return RIGHT
    if spell(answer) == spell(gold):
        return RIGHT
    # A fraction may have been rounded to the other: that takes a closer look at both.
    is_fraction = "/" in gold + answer or "frac" in gold + answer
    return None if given is None or is_fraction else WRONG


def _read_amount(text: str) -> Fraction | None:
    """Return the number of an amount in words ("18 dollars"): its unit alone never counts."""
    amount = _AMOUNT.fullmatch(text)
    is_unit = amount and amount[2] not in ("percent", "pct") and amount[2] in WORDS
    return parse_number(amount[1]) if amount and is_unit else None


def _read_gold(gold: object, row: int) -> str:
    if gold is None:
        return ""
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise TypeError(f"row {row}: a gold answer is a string, not {type(gold).__name__}")
    return str(gold)


def _find_answer(completion: Completion, row: int) -> Extraction | None:
    try:
        return find_answer(completion_text(completion))
    except TypeError as error:
        raise TypeError(f"row {row}: {error}") from error


def _list_ways(extraction: Extraction, gold: str) -> list[str]:
    """The texts that may be all of a gold beside the answer; several are never one number."""
    if parse_number(gold) is not None:
        return list(extraction.parts)
    return [*extraction.parts, *filter(None, (extraction.together, extraction.option))]


def _is_right(extraction: Extraction, gold: str, statuses: Statuses) -> bool:
    def are_right(*texts: str) -> bool:
        return all(statuses.get((text, gold)) == RIGHT for text in texts)

    answer, others, parts, together, option = extraction
    if option and are_right(option):
        return True
    agree = are_right(answer) or bool(parts and are_right(*parts))
    return (agree and are_right(*others)) or bool(together and are_right(together))


def _conclude(extraction: Extraction | None, gold: str, statuses: Statuses) -> Verdict:
    if not gold.strip() or (extraction is None and is_worked_solution(gold)):
        return Verdict(BAD_GOLD, extraction.answer if extraction else None)
    if extraction is None:
        return Verdict(UNPARSEABLE)
    status = statuses[extraction.answer, gold]
    if not (extraction.others or extraction.parts or extraction.option):
        return Verdict(status, extraction.answer)
    if _is_right(extraction, gold, statuses):
        return Verdict(RIGHT, extraction.answer)
    return Verdict(WRONG if status == RIGHT else status, extraction.answer)


def is_worked_solution(gold: str) -> bool:
    """Say whether a gold is a whole solution in place of its final answer.

    Compared as words it would make every answer wrong, so it is a bad gold.
    """
    if gold.rpartition("####")[0].strip():
        return True
    num_words = len(_PROSE_WORD.findall(gold)) if len(gold) > 30 else 0
    if num_words < 5 or not _SENTENCE_BREAK.search(gold):
        return False
    return num_words >= 12 or bool(_FINAL_MARK.search(gold))
