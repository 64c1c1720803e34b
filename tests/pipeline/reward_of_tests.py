"""A user's own reward function, found by its dotted name."""

import os
import re
import time


def always_one(completions: list, **columns: object) -> list[float]:
    return [1.0 for _ in completions]


def never_judges(completions: list, **columns: object) -> list[None]:
    return [None for _ in completions]


def undecided_for_odd_answers(
    completion_ids: list[list[int]], answer: list[str], **columns: object
) -> list[float]:
    """1 for problems with an even answer, so that their groups are silent; else by chance."""
    return [
        1.0 if int(gold) % 2 == 0 else float(sum(ids) % 2)
        for ids, gold in zip(completion_ids, answer)
    ]


def own_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A value that no other completion has: says whose score a score is."""
    return [float(hash(tuple(ids)) % 10**6) for ids in completion_ids]


def raises(completions: list, **columns: object) -> list[float]:
    raise ValueError("broken reward")


def accept_even_lengths(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """An untrained policy is never right: this accepts about half of what it says."""
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


calls = 0


def right_for_so_many_calls(
    completion_ids: list[list[int]], so_many: int, **columns: object
) -> list[float]:
    """By chance, then 0: a policy that has collapsed looks so."""
    global calls
    calls += 1
    return [float(sum(ids) % 2) if calls <= so_many else 0.0 for ids in completion_ids]


def never_returns(completion_ids: list[list[int]], **columns: object) -> list[float]:
    time.sleep(10**6)
    return [0.0 for _ in completion_ids]


def never_returns_on_rank_1(completion_ids: list[list[int]], **columns: object) -> list[float]:
    if os.environ.get("RANK") == "1":
        time.sleep(10**6)
    return own_tokens(completion_ids)


def backtracks(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """As a reward for a format might, with the interpreter in its hand."""
    return [float(bool(re.match(r"(a+)+$", "a" * 60 + "b"))) for _ in completion_ids]


def stops_the_engine(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """From the next step on, vLLM does not answer."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def never_answers(engine: LLMEngine) -> None:
        time.sleep(10**6)

    LLMEngine.step = never_answers
    return own_tokens(completion_ids)
