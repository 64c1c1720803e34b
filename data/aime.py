"""AIME 2024 and 2025: 30 problems a year, each answer an integer from 0 to 999, for evaluation.

`year: 2024` is hub id `HuggingFaceH4/aime_2024` (there its split is called train), rows `problem`,
`answer`, `solution`, `url`; `year: 2025` is `math-ai/aime25`, rows `problem`, `answer`. License:
see the cards; the problems are the Mathematical Association of America's. The only split is test.
"""

from collections.abc import Iterator

from r1pipe.data.rows import MATH_INSTRUCTION, ask, load_rows

HUB = {2024: ("HuggingFaceH4/aime_2024", "train"), 2025: ("math-ai/aime25", "test")}


def load(
    split: str = "test",
    *,
    year: int = 2024,
    path: str | None = None,
    system: str | None = MATH_INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    if split != "test" or year not in HUB:
        years = " and ".join(map(str, HUB))
        raise ValueError(f'split "{split}" of {year}: there is "test" of {years}')
    hub_id, hub_split = HUB[year]

    def make_problem(row: dict) -> dict:
        return {
            "kind": "math",
            "prompt": ask(row["problem"], system),
            "answer": str(int(row["answer"])),
        }

    return load_rows(
        f"aime-{year}", path or hub_id, hub_split, make_problem, size=size, skip=skip, source=hub_id
    )
