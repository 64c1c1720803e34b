"""Mixture-of-Thoughts: 350k traces of DeepSeek-R1 in mathematics, code and science, for the cold
start.

Hub id `open-r1/Mixture-of-Thoughts`; split train, configurations all, math (94k rows), code (83k)
and science (173k). Licence: see the card. Rows: `messages` (a question and an answer that begins
with <think>), `num_tokens`, `source`.

Rows have a trace and no answer to compare with: `kind` is text. `max_tokens` filters long ones out.
"""

from collections.abc import Iterator

from r1pipe.data.rows import Unwanted, load_rows

HUB_ID = "open-r1/Mixture-of-Thoughts"


def load(
    split: str = "train",
    *,
    path: str = HUB_ID,
    config: str | None = None,
    max_tokens: int | None = None,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        *prompt, answer = row["messages"]
        if answer["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
        if max_tokens is not None and row["num_tokens"] > max_tokens:
            raise Unwanted(f"more than {max_tokens} tokens")
        return {
            "kind": "text",
            "prompt": [{"role": m["role"], "content": m["content"]} for m in prompt],
            "solution": answer["content"],
        }

    return load_rows(
        "mixture-of-thoughts", path, split, make_problem,
        config=config, default_config="all", size=size, skip=skip, source=HUB_ID,
    )  # fmt: skip
