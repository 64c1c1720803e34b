"""Word problems with a product that has to be computed, for a policy that may call a calculator.

A problem tells how many boxes of bags of things somebody has, and one or two changes:

    Mia has 17 boxes of 8 bags of 13 eggs. Monday brings 9. Tuesday eats 14. How many eggs now?

The answer has four digits. A million parameters can copy such numbers and not multiply them. A
`solution` writes them down as one call of the tool, reads the result and gives the answer; a
`guess_share` of the traces states the answer at once. A policy trained on them has both habits and
guesses wrong; reinforcement learning finds out that calling pays.

Splits are disjoint by construction: a hash of the expression decides.

Row schema: data/README.md. License: generated, no rights reserved.
"""

import hashlib
import math
import random
from collections.abc import Iterator

from r1pipe.envs.calculator import calculator
from r1pipe.envs.tools import describe_tool

LICENSE = "cc0-1.0"

PEOPLE = ["Mia", "Tom", "Ana", "Ben", "Eva", "Sam"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "nuts"]
DAYS = ["Monday", "Tuesday"]
# No verb twice in a story, as in arithmetic.py.
VERBS = [{"+": "brings", "-": "takes"}, {"+": "adds", "-": "eats"}]

MAX_NUMBER = 19
"""In a story: each number is a token of a small vocabulary, so that it can be copied."""
TEST_SHARE = 0.1
"""Share of expressions in the test split."""


def load(
    split: str = "train", *, size: int = 1000, seed: int = 0, guess_share: float = 0.0
) -> Iterator[dict]:
    """Yield `size` problems of `split` ("train" or "test"), the same for the same arguments.

    `guess_share` changes `solution` only.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": products has "train" and "test"')
    rng = random.Random(f"products/{split}/{seed}")
    habits = random.Random(f"products/{split}/{seed}/habits")
    tools = [describe_tool(calculator)]
    seen: set[str] = set()
    while len(seen) < size:
        factors, changes = draw_numbers(rng)
        expression = f"{'*'.join(map(str, factors))}{''.join(f'{c:+d}' for c in changes)}"
        if split_of(expression) != split or expression in seen:
            continue
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        events = [
            f"{day} {verbs[f'{change:+d}'[0]]} {abs(change)}"
            for day, verbs, change in zip(DAYS, VERBS, changes)
        ]
        answer = str(math.prod(factors) + sum(changes))
        guesses = habits.random() < guess_share
        boxes, bags, single = factors
        start = f"{person} has {boxes} boxes of {bags} bags of {single} {thing}"
        yield {
            "id": f"products-{split}-{seed}-{len(seen)}",
            "kind": "math",
            "prompt": [
                {"role": "user", "content": ". ".join([start, *events, f"How many {thing} now?"])}
            ],
            "answer": answer,
            "solution": write_trace(None if guesses else expression, answer),
            "source": "products",
            "category": f"{len(changes)} change{'s' * (len(changes) > 1)}",
            "tools": tools,
        }
        seen.add(expression)


def draw_numbers(rng: random.Random) -> tuple[list[int], list[int]]:
    """Three factors and signed changes, for an answer of four digits."""
    while True:
        factors = [rng.randint(2, MAX_NUMBER) for _ in range(3)]
        num_changes = rng.randint(1, len(DAYS))
        changes = [rng.choice((-1, 1)) * rng.randint(2, MAX_NUMBER) for _ in range(num_changes)]
        if 1000 <= math.prod(factors) + sum(changes) < 10_000:
            return factors, changes


def split_of(expression: str) -> str:
    """An expression's split, by a hash that is the same on every machine."""
    share = int.from_bytes(hashlib.sha256(expression.encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def write_trace(expression: str | None, answer: str) -> list[dict]:
    """The turns of a call and of the answer; without an expression only a guess, in other words, so
    that every number in a box is one to be copied."""
    if expression is None:
        return [{"role": "assistant", "content": f"The answer is {answer}."}]
    function = {"name": "calculator", "arguments": {"expression": expression}}
    call = {"type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": answer},
        {"role": "assistant", "content": f"\\boxed{{{answer}}}"},
    ]
