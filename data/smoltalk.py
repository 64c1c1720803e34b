"""SmolTalk: 1.1M conversations for instruction tuning (Allal et al. 2025, arXiv:2502.02737): the
general data to mix among traces, as in R1.

Hub id `HuggingFaceTB/smoltalk`, configuration all; splits train and test. License: see the card.
Rows: `messages`, of which the last one is the assistant's, and `source`.

Rows have an answer to learn and none to judge by: `kind` is text. `sources` keeps rows of these;
the default leaves out mathematics, programs and function calls.
"""

from r1pipe.data.rows import Unwanted, make_load, map_conversation

HUB_ID = "HuggingFaceTB/smoltalk"
NOT_GENERAL = ("apigen-80k", "metamathqa-50k", "numina-cot-100k", "self-oss-instruct")


def make_problem(row: dict, *, sources: list[str] | None = None) -> dict:
    origin = row["source"]
    if origin in NOT_GENERAL if sources is None else origin not in sources:
        raise Unwanted("other sources")
    return {**map_conversation(row["messages"]), "category": origin}


load = make_load("smoltalk", HUB_ID, make_problem, default_config="all", has_configs=True)
