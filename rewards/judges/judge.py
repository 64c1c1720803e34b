"""A reward by a model behind an OpenAI-compatible endpoint, for what no rule can judge.

R1's second RL stage rewards helpfulness so (arXiv:2501.12948, section 2.3.4: only the final summary
is judged). Nothing is asked twice: answers are kept in a file by the content of the request, and a
resumed run gets equal rewards. None is doubt: no grade in the reply, one outside the scale, a
refusal, a reply that was cut, samples that disagree.
"""

import asyncio
import hashlib
import json
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.judges.agreement import Agreement, compare_grades, read_labelled
from rewards.judges.endpoint import Endpoint, EndpointError
from rewards.judges.prompt import (
    Prompt,
    Scale,
    find_answer,
    make_messages,
    read_score,
    write_request,
)
from rewards.judges.record import RequestRecord, Spent
from rewards.judges.settings import OPTIONS, JudgeBudgetError, JudgeError, JudgeSettings
from rewards.text.completions import Completion

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

TEMPLATE_TOKENS = 100
"""A chat template's own, at most: a token of the texts has at least one byte."""

REFUSED = (400, 413, 422)
"""A server that answers others says so of a text too long for it, or that its filter does not let
pass: that is doubt. From one that has never answered it is a mistake in the settings."""


class Connection:
    """What belongs to one event loop."""

    def __init__(self, client: "AsyncOpenAI", max_concurrency: int):
        self.client = client
        self.slots = asyncio.Semaphore(max_concurrency)
        self.changed = asyncio.Condition()
        self.num_running = 0
        self.asking: dict[str, asyncio.Task[float | None]] = {}


class Judge:
    """Grades answers. Raises JudgeError for a key, rubric or file that is not there."""

    def __init__(self, settings: JudgeSettings):
        self.settings, self.scale = settings, Scale(*settings.scale)
        self.rubric = read_rubric(settings.rubric)
        width = self.scale.high - self.scale.low
        self.tolerance = width / 5 if settings.tolerance is None else settings.tolerance
        try:
            self.endpoint = Endpoint(settings, "judge")
            self.labelled = (
                read_labelled(Path(settings.labelled), *self.scale) if settings.labelled else []
            )
        except (EndpointError, ValueError) as error:
            raise JudgeError(str(error)) from None
        self._record: RequestRecord | None = None
        self._connections: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Connection] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def record(self) -> RequestRecord:
        """Opened when first needed: whoever only checks the settings writes nothing."""
        if self._record is None:
            try:
                self._record = RequestRecord(Path(self.settings.cache))
            except OSError as error:
                raise JudgeError(f"cache: {error}") from None
        return self._record

    async def grade(
        self, prompts: Iterable[Prompt], completions: Iterable[Completion]
    ) -> list[float | None]:
        """A grade within the scale, or None, for each. What was asked is answered and kept before
        an error is raised."""
        pairs = zip(prompts, completions, strict=True)
        asking = [self._grade(write_request(p), find_answer(c)) for p, c in pairs]
        results = await asyncio.gather(*asking, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def _grade(self, request: str, answer: str) -> float | None:
        if not answer:
            return self.scale.low  # cut while thinking, or nothing said
        messages = make_messages(self.rubric, self.scale, request, answer)
        numbers = range(self.settings.samples)
        asking = [self._find_or_ask(messages, number) for number in numbers]
        results = await asyncio.gather(*asking, return_exceptions=True)
        scores = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            if result is None:
                return None
            scores.append(result)
        if max(scores) - min(scores) > self.tolerance:
            return None
        return sum(scores) / len(scores)

    async def _find_or_ask(self, messages: list[dict[str, str]], number: int) -> float | None:
        """One sample's grade. Equal answers, of a group that agrees, are asked for once."""
        text = json.dumps([self.settings.identity, messages, number])
        key = hashlib.sha256(text.encode()).hexdigest()
        if found := self.record.find(key):
            return found.score
        connection = self._connect()
        if key not in connection.asking:
            task = asyncio.create_task(self._ask(connection, key, messages))
            connection.asking[key] = task
            task.add_done_callback(lambda _: connection.asking.pop(key))
        return await connection.asking[key]

    def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            connection = Connection(self.endpoint.open(), self.settings.max_concurrency)
            self._connections[loop] = connection
        return self._connections[loop]

    async def _ask(
        self, connection: Connection, key: str, messages: list[dict[str, str]]
    ) -> float | None:
        settings = self.settings
        given = {} if settings.temperature is None else {"temperature": settings.temperature}
        async with connection.slots:
            number = await self._reserve(connection, key, messages)
            try:
                answer = await self.endpoint.complete(
                    connection.client,
                    messages,
                    {},
                    max_completion_tokens=settings.max_completion_tokens,
                    seed=int(key[:7], 16),
                    **given,
                )
                return self._book(number, answer, messages)
            except EndpointError as error:
                if error.status in REFUSED and self.record.has_answers(settings.account):
                    self.record.answer(number, None, str(error), (0, 0), 0.0)
                    return None
                self.record.drop(number)
                raise JudgeError(f"{error}; answers are kept") from None
            finally:
                async with connection.changed:
                    connection.num_running -= 1
                    connection.changed.notify_all()

    async def _reserve(
        self, connection: Connection, key: str, messages: list[dict[str, str]]
    ) -> int:
        """The number under which the request is booked at its highest price. Waits while others
        run that may cost less than was booked for them."""
        settings = self.settings
        most = settings.price(count_most_tokens(messages), settings.max_completion_tokens)
        budget = (settings.max_requests, settings.max_cost)
        async with connection.changed:
            while (number := self.record.reserve(key, settings.account, most, *budget)) is None:
                if not connection.num_running:
                    raise JudgeBudgetError(self._describe_budget())
                await connection.changed.wait()
            connection.num_running += 1
        return number

    def _describe_budget(self) -> str:
        settings = self.settings
        spent = self.record.add_up(settings.account)
        limits = {"max_requests": settings.max_requests, "max_cost": settings.max_cost}
        text = ", ".join(f"{name} {limit:g}" for name, limit in limits.items() if limit is not None)
        return (
            f"the judge's budget is used up ({text}): {spent.requests} requests, cost "
            f"{spent.cost:.4g}; raise it, and the same command resumes and asks nothing twice"
        )

    def _book(
        self, number: int, answer: "ChatCompletion", messages: list[dict[str, str]]
    ) -> float | None:
        choice, usage = answer.choices[0], answer.usage
        reply = choice.message.content or ""
        score = None
        if choice.finish_reason == "stop" and not choice.message.refusal:
            score = read_score(reply, self.scale)
        tokens = (count_most_tokens(messages), self.settings.max_completion_tokens)
        if usage is not None:
            tokens = (usage.prompt_tokens, usage.completion_tokens)
        cost = self.settings.price(*tokens)
        self.record.answer(number, score, reply, tokens if usage is not None else (0, 0), cost)
        return score

    def count_spent(self) -> Spent:
        """The account's."""
        path = Path(self.settings.cache)
        if not path.exists():
            return Spent(0, 0, 0, 0.0)
        record = RequestRecord(path)  # another thread may be asking
        try:
            return record.add_up(self.settings.account)
        finally:
            record.close()

    async def measure_agreement(self) -> Agreement:
        """With the labelled rows."""
        rows = self.labelled
        grades = await self.grade(
            [row["prompt"] for row in rows], [row["completion"] for row in rows]
        )
        return compare_grades([row["score"] for row in rows], grades, self.tolerance)


def count_most_tokens(messages: Iterable[Mapping[str, str]]) -> int:
    return TEMPLATE_TOKENS + sum(len(message["content"].encode()) for message in messages)


def read_rubric(text: str) -> str:
    if text.endswith((".md", ".txt")) and "\n" not in text:
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise JudgeError(f"rubric: {text}: {error.strerror}") from None
    if not text.strip():
        raise JudgeError("rubric: it is empty")
    return text


_judges: dict[str, Judge] = {}


def find_judge(options: Mapping[str, Any]) -> Judge:
    """One for the same options, with its connections. Raises JudgeError."""
    missing = [name for name in ("base_url", "model", "rubric") if name not in options]
    if missing:
        raise JudgeError(f"option {missing[0]} is missing")
    key = repr(sorted(options.items()))
    if key not in _judges:
        _judges[key] = Judge(JudgeSettings(**options))
    return _judges[key]


async def judge(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    answer: Sequence[object] | None = None,
    tests: Sequence[object] | None = None,
    **options: Any,
) -> list[float | None]:
    """Return a model's grade of each answer by a rubric, from 0 (lowest) to 1; None on doubt.

    The model sees prompt and answer, without the thinking; an answer that is empty gets 0 unasked.
    Options are JudgeSettings' fields, such as ``base_url``, ``model``, ``rubric``; other columns
    are ignored. Raises JudgeError, and JudgeBudgetError when ``max_requests`` or ``max_cost`` is
    reached.
    """
    settings = {name: value for name, value in options.items() if name in OPTIONS}
    chosen = find_judge(settings)
    numbers = list(range(len(completions)))
    if chosen.settings.only_without_gold:
        golds = [column for column in (answer, tests) if column is not None]
        numbers = [n for n in numbers if not any(column[n] for column in golds)]
    grades = await chosen.grade([prompts[n] for n in numbers], [completions[n] for n in numbers])
    rewards: list[float | None] = [None] * len(completions)
    low, high = chosen.scale
    for number, grade in zip(numbers, grades, strict=True):
        rewards[number] = None if grade is None else (grade - low) / (high - low)
    return rewards
