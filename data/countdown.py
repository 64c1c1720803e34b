"""Countdown: make a target from given numbers with + - * /, for `rewards.countdown_correct`.

Generated if there is no `path`: `size` problems of `num_numbers` numbers, splits train and test
disjoint by a hash of numbers and target. `path` is a hub id such as
`Jiayi-Pan/Countdown-Tasks-3to4` (490k rows: `nums`, `target`; license: see the card) or a file of
such rows, or of reasoning-gym's (`question`, `numbers`, `target`, `solution`).

Every number has to be used exactly once.
"""

import hashlib
import random
from collections.abc import Iterator

from r1pipe.data.rows import ask, load_rows, write_trace

LICENSE = "cc0-1.0"

INSTRUCTION = (
    "Reason step by step within <think> and </think>, then give the expression in \\boxed{}."
)
TEST_SHARE = 0.1


def load(
    split: str = "train",
    *,
    path: str | None = None,
    system: str | None = INSTRUCTION,
    size: int | None = None,
    skip: int = 0,
    seed: int = 0,
    num_numbers: int = 4,
    max_number: int = 99,
    max_target: int = 999,
) -> Iterator:
    def make_problem(row: dict) -> dict:
        numbers = row["nums"] if "nums" in row else row["numbers"]
        target = int(row["target"])
        given = ", ".join(str(int(number)) for number in numbers)
        worked = row.get("solution")
        return {
            "kind": "task",
            "prompt": ask(
                f"Make {target} from the numbers {given} with + - * / and brackets. Use every "
                "number exactly once.",
                system,
            ),
            "tests": {"numbers": [int(number) for number in numbers], "target": target},
            "solution": write_trace(f"{worked} = {target}", worked) if worked else None,
        }

    rows = path or generate(split, seed, num_numbers, max_number, max_target)
    if path is None and size is None:
        size = 1000
    name, source = f"countdown-{seed}", path or "countdown"
    return load_rows(name, rows, split, make_problem, size=size, skip=skip, source=source)


def generate(
    split: str, seed: int, num_numbers: int, max_number: int, max_target: int
) -> Iterator[dict]:
    """Rows: numbers, and a target that an expression of all of them gives. Raises ValueError when
    there are no more."""
    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": countdown has "train" and "test"')
    rng = random.Random(f"countdown/{split}/{seed}")
    seen: set[str] = set()
    misses = 0
    while misses < 100_000:  # in a row: probably there are no more
        misses += 1
        numbers = [rng.randint(1, max_number) for _ in range(num_numbers)]
        target, expression = combine(rng, numbers)
        key = f"{sorted(numbers)} {target}"
        if not 1 <= target <= max_target or key in seen or split_of(key) != split:
            continue
        seen.add(key)
        misses = 0
        yield {"numbers": numbers, "target": target, "solution": expression}
    raise ValueError(f"options.size: there are only {len(seen)} different problems")


def combine(rng: random.Random, numbers: list[int]) -> tuple[int, str]:
    """The value and text of a random expression of all numbers, an integer at every step."""
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (a, left), (b, right), *rest = parts
        results = {"+": a + b, "-": a - b, "*": a * b}
        if b and a % b == 0:
            results["/"] = a // b
        sign = rng.choice(sorted(results))
        parts = [(results[sign], f"({left} {sign} {right})"), *rest]
    value, expression = parts[0]
    return value, expression[1:-1]


def split_of(key: str) -> str:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "test" if share < TEST_SHARE else "train"
