"""Tools: exact arithmetic, calls by vLLM's own parsers, errors that are the policy's to mend."""

import asyncio
import gc
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from r1pipe.envs.base import Turn, run_within
from r1pipe.envs.calculator import calculator
from r1pipe.envs.python_tool import PythonSession
from r1pipe.envs.tools import NUM_THREADS, ToolEnvironment
from r1pipe.models.tokenizer import build_tokenizer, encode_prompt
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "rewards"))
import code_attacks

PROBLEM = Problem("p", "math", [{"role": "user", "content": "17 * 23?"}], "391")


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("17 * 23", "391"),
        ("(3 + 4) * 12 - -1", "85"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("7 // 2 + 7 % 4", "6"),
        ("2^10 × 3", "3072"),
        ("2**-2", "0.25"),
        ("10**30", "1" + "0" * 30),
        ("1e3", "1000"),
    ],
)
def test_the_calculator_is_exact(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("1/0", "division by zero"),
        ("2 +", "not an arithmetic expression"),
        ("9**9**9**9", "too large"),
        ("(10**1000)**1000", "too large"),
        ("10**400 / 3", "too large"),
        ("2**0.5", "whole exponents"),
        ("__import__('os').system('true')", "not arithmetic"),
        ("x", "not arithmetic"),
        ("'a' * 9", "not arithmetic"),
        ("True + 1", "not arithmetic"),
        ("1 < 2", "not arithmetic"),
        ("1j", "not arithmetic"),
        ("(" * 250 + ")" * 40, "not an arithmetic"),
        ("1+" * 200 + "1", "300 characters"),
    ],
)
def test_the_calculator_refuses_the_rest_at_once(expression: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calculator(expression)


def test_calculators_of_many_threads() -> None:
    """Collected objects let other threads in while one parses; CPython 3.11 then fails."""

    class Collected:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            sum(range(200))

    def calculate(_: int) -> set[str]:
        return {calculator("((1+2)*(3-4))/5+" * 5 + f"0*{id(Collected())}") for _ in range(400)}

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-5)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(6) as threads:
            results = set.union(*threads.map(calculate, range(6)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
    assert results == {"-3"}


def count_letters(word: str, letter: str = "a") -> int:
    """Count a letter.

    Args:
        word: Where.
        letter: Which.
    """
    return word.count(letter)


def nap() -> str:
    """Take 0.2 s."""
    time.sleep(0.2)
    return "slept"


async def look_up(key: str) -> dict[str, str]:
    """Look a key up.

    Args:
        key: Which.
    """
    await asyncio.sleep(0)
    return {key: "found"}


def undescribed(key):
    return key


def answer(environment: ToolEnvironment, *calls: tuple[str, str]) -> list[str]:
    called = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    message = {"role": "assistant", "content": "", "tool_calls": called}
    turn = asyncio.run(environment.step(message))
    assert not turn.done
    assert turn.reward is None
    assert [m["role"] for m in turn.messages] == ["tool"] * len(calls)
    return [message["content"] for message in turn.messages]


def test_calls_are_answered_in_their_order() -> None:
    tools = ["calculator", "test_tools.count_letters", "test_tools.look_up"]
    environment = ToolEnvironment(PROBLEM, tools)
    assert asyncio.run(environment.start()) == PROBLEM.prompt
    assert [tool["function"]["name"] for tool in environment.tools] == [
        "calculator", "count_letters", "look_up",
    ]  # fmt: skip
    results = answer(
        environment,
        ("calculator", '{"expression": "17*23"}'),
        ("count_letters", '{"word": "banana"}'),
        ("look_up", '{"key": "k"}'),
    )
    assert results == ["391", "3", '{"k": "found"}']
    last = asyncio.run(environment.step({"role": "assistant", "content": "391"}))
    assert last.done


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("calculator", '{"expression": "1/0"}', "division by zero"),
        ("calculator", "{}", "missing a required argument: 'expression'"),
        ("calculator", '{"expression": "1", "digits": 3}', "unexpected keyword argument 'digits'"),
        ("calculator", '["1"]', "arguments are a JSON object"),
        ("calculator", '{"expression": ', "Expecting value"),
        ("calc", '{"expression": "1"}', "no tool calc; there are calculator"),
    ],
)
def test_a_wrong_call_is_an_error_message(name: str, arguments: str, says: str) -> None:
    (result,) = answer(ToolEnvironment(PROBLEM), (name, arguments))
    assert result.startswith("error: ")
    assert says in result


def test_waiting_for_a_thread_is_not_the_tools_time() -> None:
    """All together take longer than each of them may; one that takes longer is stopped."""
    call = {"type": "function", "function": {"name": "nap", "arguments": "{}"}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    environments = [ToolEnvironment(PROBLEM, ["test_tools.nap"]) for _ in range(8 * NUM_THREADS)]

    async def play(seconds: float) -> list[Turn | BaseException]:
        steps = [run_within(seconds, e.step(dict(message))) for e in environments]
        return await asyncio.gather(*steps, return_exceptions=True)

    turns = asyncio.run(play(1.0))
    assert [turn.messages[0]["content"] for turn in turns] == ["slept"] * len(environments)
    assert {type(turn) for turn in asyncio.run(play(0.05))} == {TimeoutError}


def test_tools_that_cannot_be_opened() -> None:
    with pytest.raises(UserError, match='tool "calc": there are calculator, python'):
        ToolEnvironment(PROBLEM, ["calc"])
    with pytest.raises(UserError, match=r'tool "undescribed": .*with Args are its schema'):
        ToolEnvironment(PROBLEM, ["test_tools.undescribed"])


def test_python_keeps_its_variables_within_an_episode() -> None:
    environment = ToolEnvironment(PROBLEM, ["python"])
    cells = [
        "x = 6\nprint('set')",
        "x * 7",
        "x += 1\nraise KeyError('no')",
        "def double(n):\n    return 2 * n\ndouble(x)",
        "while True: pass",
        "x",
        "1 +",
        "import os; os._exit(3)",
        "print(x)\nNone",
    ]
    results = [answer(environment, ("python", json.dumps({"code": c})))[0] for c in cells]
    assert results[:4] == ["set", "42", "KeyError: 'no'", "14"]
    assert results[4].endswith("out of time (5 s)")
    assert results[5] == "7"
    assert "SyntaxError" in results[6]
    assert results[7:] == ["error: the process ended with 3", "7"]
    other = ToolEnvironment(PROBLEM, ["python"])
    assert "NameError" in answer(other, ("python", '{"code": "x"}'))[0]


def test_what_python_drew_stays_drawn() -> None:
    session = PythonSession()
    drawn = session.python("import random\nx = random.random()\nx")
    assert session.python("y = random.random()\nx") == drawn
    assert session.python("y == x, x") == f"(False, {drawn})"


def test_python_runs_in_the_sandbox(tmp_path: Path) -> None:
    """The attacks on code rewards, as cells: what a cell prints is all that it can do."""
    (tmp_path / "canary").write_text("secret")
    context = {"canary": str(tmp_path / "canary"), "home": str(Path.home()), "pid": os.getpid()}
    prelude = code_attacks.PRELUDE.format(context=context)
    names = [name for name in code_attacks.PROGRAMS if name.startswith(("read", "list", "write"))]
    assert len(names) > 8
    for name in names:
        session = PythonSession()
        session.python(prelude)
        assert session.python(code_attacks.PROGRAMS[name]) != code_attacks.ESCAPED, name
    assert (tmp_path / "canary").read_text() == "secret"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["17 * 23?"], 300)


def test_a_template_that_knows_tools_is_given_them(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
    )
    tools = ToolEnvironment(PROBLEM).tools
    text = tokenizer.decode(encode_prompt(tokenizer, PROBLEM.prompt, tools=tools))
    assert '"name": "calculator"' in text
    assert encode_prompt(tokenizer, PROBLEM.prompt) == tokenizer.encode("17 * 23?")
