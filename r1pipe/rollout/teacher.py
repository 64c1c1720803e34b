"""A teacher behind an OpenAI-compatible endpoint, as a source of samples like our own engine.

vLLM's own server (`vllm serve`), SGLang, DeepSeek, OpenRouter and others speak this protocol. One
request per sample, each with its seed, so that what is finished need not be asked again; a server
that heeds seeds gives the same samples each time. The client library retries what is worth it
(connection errors, 408, 409, 429, 5xx) with exponential backoff and as long as `Retry-After` says.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from r1pipe.config.base import Sampling
from r1pipe.config.traces import TeacherEndpoint
from r1pipe.types import Problem, Rollout
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.seeds import derive_seed

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class TeacherClient:
    """A `sampling.SampleSource`. Raises UserError if the key's variable is not set."""

    def __init__(self, settings: TeacherEndpoint):
        self.settings = settings
        self._key = find_key(settings)

    def own_part(self, num_problems: int) -> slice:
        """All, and of several ranks the first's: the server is one, however many ask it."""
        return slice(0, num_problems if distributed.is_first() else 0)

    def kept_part(self, num_problems: int) -> slice:
        return slice(0, num_problems)

    def generate(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        on_group: Callable[[int, list[Rollout]], None],
        *,
        part: slice,
        on_sample: Callable[[Rollout], None],
        have: Mapping[tuple[str, int], Rollout],
    ) -> list[Rollout]:
        """As Sampler.generate; the rollouts have text, but neither token ids nor log-probs.

        Raises UserError for what the server refuses, and when its retries are used up.
        """
        problems = problems[part]
        finished = [[have.get((p.id, n)) for n in range(num_samples)] for p in problems]
        missing = [(i, n) for i, group in enumerate(finished) for n, r in enumerate(group) if not r]
        waiting = iter(missing)

        async def work(client: "AsyncOpenAI") -> None:
            for group, number in waiting:  # all workers take from it
                problem = problems[group]
                seed = derive_seed(*seed_parts, problem.id, number)
                rollout = await self._ask(client, problem, number, sampling, seed)
                on_sample(rollout)
                finished[group][number] = rollout
                if all(finished[group]):
                    on_group(group, finished[group])

        async def work_together() -> None:
            async with self._open_client() as client:
                await asyncio.gather(*(work(client) for _ in range(self.settings.max_concurrency)))

        for group, rollouts in enumerate(finished):
            if all(rollouts):
                on_group(group, rollouts)
        if missing:
            asyncio.run(work_together())
        return [rollout for group in finished for rollout in group]

    def _open_client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            base_url=self.settings.base_url,
            api_key=self._key or "none",
            max_retries=self.settings.max_retries,
            timeout=self.settings.timeout_s,
        )

    async def _ask(
        self, client: "AsyncOpenAI", problem: Problem, number: int, sampling: Sampling, seed: int
    ) -> Rollout:
        from openai import OpenAIError

        settings = self.settings
        try:
            answer = await client.chat.completions.create(
                model=settings.model,
                messages=problem.prompt,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_completion_tokens=sampling.max_completion_length,
                seed=seed,
                extra_body={
                    **({"top_k": sampling.top_k} if sampling.top_k else {}),
                    **settings.extra_body,
                },
            )
        except OpenAIError as error:
            raise UserError(self._describe(error, problem)) from None
        if not answer.choices:
            raise UserError(f'teacher {settings.base_url}: no answer to problem "{problem.id}"')
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

    def _describe(self, error: Exception, problem: Problem) -> str:
        """One line, without the key, which some servers repeat."""
        text = " ".join(str(error).split()) or type(error).__name__
        if self._key:
            text = text.replace(self._key, "***")
        what = f"teacher {self.settings.base_url}, model {self.settings.model}: {text[:300]}"
        return f'{what} (problem "{problem.id}"); what is sampled is kept'


def find_key(settings: TeacherEndpoint) -> str:
    """From the environment: a recipe is written down and published, a key is not."""
    if settings.api_key_env is None:
        return ""
    key = os.environ.get(settings.api_key_env, "")
    if not key:
        raise UserError(
            f"teacher.api_key_env: the environment variable {settings.api_key_env} is not set"
        )
    return key


def join_thinking(message: Any) -> str:
    """A message as a completion of ours. Servers that take the reasoning out of the text give it
    as `reasoning_content` or `reasoning`; templates that end with `<think>` leave it out."""
    extra = message.model_extra or {}
    reasoning = extra.get("reasoning_content") or extra.get("reasoning") or ""
    text = message.content or ""
    if reasoning and "<think>" not in text:
        return f"<think>\n{reasoning.strip()}\n</think>\n{text.strip()}"
    if "</think>" in text and "<think>" not in text:
        return f"<think>\n{text.lstrip()}"
    return text
