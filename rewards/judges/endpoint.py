"""A client of OpenAI-compatible chat completions: a judge's, and that of r1pipe's teachers.

The client library retries connection errors, 408, 409, 429 and 5xx with exponential backoff and
after `Retry-After`. The key comes from the environment and is in no message.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion


class EndpointError(Exception):
    """What the server refuses, or that it was not reached, in one line. `status`: HTTP's."""

    def __init__(self, line: str, status: int | None = None):
        super().__init__(line)
        self.status = status


class EndpointSettings(Protocol):
    @property
    def base_url(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def api_key_env(self) -> str | None: ...
    @property
    def max_retries(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def extra_body(self) -> Mapping[str, Any]: ...


class Endpoint:
    """A model behind a server; `role` is what errors call it.

    Raises EndpointError if the key's environment variable is not set.
    """

    def __init__(self, settings: EndpointSettings, role: str):
        self.settings, self.role = settings, role
        self._key = find_key(settings.api_key_env, role)

    def open(self) -> "AsyncOpenAI":
        """For the event loop that runs."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            base_url=self.settings.base_url,
            api_key=self._key or "none",
            max_retries=self.settings.max_retries,
            timeout=self.settings.timeout_s,
        )

    async def complete(
        self,
        client: "AsyncOpenAI",
        messages: Sequence[Mapping[str, Any]],
        extra_body: Mapping[str, Any],
        **fields: Any,
    ) -> "ChatCompletion":
        """An answer with at least one choice. Raises EndpointError."""
        from openai import OpenAIError

        settings = self.settings
        try:
            answer: ChatCompletion = await client.chat.completions.create(
                model=settings.model,
                messages=messages,  # type: ignore[arg-type]
                extra_body={**extra_body, **settings.extra_body},
                **fields,
            )
        except OpenAIError as error:
            status = getattr(error, "status_code", None)
            raise EndpointError(self._describe(error), status) from None
        if not answer.choices:
            raise EndpointError(f"{self.role} {settings.base_url}: no answer")
        return answer

    def _describe(self, error: Exception) -> str:
        """One line, without the key, which some servers repeat."""
        text = " ".join(str(error).split()) or type(error).__name__
        if self._key:
            text = text.replace(self._key, "***")
        return f"{self.role} {self.settings.base_url}, model {self.settings.model}: {text[:300]}"


def find_key(variable: str | None, role: str) -> str:
    """From the environment: recipes are published, keys are not."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise EndpointError(f"{role}.api_key_env: the environment variable {variable} is not set")
    return key


def check_url(url: str) -> None:
    """Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("give a URL such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ValueError("no name and password in the URL: it is written into the run's records")
