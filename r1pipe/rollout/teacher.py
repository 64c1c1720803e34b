"""A teacher behind an OpenAI-compatible endpoint: a source of samples like our own engine.

vLLM's server (`vllm serve`), SGLang, DeepSeek, OpenRouter and others speak this protocol. One
request per sample, each with its seed: finished ones are not asked again, and a server that heeds
seeds gives the same samples each time.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from r1pipe.config.base import Sampling
from r1pipe.config.traces import TeacherEndpoint
from r1pipe.rollout.groups import SampleGroup, plan_groups
from r1pipe.rollout.journal import SampleJournal
from r1pipe.types import Problem, Rollout
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from rewards.judges.endpoint import Endpoint, EndpointError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")


class TeacherClient:
    """A `sampling.SampleSource`. Raises UserError if the key's environment variable is not set."""

    def __init__(self, settings: TeacherEndpoint):
        self.settings = settings
        try:
            self._endpoint = Endpoint(settings, "teacher")
        except EndpointError as error:
            raise UserError(str(error)) from None

    def share(self, items: list[T]) -> list[T]:
        """All on the first rank: there is one server, however many ranks ask."""
        return items if distributed.is_first() else []

    def generate_groups(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        *,
        journal: SampleJournal,
    ) -> Iterator[SampleGroup]:
        """As Sampler.generate_groups; the rollouts have text, but neither token ids nor log-probs.

        Raises UserError for what the server refuses, and after the last retry.
        """
        groups = self.share(plan_groups(problems, num_samples, seed_parts))
        for group in groups:
            group.samples = journal.find_samples(group.problem.id, num_samples)
        yield from [group for group in groups if not group.missing]
        asking = self._ask_all([group for group in groups if group.missing], sampling, journal)

        async def wait_for_next() -> SampleGroup | None:
            return await anext(asking, None)

        with asyncio.Runner() as runner:
            while group := runner.run(wait_for_next()):
                yield group

    async def _ask_all(
        self, groups: list[SampleGroup], sampling: Sampling, journal: SampleJournal
    ) -> AsyncIterator[SampleGroup]:
        """The groups as they are finished; up to `max_concurrency` requests at a time."""
        missing = iter([(group, number) for group in groups for number in group.missing])

        async def ask(client: "AsyncOpenAI", group: SampleGroup, number: int) -> SampleGroup | None:
            rollout = await self._ask(client, group, number, sampling)
            journal.add_sample(rollout)
            group.samples[number] = rollout
            return None if group.missing else group

        running: set[asyncio.Task[SampleGroup | None]] = set()
        async with self._endpoint.open() as client:
            while True:
                for pair in islice(missing, self.settings.max_concurrency - len(running)):
                    running.add(asyncio.create_task(ask(client, *pair)))
                if not running:
                    break
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if group := task.result():
                        yield group

    async def _ask(
        self, client: "AsyncOpenAI", group: SampleGroup, number: int, sampling: Sampling
    ) -> Rollout:
        problem = group.problem
        try:
            answer = await self._endpoint.complete(
                client,
                problem.prompt,
                {"top_k": sampling.top_k} if sampling.top_k else {},
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_completion_tokens=sampling.max_completion_length,
                seed=group.seeds[number],
            )
        except EndpointError as error:
            where = f'(problem "{problem.id}"); finished samples are kept'
            raise UserError(f"{error} {where}") from None
        choice = answer.choices[0]
        return Rollout(
            problem_id=problem.id,
            sample=number,
            prompt_ids=[],
            completion_ids=[],
            logprobs=[],
            completion=join_thinking(choice.message),
            finish_reason=choice.finish_reason,
        )


def join_thinking(message: Any) -> str:
    """A message as one of our completions. Servers that split the reasoning off give it as
    `reasoning_content` or `reasoning`; templates that end with `<think>` leave the tag out."""
    extra = message.model_extra or {}
    reasoning = extra.get("reasoning_content") or extra.get("reasoning") or ""
    text = message.content or ""
    if reasoning and "<think>" not in text:
        return f"<think>\n{reasoning.strip()}\n</think>\n{text.strip()}"
    if "</think>" in text and "<think>" not in text:
        return f"<think>\n{text.lstrip()}"
    return text
