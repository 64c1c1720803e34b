"""What is written for TRL's GRPOTrainer plays here as it does there."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tiny_models import TINY
from trl import GRPOConfig, GRPOTrainer

from r1pipe.config.base import Environment
from r1pipe.envs.base import make_environment
from r1pipe.envs.trl import TrlEnvironment
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer, encode_prompt
from r1pipe.rollout.tool_parser import ToolParser
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

QUESTION = {"role": "user", "content": "Find the number."}
PROBLEM = Problem("p", "math", [QUESTION], "37", extra={"low": 30})


class Guess:
    """The number is the row's answer; every question costs a tenth."""

    def reset(self, answer: str, low: int, **row: object) -> str:
        self.number, self.asked = int(answer), 0
        return f" It is at least {low}."

    def compare(self, number: int) -> str:
        """Compare a number with the one to be found.

        Args:
            number: Which.
        """
        self.asked += 1
        if number < 0:
            raise ValueError("no negative numbers")
        return "right" if number == self.number else "wrong"

    async def hint(self) -> dict[str, int]:
        """Learn the last digit."""
        self.asked += 1
        return {"last": self.number % 10}

    def get_reward(self) -> float:
        return 1 - self.asked / 10

    def _secret(self) -> int:
        return self.number


class Judged(Guess):
    async def get_reward(self) -> float:
        return 0.25


class Silent:
    def reset(self, **row: object) -> None:
        self.row = row


def double(number: int) -> int:
    """Double a number.

    Args:
        number: Which.
    """
    return 2 * number


def call(name: str, **arguments: object) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


SAID = [
    call("compare", number=30),
    call("double", number=4) + "\n" + call("hint"),
    call("compare", number=-1),
    call("look"),
    "It is 37.",
]


class Scripted(GRPOTrainer):
    """Says what SAID says, token by token, and keeps what comes of it."""

    def _generate_single_turn(self, prompt_ids: list, *_: object, **__: object) -> tuple:
        self.turn = getattr(self, "turn", -1) + 1
        if self.turn == 0:
            self.first_ids = prompt_ids
        ids = self.processing_class.encode(SAID[self.turn] + "<|im_end|>")
        return [list(ids) for _ in prompt_ids], None

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, ids: list) -> Any:
        self.completions = completions
        self.given = super()._calculate_rewards(inputs, prompts, completions, ids)
        return self.given


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    tokenizer = build_tokenizer([*SAID, "Find the number. It is at least 30."], 300)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<|im_start|>", "<tool_call>", "</tool_call>"])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text()
    row = {"prompt": [QUESTION], "answer": "37", "low": 30}
    config = GRPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=900,
    )
    trainer = Scripted(
        build_model({**TINY, "max_position_embeddings": 4096}, tokenizer, 0),
        args=config,
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
        tools=[double],
        environment_factory=Guess,
    )
    trainer._generate_and_score_completions([row] * 2)
    return trainer


def test_an_episode_is_the_same_as_in_trl(trainer: Scripted) -> None:
    """Schemas and prompt, results and errors of calls, and the reward."""
    options = {"factory": "test_trl_environment.Guess", "tools": ["test_trl_environment.double"]}
    settings = Environment(name="trl", options=options, tool_parser="hermes")
    environment = make_environment(settings, PROBLEM)
    tokenizer = trainer.processing_class
    parser = ToolParser("hermes", tokenizer)

    async def play() -> tuple[list, list, float | None]:
        prompt, messages = await environment.start(), []
        for text in SAID:
            calls = parser.parse(text, environment.tools)
            turn = await environment.step({"role": "assistant", "content": text, **calls})
            assert turn.reward is None
            messages += turn.messages
        assert turn.done
        return prompt, messages, await environment.end("done")

    prompt, messages, reward = asyncio.run(play())
    assert encode_prompt(tokenizer, prompt, tools=environment.tools) == trainer.first_ids[0]
    theirs = [m for m in trainer.completions[0] if m["role"] == "tool"]
    *same, unknown = messages
    assert same == theirs[:-1]
    assert unknown["content"] == str({"error": "no tool look; there are double, compare, hint"})
    assert theirs[-1]["content"] == str({"error": "Tool look not found."})
    assert [m["content"] for m in same] == [
        "wrong", "8", "{'last': 7}", "{'error': 'no negative numbers'}",
    ]  # fmt: skip
    assert reward == 0.7
    assert trainer.given.tolist() == [[pytest.approx(reward)]] * 2
    assert PROBLEM.prompt == [QUESTION]


def test_a_reward_may_be_async_or_missing_and_an_error_has_none() -> None:
    for factory, reward in (("Judged", 0.25), ("Silent", None)):
        environment = TrlEnvironment(PROBLEM, f"test_trl_environment.{factory}")
        asyncio.run(environment.start())
        assert asyncio.run(environment.end("tokens")) == reward
        assert asyncio.run(environment.end("error")) is None


def test_reset_gets_the_row() -> None:
    environment = TrlEnvironment(PROBLEM, "test_trl_environment.Silent")
    assert asyncio.run(environment.start()) == [QUESTION]
    assert environment.tools == []
    row = environment.inner.row
    assert (row["prompt"], row["answer"], row["low"], row["id"]) == ([QUESTION], "37", 30, "p")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, 'environment "trl": its options are factory, tools or both'),
        ({"factory": "test_trl_environment.Gues"}, "did you mean test_trl_environment.Guess"),
        ({"factory": "no_such_game.Guess"}, 'no module "no_such_game"'),
        ({"factory": "builtins.dict"}, "what builtins.dict makes has no method reset"),
        ({"tools": ["double"]}, "give a dotted name"),
        ({"environment_factory": "x.Y"}, "unexpected keyword argument 'environment_factory'"),
    ],
)
def test_what_cannot_be_opened_is_one_line(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        make_environment(Environment(name="trl", options=options), PROBLEM)
    assert "\n" not in str(raised.value)
