"""Multi-step arithmetic told as short word problems, generated; nothing is downloaded.

A problem tells a start value and two to four changes of it; the answer is the final value:

    Mia has 7 apples. Monday brings 3. Tuesday takes 9. Wednesday adds 2. How many apples now?

Its `solution` is a trace for the cold start. A full trace writes out every step, each quoting what
it computes ("Monday brings 3: 7+3=10"). A share of `guess_share` of the traces stops working after
a random number of steps and states the answer from there, so a policy trained on them holds both
habits, thinking to the end and guessing early, and reinforcement learning has to find out which
one pays: what R1-Zero's accuracy and response length, rising together, show (Guo et al. 2025,
arXiv:2501.12948, section 2.2), at laptop size.

Splits are disjoint by construction: the *skeleton* (start value and signed changes, whatever the
names and things) decides the split by a hash, so no held-out sum ever occurs in training under
other names. `r1pipe` checks this again by its decontamination code.

Row schema: data/README.md. Licence: generated, no rights reserved.
"""

import hashlib
import random
from collections.abc import Iterator

LICENSE = "cc0-1.0"

PEOPLE = ["Mia", "Tom", "Ana", "Ben", "Eva", "Sam"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "nuts"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
# At least as many of each as days: no verb occurs twice in a story, so a step's place in it is
# plain to a policy of a million parameters, which loses it between two "buys" one time in ten.
GAINS = ["brings", "adds", "gives", "yields", "sends", "earns"]
LOSSES = ["takes", "costs", "eats", "wastes", "burns", "drops"]

TEST_SHARE = 0.1
"""Share of all skeletons that belongs to the test split."""


def load(
    split: str = "train",
    *,
    size: int = 1000,
    seed: int = 0,
    min_steps: int = 2,
    max_steps: int = 4,
    max_value: int = 20,
    max_change: int = 9,
    guess_share: float = 0.0,
) -> Iterator[dict]:
    """Yield `size` problems of `split` ("train" or "test"), the same ones for the same arguments.

    `guess_share` concerns `solution` only: the problems do not depend on it.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": arithmetic has "train" and "test"')
    if not 1 <= min_steps <= max_steps <= len(DAYS):
        raise ValueError(f"min_steps {min_steps}, max_steps {max_steps}: 1 to {len(DAYS)} are told")
    rng = random.Random(f"arithmetic/{split}/{seed}")
    habits = random.Random(f"arithmetic/{split}/{seed}/habits")
    seen = set()
    while len(seen) < size:
        num_steps = rng.randint(min_steps, max_steps)
        start, changes = draw_skeleton(rng, num_steps, max_value, max_change)
        skeleton = f"{start}{''.join(f'{c:+d}' for c in changes)}"
        if split_of(skeleton) != split or skeleton in seen:
            continue
        seen.add(skeleton)
        worked = len(changes)
        if habits.random() < guess_share:
            worked = habits.randrange(len(changes))
        story, events = tell(rng, start, changes)
        yield {
            "id": f"arithmetic-{split}-{seed}-{len(seen) - 1}",
            "kind": "math",
            "prompt": [{"role": "user", "content": story}],
            "answer": str(start + sum(changes)),
            "solution": write_trace(start, changes, events, worked),
            "source": "arithmetic",
            "category": f"{len(changes)} steps",
        }


def draw_skeleton(
    rng: random.Random, num_steps: int, max_value: int, max_change: int
) -> tuple[int, list[int]]:
    """A start value and signed changes whose running value stays within 0..max_value."""
    start = value = rng.randint(1, max_value)
    changes = []
    for _ in range(num_steps):
        options = [
            c for c in range(-max_change, max_change + 1) if c and 0 <= value + c <= max_value
        ]
        changes.append(rng.choice(options))
        value += changes[-1]
    return start, changes


def split_of(skeleton: str) -> str:
    """The split a skeleton belongs to, by a hash that is the same on every machine."""
    share = int.from_bytes(hashlib.sha256(skeleton.encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def tell(rng: random.Random, start: int, changes: list[int]) -> tuple[str, list[str]]:
    """The sum as a story, and its events ("Monday brings 3"), one per change."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    gains, losses = (iter(rng.sample(verbs, len(verbs))) for verbs in (GAINS, LOSSES))
    events = [
        f"{day} {next(gains if change > 0 else losses)} {abs(change)}"
        for day, change in zip(DAYS, changes)
    ]
    sentences = [f"{person} has {start} {thing}", *events, f"How many {thing} now?"]
    return ". ".join(sentences), events


def write_trace(start: int, changes: list[int], events: list[str], worked: int) -> str:
    """`<think>` with the first `worked` steps written out, then the boxed answer."""
    value, lines = start, []
    for change, event in zip(changes[:worked], events):
        lines.append(f"{event}: {value}{change:+d}={value + change}\n")
        value += change
    return f"<think>\n{''.join(lines)}</think>\n\\boxed{{{start + sum(changes)}}}"
