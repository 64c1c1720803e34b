"""SmolTalk: 1.1M conversations for instruction tuning (Allal et al. 2025, arXiv:2502.02737): the
general data to be mixed among traces, as in R1.

Hub id `HuggingFaceTB/smoltalk`, configuration all; splits train and test. Licence: see the card.
Rows: `messages`, of which the last one is the assistant's, and `source`.

Rows have an answer to learn from and none to compare with: `kind` is text. `sources` keeps rows of
these; the default leaves out those of mathematics, programs and function calls.
"""

from collections.abc import Iterator

from r1pipe.data.rows import Unwanted, load_rows

HUB_ID = "HuggingFaceTB/smoltalk"
NOT_GENERAL = ("apigen-80k", "metamathqa-50k", "numina-cot-100k", "self-oss-instruct")


def load(
    split: str = "train",
    *,
    path: str = HUB_ID,
    config: str | None = None,
    sources: list[str] | None = None,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        origin = row["source"]
        if origin in NOT_GENERAL if sources is None else origin not in sources:
            raise Unwanted("other sources")
        *prompt, answer = row["messages"]
        if answer["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
        return {
            "kind": "text",
            "prompt": [{"role": m["role"], "content": m["content"]} for m in prompt],
            "solution": answer["content"],
            "category": origin,
        }

    return load_rows(
        "smoltalk",
        path,
        split,
        make_problem,
        config=config,
        default_config="all",
        size=size,
        skip=skip,
        source=HUB_ID,
    )
