"""Mixture-of-Thoughts: 350k traces of DeepSeek-R1 in mathematics, code and science, for the cold
start.

Hub id `open-r1/Mixture-of-Thoughts`; split train, configurations all, math (94k rows), code (83k)
and science (173k). License: see the card. Rows: `messages` (a question and an answer that begins
with <think>), `num_tokens`, `source`.

Rows have a trace and no answer to judge by: `kind` is text. `max_tokens` filters out longer ones.
"""

from r1pipe.data.rows import Unwanted, make_load, map_conversation

HUB_ID = "open-r1/Mixture-of-Thoughts"


def make_problem(row: dict, *, max_tokens: int | None = None) -> dict:
    problem = map_conversation(row["messages"])
    if max_tokens is not None and row["num_tokens"] > max_tokens:
        raise Unwanted(f"more than {max_tokens} tokens")
    return problem


load = make_load(
    "mixture-of-thoughts", HUB_ID, make_problem, default_config="all", has_configs=True
)
