"""Word problems with a product that has to be computed, for a policy that may call a calculator.

A problem tells how many boxes of how many things there are, and none to two changes:

    Mia has 47 boxes of 38 eggs. Monday brings 29. Tuesday takes 64. How many eggs now?

A million parameters can copy such numbers and not multiply them. A `solution` writes them down as
one call of the tool, reads the result and gives the answer; a `guess_share` of the traces states
the answer at once. A policy trained on them has both habits and mostly guesses wrong;
reinforcement learning finds out that calling pays.

Splits are disjoint by construction: a hash of the expression decides.

Row schema: data/README.md. License: generated, no rights reserved.
"""

import hashlib
import random
from collections.abc import Iterator

from r1pipe.envs.calculator import calculator
from r1pipe.envs.tools import describe_tool

LICENSE = "cc0-1.0"

PEOPLE = ["Mia", "Tom", "Ana", "Ben", "Eva", "Sam"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "nuts"]
DAYS = ["Monday", "Tuesday"]
VERBS = {"+": "brings", "-": "takes"}

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
        first, second, changes = draw_numbers(rng)
        expression = f"{first}*{second}{''.join(f'{change:+d}' for change in changes)}"
        if split_of(expression) != split or expression in seen:
            continue
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        events = [
            f"{day} {VERBS[f'{change:+d}'[0]]} {abs(change)}" for day, change in zip(DAYS, changes)
        ]
        answer = str(first * second + sum(changes))
        guesses = habits.random() < guess_share
        start = f"{person} has {first} boxes of {second} {thing}"
        yield {
            "id": f"products-{split}-{seed}-{len(seen)}",
            "kind": "math",
            "prompt": [
                {"role": "user", "content": ". ".join([start, *events, f"How many {thing} now?"])}
            ],
            "answer": answer,
            "solution": write_trace(None if guesses else expression, answer),
            "source": "products",
            "category": f"{len(changes)} changes",
            "tools": tools,
        }
        seen.add(expression)


def draw_numbers(rng: random.Random) -> tuple[int, int, list[int]]:
    """Two factors of two digits, and changes that are smaller than any of their products."""
    first, second = rng.randint(12, 99), rng.randint(12, 99)
    changes = [rng.choice((-1, 1)) * rng.randint(11, 71) for _ in range(rng.randint(0, len(DAYS)))]
    return first, second, changes


def split_of(expression: str) -> str:
    """An expression's split, by a hash that is the same on every machine."""
    share = int.from_bytes(hashlib.sha256(expression.encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def write_trace(expression: str | None, answer: str) -> list[dict]:
    """The turns of a call and of the answer; without an expression only the answer."""
    said = {"role": "assistant", "content": f"\\boxed{{{answer}}}"}
    if expression is None:
        return [said]
    function = {"name": "calculator", "arguments": {"expression": expression}}
    call = {"type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": answer},
        said,
    ]
