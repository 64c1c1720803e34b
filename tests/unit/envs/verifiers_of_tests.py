"""Environments of verifiers for the tests of its adapter."""

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"Which number? {n}", "answer": str(n)} for n in (7, 8)]


class Higher(vf.MultiTurnEnv):
    """Says whether the number is higher; ends with a word of its own."""

    async def setup_state(self, state: vf.State) -> vf.State:
        state["guesses"] = []
        return state

    async def env_response(self, messages: vf.Messages, state: vf.State, **more: object) -> list:
        said = messages[-1].content
        state["guesses"].append(said)
        if said == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "Right."}]
            return []
        if said == "?":
            raise vf.ToolError("no number")
        return [{"role": "user", "content": "Higher." if said < state["answer"] else "Lower."}]


class Forgetful(Higher):
    async def get_prompt_messages(self, state: vf.State) -> vf.Messages:
        messages = await super().get_prompt_messages(state)
        return [*messages[:1], *messages[-1:]] if state["trajectory"] else messages


class OwnModel(Higher):
    async def get_model_response(self, *given: object, **more: object) -> vf.Response:
        raise NotImplementedError


def was_found(completion: vf.Messages, answer: str, state: vf.State) -> float:
    found = completion[-1].content == "Right." and completion[-2].content == answer
    return float(found) / len(state["guesses"] or [1])


async def is_short(completion: vf.Messages, **columns: object) -> float:
    return float(len(completion[0].content) < 3)


def broken(completion: vf.Messages) -> float:
    raise LookupError("no judge")


def by_group(completions: list) -> list[float]:
    return [0.0] * len(completions)


def count_guesses(state: vf.State) -> int:
    """A metric, not a reward."""
    return len(state["guesses"])


def higher(rewards: list | None = None, kind: type = Higher, **options: object) -> vf.Environment:
    rubric = vf.Rubric(rewards or [was_found, is_short], [1.0] * len(rewards or "12"))
    rubric.add_metric(count_guesses)
    rows = Dataset.from_list(ROWS)
    return kind(dataset=rows, rubric=rubric, system_prompt="Guess.", **options)


def forgetful() -> vf.Environment:
    return higher(kind=Forgetful)


def own_model() -> vf.Environment:
    return higher(kind=OwnModel)


def unjudged() -> vf.Environment:
    return higher([was_found, broken])


def grouped() -> vf.Environment:
    return higher([was_found, by_group])


def double(number: int) -> int:
    """Double a number.

    Args:
        number: Which.
    """
    return 2 * number


def answered(completion: vf.Messages, answer: str) -> float:
    return float(completion[-1].content == answer)


def tools() -> vf.Environment:
    return vf.ToolEnv(
        tools=[double], dataset=Dataset.from_list(ROWS), rubric=vf.Rubric([answered]), max_turns=4
    )


def count_calls(completion: vf.Messages) -> int:
    return sum(message.role == "tool" for message in completion)


def counted() -> vf.Environment:
    """Eight rows; a reward for each call."""
    rows = [{"question": f"Call {n}.", "answer": str(n)} for n in range(8)]
    rubric = vf.Rubric([count_calls])
    return vf.ToolEnv(tools=[double], dataset=Dataset.from_list(rows), rubric=rubric, max_turns=3)


def group() -> vf.Environment:
    return vf.EnvGroup([higher(), tools()], ["higher", "tools"])


def load_environment(rows: int = 2) -> vf.Environment:
    return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS[:rows]), rubric=vf.Rubric([answered]))
