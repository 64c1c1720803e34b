"""Environments of verifiers, played here as its own loop plays them. test_adapters.py installs the
package and runs this file."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from r1pipe.config.base import Environment, ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.envs.base import check_environment, make_environment
from r1pipe.envs.verifiers import NEEDED
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

try:
    import verifiers as vf
except ImportError:
    vf = None
needs_verifiers = pytest.mark.skipif(
    vf is None, reason='needs pip install "verifiers>=0.1.14,<0.4"'
)

HERE = "verifiers_of_tests"
GYM = "verifiers.ReasoningGymEnv"
GYM_ARGS = {"gym": "basic_arithmetic", "num_train_examples": 3, "num_eval_examples": 2}
SETTINGS = Environment(name="verifiers", tool_parser="hermes")

Said = tuple[str, list[tuple[str, str]]]


def load(env: str, split: str = "train", **args: object) -> list[Problem]:
    return load_problems(
        ProblemSet(recipe="verifiers", split=split, options={"env": env, "args": args})
    )


def play(problem: Problem, script: list[Said], ended: str = "done") -> tuple[list, float | None]:
    """All messages, and the reward."""
    environment = make_environment(SETTINGS, problem)

    async def run() -> tuple[list, float | None]:
        messages = await environment.start()
        for text, calls in script:
            functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
            message = {"role": "assistant", "content": text}
            if functions:
                message["tool_calls"] = [{"type": "function", "function": f} for f in functions]
            turn = await environment.step(message)
            assert turn.reward is None
            messages += [message, *turn.messages]
        assert turn.done == (ended == "done")
        return messages, await environment.end(ended)

    return asyncio.run(run())


def play_there(env: str, number: int, script: list[Said], **args: object) -> tuple[list, float]:
    """The same by verifiers itself, with a client that says the same."""
    from verifiers.clients import Client
    from verifiers.types import ResponseMessage, ToolCall

    module, _, name = env.rpartition(".")
    made = getattr(sys.modules.get(module) or __import__(module), name)(**args)

    class Scripted(Client):
        turn = 0

        async def get_response(self, **given: Any) -> Any:
            text, calls = script[self.turn]
            self.turn += 1
            called = [ToolCall(id="x", name=n, arguments=a) for n, a in calls]
            answer = ResponseMessage(
                content=text, tool_calls=called or None, finish_reason="stop", is_truncated=False
            )
            return vf.Response(id="", created=0, model="", message=answer)

    Scripted.__abstractmethods__ = frozenset()
    row = made.get_dataset()[number]
    output = asyncio.run(made.run_rollout(row, Scripted(None), "model", {}))
    assert output["error"] is None
    return [*output["prompt"], *output["completion"]], output["reward"]


def plain(messages: list) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@needs_verifiers
@pytest.mark.parametrize(
    ("env", "args", "number", "script", "reward"),
    [
        (GYM, GYM_ARGS, 0, [("<answer>12</answer>", [])], None),
        (f"{HERE}.load_environment", {}, 1, [("8", [])], 1.0),
        (f"{HERE}.higher", {}, 0, [("5", []), ("9", []), ("7", [])], 1 / 3 + 1),
        (f"{HERE}.higher", {"max_turns": 2}, 0, [("5 or so", []), ("9", [])], 0.0),
        (
            f"{HERE}.tools",
            {},
            1,
            [
                ("", [("double", '{"number": 4}'), ("halve", "{}")]),
                ("", [("double", '{"numbers": 4}'), ("double", "{")]),
                ("8", []),
            ],
            1.0,
        ),
        (f"{HERE}.group", {}, 0, [("7", [])], 2.0),
        (f"{HERE}.group", {}, 3, [("", [("double", '{"number": 4}')]), ("8", [])], 1.0),
    ],
)
def test_an_episode_is_the_same_as_in_verifiers(
    env: str, args: dict, number: int, script: list[Said], reward: float | None
) -> None:
    messages, ours = play(load(env, **args)[number], script)
    there, theirs = play_there(env, number, script, **args)
    assert plain(messages) == plain(there)
    assert ours == theirs
    assert reward in (None, ours)


@needs_verifiers
def test_rows_are_its_datasets() -> None:
    problems = load(GYM, **GYM_ARGS)
    assert len(problems) == 3
    assert [message["role"] for message in problems[0].prompt] == ["system", "user"]
    assert {p.id for p in problems}.isdisjoint({p.id for p in load(GYM, "test", **GYM_ARGS)})
    assert {p.extra["environment"]["name"] for p in problems} == {"verifiers"}
    assert json.loads(json.dumps(problems[0].tests)) == problems[0].tests
    with pytest.raises(UserError, match=r'split "test": .* has no eval_dataset'):
        load(f"{HERE}.higher", "test")


@needs_verifiers
def test_gym_answers_are_judged_by_their_scorer() -> None:
    from reasoning_gym import create_dataset

    for number, problem in enumerate(load(GYM, **GYM_ARGS)):
        right = create_dataset("basic_arithmetic", size=5, seed=0)[number]["answer"]
        assert play(problem, [(f"<answer>{right}</answer>", [])])[1] == 1.0
        assert play(problem, [("I do not know", [])])[1] < 0.1


@needs_verifiers
def test_an_episode_that_a_limit_ends_is_judged() -> None:
    problem = load(f"{HERE}.higher")[0]
    assert play(problem, [("5", []), ("6", [])], ended="turns")[1] == 1.0
    assert play(problem, [("5", [])], ended="error")[1] is None


@needs_verifiers
def test_tools_are_those_of_the_row() -> None:
    higher, _, tools, _ = (make_environment(SETTINGS, p) for p in load(f"{HERE}.group"))
    assert higher.tools == []
    (tool,) = tools.tools
    assert tool["function"]["name"] == "double"
    assert list(tool["function"]["parameters"]["properties"]) == ["number"]
    untold = SETTINGS.model_copy(update={"tool_parser": None})
    with pytest.raises(UserError, match="which of vLLM's parsers"):
        check_environment(untold, load(f"{HERE}.tools")[0])


@needs_verifiers
@pytest.mark.parametrize(
    ("env", "script", "error"),
    [
        ("forgetful", [("5", []), ("6", [])], "the environment changes what was said"),
        ("unjudged", [("7", [])], "no judge"),
        ("higher", [("?", [])], "no number"),
    ],
)
def test_what_cannot_be_played_or_judged_is_an_error(
    env: str, script: list[Said], error: str
) -> None:
    with pytest.raises((LookupError, ValueError, vf.ToolError), match=error):
        play(load(f"{HERE}.{env}")[0], script)


@needs_verifiers
def test_signals_stay_ours() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    load(f"{HERE}.higher", max_turns=9)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@needs_verifiers
@pytest.mark.parametrize(
    ("env", "args", "says"),
    [
        ("no-such-env", {}, 'no module "no_such_env"'),
        ("verifiers-of-tests", {"rows": "x"}, "TypeError"),
        ("owner/verifiers-of-tests", {"row": 1}, "unexpected keyword argument 'row'"),
        (f"{HERE}.lower", {}, 'has no function "lower"'),
        (f"{HERE}.double", {"number": 1}, "int is no environment of verifiers"),
        (f"{HERE}.own_model", {}, "OwnModel calls the model itself"),
        (f"{HERE}.grouped", {}, "rewards whole groups"),
    ],
)
def test_what_cannot_be_opened_is_one_line(env: str, args: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        load(env, **args)
    assert "\n" not in str(raised.value)


@needs_verifiers
def test_an_installed_environment_is_found_by_its_name() -> None:
    assert len(load("verifiers-of-tests", rows=1)) == 1


PROBLEM = Problem("p", "math", [{"role": "user", "content": "1 + 1?"}], "2")


def test_one_range_of_versions_is_told() -> None:
    for file in ("pyproject.toml", "docs/extending.md"):
        assert f'"{NEEDED}"' in (Path(__file__).parents[3] / file).read_text()


def test_rows_of_others_are_refused() -> None:
    settings = Environment(name="verifiers", options={"env": "wordle"})
    with pytest.raises(UserError, match=r'problem "p" is none of wordle: .*recipe: verifiers'):
        make_environment(settings, PROBLEM)


@pytest.mark.skipif(vf is not None, reason="verifiers is installed")
def test_a_missing_package_is_one_line() -> None:
    with pytest.raises(UserError, match='the package is missing: pip install "verifiers'):
        load("wordle-of-nobody")
