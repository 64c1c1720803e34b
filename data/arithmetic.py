"""Multi-step arithmetic told as short word problems, generated; nothing is downloaded.

A problem tells a start value and two to four changes of it; the answer is the final value:

    Mia has 7 apples. Monday brings 3. Tuesday takes 9. Wednesday adds 2. How many apples now?

Its `solution` is a trace for the cold start. A full trace writes out every step, each quoting what
it computes ("Monday brings 3: 7+3=10"). A share of `guess_share` of the traces stops working after
a random number of steps and states the answer from there, so a policy trained on them holds both
habits, thinking to the end and guessing early, and reinforcement learning has to find out which
one pays: what R1-Zero's accuracy and response length, rising together, show (Guo et al. 2025,
arXiv:2501.12948, section 2.2), at laptop size.

Three more options make what R1's recipe has besides (section 2.3). `mixed_share` of the traces tell
some of their lines in Chinese, as a base model does that was pretrained on both, and `plain_share`
have no `<think>` and no box ("The answer is 10."): together a stand-in for pretraining.
`fact_share` of the problems ask for a number that the story says ("How many on Monday?") and not
for the sum; their solutions answer without thinking, a stand-in for R1's general data.

Splits are disjoint by construction: the *skeleton* (start value and signed changes, whatever the
names and things) decides the split by a hash, so no held-out sum ever occurs in training under
other names. `r1pipe` checks this again by its decontamination code.

Row schema: data/README.md. License: generated, no rights reserved.
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

CHINESE_DAYS = ["周一", "周二", "周三", "周四", "周五", "周六"]
CHINESE_VERBS = {"+": "加", "-": "减"}

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
    mixed_share: float = 0.0,
    plain_share: float = 0.0,
    fact_share: float = 0.0,
) -> Iterator[dict]:
    """Yield `size` problems of `split` ("train" or "test"), the same ones for the same arguments.

    `guess_share`, `mixed_share` and `plain_share` concern `solution` only: the problems do not
    depend on them.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": arithmetic has "train" and "test"')
    if not 1 <= min_steps <= max_steps <= len(DAYS):
        raise ValueError(f"min_steps {min_steps}, max_steps {max_steps}: 1 to {len(DAYS)} are told")
    rng = random.Random(f"arithmetic/{split}/{seed}")
    habits = random.Random(f"arithmetic/{split}/{seed}/habits")
    # Streams of their own: what one option draws changes nothing of the others.
    languages, forms, questions = (
        random.Random(f"arithmetic/{split}/{seed}/{name}") for name in ("mixed", "plain", "facts")
    )
    seen = set()
    misses = 0
    while len(seen) < size:
        if misses > 10_000:  # in a row: there may be no more
            raise ValueError(
                f"options.size {size}: {len(seen)} different problems are all there are"
            )
        misses += 1
        num_steps = rng.randint(min_steps, max_steps)
        start, changes = draw_skeleton(rng, num_steps, max_value, max_change)
        skeleton = f"{start}{''.join(f'{c:+d}' for c in changes)}"
        if split_of(skeleton) != split or skeleton in seen:
            continue
        seen.add(skeleton)
        misses = 0
        worked = len(changes)
        if habits.random() < guess_share:
            worked = habits.randrange(len(changes))
        person, thing, events = tell(rng, start, changes)
        question, answer = f"How many {thing} now?", str(start + sum(changes))
        category = f"{len(changes)} steps"
        quotes = mix_languages(languages, changes, events, mixed_share)
        plain = forms.random() < plain_share
        solution = write_trace(start, changes, quotes, worked, plain=plain)
        if questions.random() < fact_share:
            question, answer = ask_fact(questions, start, changes)
            category, solution = "fact", f"The answer is {answer}."
        sentences = [f"{person} has {start} {thing}", *events, question]
        yield {
            "id": f"arithmetic-{split}-{seed}-{len(seen) - 1}",
            "kind": "math",
            "prompt": [{"role": "user", "content": ". ".join(sentences)}],
            "answer": answer,
            "solution": solution,
            "source": "arithmetic",
            "category": category,
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


def tell(rng: random.Random, start: int, changes: list[int]) -> tuple[str, str, list[str]]:
    """Who has what, and the story's events ("Monday brings 3"), one per change."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    gains, losses = (iter(rng.sample(verbs, len(verbs))) for verbs in (GAINS, LOSSES))
    events = [
        f"{day} {next(gains if change > 0 else losses)} {abs(change)}"
        for day, change in zip(DAYS, changes)
    ]
    return person, thing, events


def ask_fact(rng: random.Random, start: int, changes: list[int]) -> tuple[str, str]:
    """A question about a number that the story says, and its answer."""
    numbers = {"at first": start, **{f"on {day}": abs(c) for day, c in zip(DAYS, changes)}}
    when = rng.choice(list(numbers))
    return f"How many {when}?", str(numbers[when])


def mix_languages(
    rng: random.Random, changes: list[int], events: list[str], mixed_share: float
) -> list[str]:
    """The events as a trace quotes them: in a share of `mixed_share` of the traces each one in
    Chinese with a probability of one half."""
    mixed = rng.random() < mixed_share
    return [
        f"{day}{CHINESE_VERBS[f'{change:+d}'[0]]}{abs(change)}"
        if rng.random() < 0.5 and mixed
        else event
        for day, change, event in zip(CHINESE_DAYS, changes, events)
    ]


def write_trace(
    start: int, changes: list[int], quotes: list[str], worked: int, *, plain: bool = False
) -> str:
    """The first `worked` steps written out, in `<think>`, then the boxed answer; `plain`: without
    either."""
    value, lines = start, []
    for change, quote in zip(changes[:worked], quotes):
        lines.append(f"{quote}: {value}{change:+d}={value + change}\n")
        value += change
    steps, answer = "".join(lines), start + sum(changes)
    if plain:
        return f"{steps}The answer is {answer}."
    return f"<think>\n{steps}</think>\n\\boxed{{{answer}}}"
