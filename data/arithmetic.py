"""Multi-step arithmetic told as short word problems, generated; nothing is downloaded.

A problem tells a start value and two to four changes of it; the answer is the final value:

    Mia has 7 apples. Monday brings 3. Tuesday takes 9. Wednesday adds 2. How many apples now?

Its `solution` is a trace for the cold start. A full trace writes out every step and quotes what it
computes ("Monday brings 3: 7+3=10"). A `guess_share` of the traces stops working after a random
number of steps and states the answer from there. A policy trained on them has both habits, working
to the end and guessing early, and reinforcement learning finds out which one pays: accuracy and
response length rise together as in R1-Zero (Guo et al. 2025, arXiv:2501.12948, section 2.2), at
laptop size.

Three more options cover the rest of R1's recipe (section 2.3). A `mixed_share` of the traces has
some lines in Chinese, like a base model pretrained on both languages, and a `plain_share` has no
`<think>` and no box ("The answer is 10."): together a stand-in for pretraining. A `fact_share` of
the problems asks for a number in the story ("How many on Monday?") instead of the sum; their
solutions answer without thinking, a stand-in for R1's general data.

With `language: zh` problems are told, and worked out, in Chinese:

    小明有7个苹果。周一加3。周二减9。周三加2。现在有几个苹果？

Their `source` is "arithmetic-zh", for a recipe that trains on both languages and tells them apart.

Splits are disjoint by construction: a hash of the *skeleton* (start value and signed changes)
decides the split, so no held-out sum occurs in training under other names. `r1pipe`'s
decontamination checks this again.

Row schema: data/README.md. License: generated, no rights reserved.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

LICENSE = "cc0-1.0"

PEOPLE = ["Mia", "Tom", "Ana", "Ben", "Eva", "Sam"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "nuts"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
# As many of each as days, so no verb occurs twice in a story: between two "buys", a policy of a
# million parameters loses its place one time in ten.
GAINS = ["brings", "adds", "gives", "yields", "sends", "earns"]
LOSSES = ["takes", "costs", "eats", "wastes", "burns", "drops"]

CHINESE_PEOPLE = ["小明", "小红", "小丽", "小刚", "小芳", "小军"]
CHINESE_THINGS = ["苹果", "书", "硬币", "卡片", "鸡蛋", "坚果"]
CHINESE_DAYS = ["周一", "周二", "周三", "周四", "周五", "周六"]
CHINESE_VERBS = {"+": "加", "-": "减"}

TEST_SHARE = 0.1
"""Share of skeletons in the test split."""


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
    language: Literal["en", "zh"] = "en",
) -> Iterator[dict]:
    """Yield `size` problems of `split` ("train" or "test"), the same for the same arguments.

    `guess_share`, `mixed_share` and `plain_share` change `solution` only.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": arithmetic has "train" and "test"')
    if not 1 <= min_steps <= max_steps <= len(DAYS):
        raise ValueError(
            f"min_steps {min_steps}, max_steps {max_steps}: there are 1 to {len(DAYS)} steps"
        )
    if language == "zh" and (mixed_share or plain_share or fact_share):
        raise ValueError("mixed_share, plain_share and fact_share are of problems in English")
    source = "arithmetic" if language == "en" else f"arithmetic-{language}"
    rng = random.Random(f"arithmetic/{split}/{seed}")
    habits = random.Random(f"arithmetic/{split}/{seed}/habits")
    # One random stream per option, so that they do not affect each other.
    languages, forms, questions = (
        random.Random(f"arithmetic/{split}/{seed}/{name}") for name in ("mixed", "plain", "facts")
    )
    skeletons = draw_distinct(rng, split, size, (min_steps, max_steps), max_value, max_change)
    for number, (start, changes) in enumerate(skeletons):
        worked = len(changes)
        if habits.random() < guess_share:
            worked = habits.randrange(len(changes))
        story, events, question = TELL[language](rng, start, changes)
        answer = str(start + sum(changes))
        category = f"{len(changes)} steps"
        quotes = mix_languages(languages, changes, events, mixed_share)
        plain = forms.random() < plain_share
        solution = write_trace(start, changes, quotes, worked, plain=plain)
        if questions.random() < fact_share:
            question, answer = ask_fact(questions, start, changes)
            category, solution = "fact", f"The answer is {answer}."
        yield {
            "id": f"{source}-{split}-{seed}-{number}",
            "kind": "math",
            "prompt": [{"role": "user", "content": story + question}],
            "answer": answer,
            "solution": solution,
            "source": source,
            "category": category,
        }


def draw_distinct(
    rng: random.Random,
    split: str,
    size: int,
    num_steps: tuple[int, int],
    max_value: int,
    max_change: int,
) -> Iterator[tuple[int, list[int]]]:
    """`size` different skeletons of the split, of `num_steps` (least, most) changes."""
    seen = set()
    misses = 0
    while len(seen) < size:
        if misses > 10_000:  # in a row: probably there are no more
            raise ValueError(f"options.size {size}: there are only {len(seen)} different problems")
        misses += 1
        start, changes = draw_skeleton(rng, rng.randint(*num_steps), max_value, max_change)
        skeleton = f"{start}{''.join(f'{c:+d}' for c in changes)}"
        if split_of(skeleton) == split and skeleton not in seen:
            seen.add(skeleton)
            misses = 0
            yield start, changes


def draw_skeleton(
    rng: random.Random, num_steps: int, max_value: int, max_change: int
) -> tuple[int, list[int]]:
    """A start value and signed changes; the running value stays within 0..max_value."""
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
    """A skeleton's split, by a hash that is the same on every machine."""
    share = int.from_bytes(hashlib.sha256(skeleton.encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def tell(rng: random.Random, start: int, changes: list[int]) -> tuple[str, list[str], str]:
    """The story, its events ("Monday brings 3"), one per change, and the question."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    gains, losses = (iter(rng.sample(verbs, len(verbs))) for verbs in (GAINS, LOSSES))
    events = [
        f"{day} {next(gains if change > 0 else losses)} {abs(change)}"
        for day, change in zip(DAYS, changes)
    ]
    story = ". ".join([f"{person} has {start} {thing}", *events, ""])
    return story, events, f"How many {thing} now?"


def tell_in_chinese(
    rng: random.Random, start: int, changes: list[int]
) -> tuple[str, list[str], str]:
    person, thing = rng.choice(CHINESE_PEOPLE), rng.choice(CHINESE_THINGS)
    events = translate(changes)
    story = "。".join([f"{person}有{start}个{thing}", *events, ""])
    return story, events, f"现在有几个{thing}？"


TELL = {"en": tell, "zh": tell_in_chinese}


def translate(changes: list[int]) -> list[str]:
    """The events in Chinese: of one verb for each sign, but of different days."""
    return [
        f"{day}{CHINESE_VERBS['+' if change > 0 else '-']}{abs(change)}"
        for day, change in zip(CHINESE_DAYS, changes)
    ]


def ask_fact(rng: random.Random, start: int, changes: list[int]) -> tuple[str, str]:
    """A question about a number in the story, and its answer."""
    numbers = {"at first": start, **{f"on {day}": abs(c) for day, c in zip(DAYS, changes)}}
    when = rng.choice(list(numbers))
    return f"How many {when}?", str(numbers[when])


def mix_languages(
    rng: random.Random, changes: list[int], events: list[str], mixed_share: float
) -> list[str]:
    """The events as the trace quotes them: in a `mixed_share` of the traces, each one in Chinese
    with probability 1/2."""
    mixed = rng.random() < mixed_share
    return [
        in_chinese if rng.random() < 0.5 and mixed else event
        for in_chinese, event in zip(translate(changes), events)
    ]


def write_trace(
    start: int, changes: list[int], quotes: list[str], worked: int, *, plain: bool = False
) -> str:
    """The first `worked` steps in `<think>`, then the boxed answer; `plain`: no tags, no box."""
    value, lines = start, []
    for change, quote in zip(changes[:worked], quotes):
        lines.append(f"{quote}: {value}{change:+d}={value + change}\n")
        value += change
    steps, answer = "".join(lines), start + sum(changes)
    if plain:
        return f"{steps}The answer is {answer}."
    return f"<think>\n{steps}</think>\n\\boxed{{{answer}}}"
