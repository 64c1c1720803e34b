"""Tool calls in what a model wrote, read by vLLM's parser for its family."""

import json
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from r1pipe.utils.errors import UserError, first_line
from rewards.text.completions import split_thinking

MARKS = ("tool_call_start_token", "tool_calls_start_token", "bot_token")
"""Attributes of vLLM's parsers: texts that a call begins with."""

TERMINALS = ("TOOL_START", "INVOKE_PREFIX", "FUNC_PREFIX")
"""The same of its newer parsers, by their grammars' names."""

COUNTED = ("tool_call_start_token", "INVOKE_PREFIX", "FUNC_PREFIX")
"""Those that stand before each call, not before all of them."""


class ToolParser:
    """vLLM's parser of this name (its --tool-call-parser).

    Raises UserError if there is none, or if it does not fit the tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        from vllm.tool_parsers import ToolParserManager

        try:
            self._make = ToolParserManager.get_tool_parser(name)
            self._marks = find_marks(self._make(tokenizer))
        except Exception as error:  # whatever the parser raises
            raise UserError(f'environment.tool_parser "{name}": {first_line(error)}') from error
        self._tokenizer = tokenizer
        self._open = cache(self._open_for)
        # A malformed call is the model's, and its answer: no traceback for each.
        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)

    def _open_for(self, tools: str) -> tuple[Any, Any]:
        """The parser and a request for tools as JSON: their schemas say what is a number."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model="", messages=[], tools=json.loads(tools))
        return self._make(self._tokenizer, request.tools), request

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`tool_calls`, as in OpenAI's API, if there are some outside the thinking; or
        `tool_call_error`, if one of them cannot be read: then none of them counts."""
        parser, request = self._open(json.dumps(list(tools)))
        text = split_thinking(text)[1]
        try:
            found = parser.extract_tool_calls(text, request)
            calls = [
                {
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in found.tool_calls
            ]
        except Exception as error:  # the parser's own, on what a model wrote
            return {"tool_call_error": first_line(error, with_type=True)}
        num_begun = max(
            (text.count(mark) for name, mark in self._marks if name in COUNTED), default=0
        )
        if len(calls) < num_begun or (not calls and self._looks_like_call(text)):
            return {"tool_call_error": "not a tool call that can be read"}
        return {"tool_calls": calls} if calls else {}

    def _looks_like_call(self, text: str) -> bool:
        if any(mark in text for _, mark in self._marks):
            return True
        # llama's calls are JSON, mostly without a mark.
        has_json = any(name == "bot_token" for name, _ in self._marks)
        return has_json and text.lstrip().startswith("{") and '"name"' in text


def find_marks(parser: Any) -> list[tuple[str, str]]:
    """Texts that a call begins with, by their names in MARKS and TERMINALS."""
    engine = getattr(parser, "_parser_engine", None)
    terminals = engine.parser_engine_config.terminals if engine else {}
    named = [(name, getattr(parser, name, None)) for name in MARKS]
    for name in TERMINALS:
        texts = terminals.get(name, ())
        named += [(name, text) for text in ((texts,) if isinstance(texts, str) else texts)]
    return [(name, mark) for name, mark in named if isinstance(mark, str)]
