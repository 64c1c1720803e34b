"""Tool calls in what a model wrote, read by vLLM's parser for its family."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from r1pipe.utils.errors import UserError, first_line

MARKS = ("tool_call_start_token", "tool_calls_start_token", "bot_token")
"""Attributes of vLLM's parsers: texts that a call begins with."""


class ToolParser:
    """vLLM's parser of this name (its --tool-call-parser).

    Raises UserError if there is none, or if it does not fit the tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        from vllm.tool_parsers import ToolParserManager

        try:
            self._make = ToolParserManager.get_tool_parser(name)
            self._parser = self._make(tokenizer)
        except Exception as error:  # whatever the parser raises
            raise UserError(f'environment.tool_parser "{name}": {first_line(error)}') from error
        marks = (getattr(self._parser, mark, None) for mark in MARKS)
        self._marks = [mark for mark in marks if isinstance(mark, str)]
        # A malformed call is the model's, and its answer: no traceback for each.
        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`tool_calls`, as in OpenAI's API, if there are some; or `tool_call_error`, if the text
        looks like a call and is none."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model="", messages=[], tools=list(tools))
        try:
            found = self._parser.extract_tool_calls(text, request)
            calls = [
                {
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in found.tool_calls
            ]
        except Exception as error:  # the parser's own, on what a model wrote
            return {"tool_call_error": first_line(error, with_type=True)}
        if calls:
            return {"tool_calls": calls}
        if any(mark in text for mark in self._marks):
            return {"tool_call_error": "not a tool call that can be read"}
        return {}
