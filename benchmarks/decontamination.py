"""Speed, recall and false positives of decontamination.

    .venv/bin/python benchmarks/decontamination.py
    .venv/bin/python benchmarks/decontamination.py --heldout test.jsonl --training train.jsonl

All text is generated, so every copy is known: 500 held-out problems with lengths like MATH's (a
tenth of them shorter than 13 words), and 100,000 training rows with prompts of 60 to 120 words and
traces of about 500, with the vocabulary and word frequencies (Zipf) of mathematical prose. Some
rows are copies of held-out problems with one change each; the second table has the share found by
kind of change. A hit among the other rows is a false positive.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from r1pipe.data.decontamination import OverlapIndex, decontaminate, split_words
from r1pipe.types import Problem
from r1pipe.utils.jsonl import read_jsonl

NGRAM = 13
NUM_SHOWN = 8
VOCABULARY = 20_000
PHRASES = (
    "find the value of", "what is the smallest positive integer", "let x be a real number",
    "so we have", "we need to find the number of", "on the other hand", "divide both sides by",
    "express your answer as a common fraction", "the probability that", "it follows that",
)  # fmt: skip


class Prose:
    """Words by Zipf's law, with some stock phrases, numbers and formulas."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgkqjxz"
        self.words = [
            "".join(self.rng.choices(letters, k=self.rng.randint(2, 9))) for _ in range(VOCABULARY)
        ]
        self.weights = list(accumulate(1 / (rank + 3) for rank in range(VOCABULARY)))

    def write(self, num_words: int) -> str:
        rng, parts = self.rng, []
        while (left := num_words - sum(part.count(" ") + 1 for part in parts)) > 0:
            kind = rng.random()
            if kind < 0.04 and left > 8 and parts[-1:] and parts[-1] not in PHRASES:
                parts.append(rng.choice(PHRASES))
            elif kind < 0.12:
                parts.append(f"${rng.randint(2, 99)}x+{rng.randint(2, 999)}$")
            else:
                count = min(left, 8)
                words = rng.choices(self.words, cum_weights=self.weights, k=count)
                parts.append(" ".join(words) + rng.choice([",", ".", "", "", "\n"]))
        return " ".join(parts)


def make_problem(name: str, text: str, solution: str | None = None) -> Problem:
    prompt = [{"role": "user", "content": text}]
    return Problem(name, "math", prompt, answer="1", solution=solution, source="made")


def replace_each(rng: random.Random, text: str, every: int) -> str:
    words = text.split(" ")
    for i in range(rng.randrange(every), len(words), every):
        words[i] = "another"
    return " ".join(words)


def shuffle_clauses(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    clauses = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    rng.shuffle(clauses)
    return " ".join(clauses)


CHANGES: dict[str, Callable[[random.Random, str], str]] = {
    "none": lambda rng, text: text,
    "capitals and punctuation": lambda rng, text: text.upper().replace(",", ";").replace(".", " !"),
    "a sentence before and after": lambda rng, text: f"Here is one. {text} Explain it well.",
    "one word in 20 replaced": lambda rng, text: replace_each(rng, text, 20),
    "one word in 10 replaced": lambda rng, text: replace_each(rng, text, 10),
    "clauses of 10 words in another order": shuffle_clauses,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--heldout", type=Path, help="JSONL with `question`, instead of made-up problems"
    )
    parser.add_argument(
        "--training", type=Path, help="JSONL with `question` and `solution`: its overlap"
    )
    options = parser.parse_args()
    if options.heldout and options.training:
        compare_files(options.heldout, options.training)
        return

    prose, rng = Prose(0), random.Random(1)
    lengths = [rng.randint(5, 12) if i % 10 == 0 else rng.randint(15, 110) for i in range(500)]
    heldout = [make_problem(f"h{i}", prose.write(length)) for i, length in enumerate(lengths)]
    print(f"making {options.rows} rows", flush=True)
    traces = [prose.write(rng.randint(400, 600)) for _ in range(2_000)]
    rows = []
    for i in range(options.rows):
        # An old trace from another start: writing new ones would take longer than all the rest.
        trace = rng.choice(traces)
        start = rng.randrange(len(trace))
        prompt = prose.write(rng.randint(60, 120))
        rows.append(make_problem(str(i), prompt, trace[start:] + trace[:start]))

    started, cpu_started = time.perf_counter(), time.process_time()
    result = decontaminate(rows, heldout, NGRAM)
    seconds = time.perf_counter() - started
    print(f"{time.process_time() - cpu_started:.1f} s of one core's time")
    num_words = sum(len(split_words(row.question + " " + row.solution)) for row in rows[:1000])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n| rows | words a row | held-out | seconds | rows/s | found (false) | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {len(rows):,} | {num_words / 1000:.0f} | {len(heldout)} | {seconds:.1f} "
        f"| {len(rows) / seconds:,.0f} | {result.num_dropped} | {peak:.1f} |"
    )

    index = OverlapIndex(heldout, NGRAM)
    print("\n| change of the copy | long: prompt | long: trace | short: prompt | short: trace |")
    print("|---|---|---|---|---|")
    long = [p for p in heldout if len(split_words(p.question)) >= NGRAM]
    short = [p for p in heldout if len(split_words(p.question)) < NGRAM]
    for name, change in CHANGES.items():
        cells = []
        for problems in (long, short):
            copies = [change(rng, p.question) for p in problems]
            inside = [f"{prose.write(200)}\n{copy}\n{prose.write(200)}" for copy in copies]
            for texts, are_traces in ((copies, False), (inside, True)):
                found = index.find_texts(texts, are_traces)
                share = sum(p.id in ids for p, ids in zip(problems, found)) / len(problems)
                cells.append(f"{share:.0%}")
        print(f"| {name} | {' | '.join(cells)} |")


def compare_files(heldout_file: Path, training_file: Path) -> None:
    heldout = [make_problem(f"h{n}", row["question"]) for n, row in read_jsonl(heldout_file)]
    rows = [
        make_problem(str(n), row["question"], row.get("solution"))
        for n, row in read_jsonl(training_file)
    ]
    started = time.perf_counter()
    result = decontaminate(rows, heldout, NGRAM)
    seconds = time.perf_counter() - started
    print(
        f"{result.num_dropped} of {len(rows)} rows overlap with {len(heldout)} held-out problems "
        f"({result.num_dropped_for_trace} in their trace only), {seconds:.1f} s"
    )
    kept = {problem.id for problem in result.kept}
    index, by_id = OverlapIndex(heldout, NGRAM), {problem.id: problem for problem in heldout}
    for row in [row for row in rows if row.id not in kept][:NUM_SHOWN]:
        print(f"- {row.question}\n  {[by_id[i].question for i in sorted(*index.find_rows([row]))]}")


if __name__ == "__main__":
    main()
