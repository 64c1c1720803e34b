"""Tool calls by vLLM's own parsers: calls, several of them, text around, and what is none."""

import asyncio
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from r1pipe.envs.tools import ToolEnvironment
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.rollout.tool_parser import ToolParser
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

PROBLEM = Problem("p", "math", [{"role": "user", "content": "17 * 23?"}], "391")
TOOLS = ["calculator", "test_tool_parser.repeat"]


def repeat(text: str, times: int) -> str:
    """Repeat a text.

    Args:
        text: What.
        times: How often.
    """
    return text * times


DEEPSEEK = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip
DSML = ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>")


def write_json(name: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def write_deepseek_v3(name: str, arguments: dict[str, Any]) -> str:
    begin, end, sep = DEEPSEEK[2:]
    return f"{begin}function{sep}{name}\n```json\n{json.dumps(arguments)}\n```{end}"


def write_deepseek_v32(name: str, arguments: dict[str, Any]) -> str:
    parts = [
        f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">{value}'
        "</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    ]
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parts)}</｜DSML｜invoke>\n'


def write_qwen(name: str, arguments: dict[str, Any]) -> str:
    parts = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


# Family: what stands around all calls, what between them, and a call.
FAMILIES = {
    "hermes": ("{}", "\n", lambda *call: f"<tool_call>\n{write_json(*call)}\n</tool_call>"),
    "qwen3_coder": ("{}", "\n", write_qwen),
    "llama3_json": ("<|python_tag|>{}", "; ", write_json),
    "deepseek_v3": ("{}".join(DEEPSEEK[:2]), "\n", write_deepseek_v3),
    "deepseek_v32": ("\n{}".join(DSML), "", write_deepseek_v32),
}
SUM = ("calculator", {"expression": "1+1"})
WORDS = ("repeat", {"text": "ab", "times": 3})
# By family: broken calls, as changes of SUM's text.
BROKEN = {
    "hermes": [("}}", "}"), ('{"name"', "{name"), ("name", "tool")],
    "qwen3_coder": [("<function=calculator>", "calculator"), ("=calculator", "=")],
    "llama3_json": [("}}", "}"), ("name", "tool"), (', "arguments"', ', "with"')],
    "deepseek_v3": [("```json", "json"), (DEEPSEEK[4], ""), ("}", ""), ('"1+1"', "1+1")],
    "deepseek_v32": [('"calculator"', ""), ('name="expression"', ""), (' name="calculator"', "")],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer(["17 * 23?"], 300)
    marks = ["<tool_call>", "</tool_call>", "<|python_tag|>", *DEEPSEEK, *DSML]
    tokenizer.add_tokens([mark for mark in marks if mark not in tokenizer.get_vocab()])
    return tokenizer


def write(family: str, *calls: tuple) -> str:
    frame, between, write_call = FAMILIES[family]
    return frame.replace("{}", between.join(write_call(*call) for call in calls))


def read(tokenizer: PreTrainedTokenizerBase, family: str, text: str) -> dict[str, Any]:
    return ToolParser(family, tokenizer).parse(text, ToolEnvironment(PROBLEM, TOOLS).tools)


def answer(message: dict[str, Any]) -> list[str]:
    environment = ToolEnvironment(PROBLEM, TOOLS)
    turn = asyncio.run(environment.step({"role": "assistant", "content": "", **message}))
    assert turn.done == (not message)
    return [str(message["content"]) for message in turn.messages]


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_and_answered(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    assert read(tokenizer, family, "It is {2}.") == {}
    one = write(family, SUM)
    for text in (one, f"Let me see. {one}", f"<think>{{maybe}}</think>\n{one}\n"):
        message = read(tokenizer, family, text)
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["calculator"]
        assert answer(message) == ["2"]
    assert answer(read(tokenizer, family, write(family, SUM, WORDS, SUM))) == ["2", "ababab", "2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_in_the_thinking_is_none(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    text = f"<think>Such as {write(family, SUM)}?</think>\nIt is 2."
    assert read(tokenizer, family, text) == {}


@pytest.mark.parametrize(
    ("family", "change"), [(name, change) for name, changes in BROKEN.items() for change in changes]
)
def test_a_malformed_call_is_an_error_message(
    tokenizer: PreTrainedTokenizerBase, family: str, change: tuple[str, str]
) -> None:
    """By the parser or, where that hands on what stands there, by the environment."""
    call = FAMILIES[family][2](*SUM)
    assert change[0] in call
    (told,) = answer(read(tokenizer, family, write(family, SUM).replace(*change)))
    assert told.startswith("error: ")
    assert "\n" not in told


@pytest.mark.parametrize("family", ["hermes", "llama3_json", "deepseek_v3"])
def test_one_malformed_call_among_others_is_not_passed_over(
    tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    """vLLM's parser of deepseek_v3 leaves it out."""
    change = {"deepseek_v3": ("```json", "json")}.get(family, ("}}", "}"))
    text = write(family, WORDS, SUM).replace(*change)
    assert set(read(tokenizer, family, text)) == {"tool_call_error"}


def test_llamas_calls_need_no_mark(tokenizer: PreTrainedTokenizerBase) -> None:
    text = write("llama3_json", SUM).removeprefix("<|python_tag|>")
    assert answer(read(tokenizer, "llama3_json", text)) == ["2"]
    assert set(read(tokenizer, "llama3_json", text[:-2])) == {"tool_call_error"}


def test_a_parser_that_is_none(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match='tool_parser "hermit": '):
        ToolParser("hermit", tokenizer)
