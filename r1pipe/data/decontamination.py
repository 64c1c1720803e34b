"""Keeps held-out problems out of training: n-gram overlap of prompts and traces.

A training row overlaps with a held-out question if its prompt or trace shares `ngram` words in a
row with it (Brown et al. 2020, arXiv:2005.14165, appendix C, 13-grams). Case and punctuation do not
count. Questions without such an n-gram of their own, because they are short or little more than
their set's instruction, are compared whole, with their operators: a prompt that contains one, or a
line of a trace that equals one, overlaps.

Words that a tenth of a set's questions share are its instruction ("Express your answer as a common
fraction") and do not count as overlap.

The vocabulary of the held-out questions is small, so most windows of a trace contain a word outside
it; the others are hashed by numpy, and every hit is compared word by word.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from r1pipe.types import Problem

INSTRUCTION_WORDS = 5
INSTRUCTION_SHARE = 0.1
"""A run of so many words is instruction if more than this share of a set's questions have it."""

MIN_CONTAINED = 4
"""A held-out question of fewer words and operators ("1 + 1") overlaps only with an equal one."""

BATCH_WORDS = 500_000


@dataclass(frozen=True)
class Decontaminated:
    """Result of `decontaminate`."""

    kept: list[Problem]
    num_dropped: int
    num_dropped_for_trace: int
    """Dropped rows whose prompt alone would have been kept."""

    @property
    def overlap_rate(self) -> float:
        return self.num_dropped / max(1, self.num_dropped + len(self.kept))


def decontaminate(training: list[Problem], heldout: list[Problem], ngram: int) -> Decontaminated:
    """Drop training rows whose prompt or trace overlaps with a held-out problem."""
    index = OverlapIndex(heldout, ngram)
    in_prompts = index.find_texts([problem.question for problem in training])
    in_traces = index.find_texts([problem.trace_text for problem in training], are_traces=True)
    kept = [p for p, a, b in zip(training, in_prompts, in_traces) if not a and not b]
    num_for_trace = sum(not a and bool(b) for a, b in zip(in_prompts, in_traces))
    return Decontaminated(kept, len(training) - len(kept), num_for_trace)


class OverlapIndex:
    """Index of held-out problems, to look up training rows in. A set is all of one `source`."""

    def __init__(self, heldout: list[Problem], ngram: int):
        self.ngram = ngram
        self._ids: dict[tuple[int, ...], set[str]] = defaultdict(set)
        """N-gram, as word numbers -> ids of the held-out problems that have it."""
        self._vocabulary: dict[str, int] = {}
        self._whole: dict[tuple[str, ...], set[str]] = defaultdict(set)
        """Words and operators of the questions compared whole -> ids."""
        sets = defaultdict(list)
        for problem in heldout:
            sets[problem.source].append(problem)
        for problems in sets.values():
            self._add(problems)
        self._starts: dict[str, set[int]] = defaultdict(set)
        """First word -> lengths of the questions searched for within prompts."""
        for tokens in self._whole:
            if len(tokens) >= MIN_CONTAINED:
                self._starts[tokens[0]].add(len(tokens))
        self._whole_words = {tuple(split_words(" ".join(tokens))) for tokens in self._whole}
        self._factors = np.random.default_rng(0).integers(1, 2**63, ngram, dtype=np.uint64) | 1
        grams = np.array(list(self._ids), dtype=np.uint64).reshape(-1, ngram)
        self._hashes = np.unique(self._hash(grams.T))

    def _add(self, problems: list[Problem]) -> None:
        words = [split_words(problem.question) for problem in problems]
        instruction = find_instruction(words)
        for problem, question in zip(problems, words):
            is_long = False
            for own in drop_instruction(question, instruction):
                numbers = [self._vocabulary.setdefault(w, len(self._vocabulary) + 1) for w in own]
                for gram in list_ngrams(numbers, self.ngram):
                    self._ids[gram].add(problem.id)
                    is_long = True
            tokens = tuple(split_tokens(problem.question))
            if tokens and not is_long:
                self._whole[tokens].add(problem.id)

    def find_rows(self, rows: list[Problem]) -> list[set[str]]:
        """For each training row, the ids of the held-out problems that it overlaps with."""
        in_prompts = self.find_texts([row.question for row in rows])
        in_traces = self.find_texts([row.trace_text for row in rows], are_traces=True)
        return [a | b for a, b in zip(in_prompts, in_traces)]

    def find_texts(self, texts: Sequence[str], are_traces: bool = False) -> list[set[str]]:
        """For each text, the ids of the held-out problems that it overlaps with."""
        found: list[set[str]] = [set() for _ in texts]
        find_whole = self._find_lines if are_traces else self._find_within
        for row, text in enumerate(texts if self._whole else ()):
            found[row] |= find_whole(text)
        if self._ids:
            for row, gram in self._find_grams(texts):
                found[row] |= self._ids[gram]
        return found

    def _find_within(self, prompt: str) -> set[str]:
        tokens = split_tokens(prompt)
        found = set(self._whole.get(tuple(tokens), ()))
        for start, token in enumerate(tokens):
            for length in self._starts.get(token, ()):
                found |= self._whole.get(tuple(tokens[start : start + length]), set())
        return found

    def _find_lines(self, trace: str) -> set[str]:
        found: set[str] = set()
        for line in trace.splitlines():
            if tuple(split_words(line)) in self._whole_words:  # a cheap test that mostly fails
                found |= self._whole.get(tuple(split_tokens(line)), set())
        return found

    def _find_grams(self, texts: Iterable[str]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield (row, n-gram) for every n-gram of a held-out question in a text."""
        for rows_W, numbers_W in self._number_words(texts):
            unknown_W = np.concatenate([[0], np.cumsum(numbers_W == 0)])
            starts = np.flatnonzero(unknown_W[self.ngram :] == unknown_W[: -self.ngram])
            hashes = self._hash(numbers_W[starts + place] for place in range(self.ngram))
            places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            for start in starts[self._hashes[places] == hashes].tolist():
                gram = tuple(numbers_W[start : start + self.ngram].tolist())
                if gram in self._ids:
                    yield int(rows_W[start]), gram

    def _number_words(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of all texts' words: rows, and numbers in the vocabulary (0: in no held-out
        question). A 0 ends every text."""
        numbers, rows, size = [], [], 0
        for row, text in enumerate(texts):
            words = split_words(text)
            numbers += map(self._vocabulary.get, words, repeat(0))
            numbers.append(0)
            rows.append((row, len(words) + 1))
            size += len(words) + 1
            if size >= BATCH_WORDS:
                yield make_batch(rows, numbers)
                numbers, rows, size = [], [], 0
        if size >= self.ngram:
            yield make_batch(rows, numbers)

    def _hash(self, columns: Iterable[np.ndarray]) -> np.ndarray:
        """One number per n-gram, from its first words, its second words, and so on."""
        total = np.zeros(1, dtype=np.uint64)
        for column, factor in zip(columns, self._factors):
            total = total + column.astype(np.uint64) * factor  # modulo 2^64 on purpose
        return total


def make_batch(rows: list[tuple[int, int]], numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    which, lengths = zip(*rows)
    return np.repeat(which, lengths), np.array(numbers, dtype=np.int64)


# Words

_SEPARATE = {c: " " for c in range(128) if not chr(c).isalnum()}
_LOWER = {c: chr(c).lower() for c in range(128) if chr(c).isupper()}
_ASCII_WORDS = str.maketrans(_SEPARATE | _LOWER)
# Chinese and Japanese have no spaces: each character counts as a word.
_SIGN = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SIGN}]|[^\W_{_SIGN}]+")
_TOKEN = re.compile(rf"[{_SIGN}]|[^\W_{_SIGN}]+|[-+*/^=<>%|]")
# LaTeX that changes only the layout.
_LAYOUT = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\left", " "), ("\\right", " "))


def split_words(text: str) -> list[str]:
    """Words of lower-case letters and digits."""
    text = drop_layout(text)
    if text.isascii():  # five times as fast as the regular expression
        return text.translate(_ASCII_WORDS).split()
    return _WORD.findall(text.lower())


def split_tokens(text: str) -> list[str]:
    """Lower-case words, and operators."""
    return _TOKEN.findall(drop_layout(text).lower())


def drop_layout(text: str) -> str:
    for command, plain in _LAYOUT if "\\" in text else ():
        text = text.replace(command, plain)
    return text


def list_ngrams(words: Sequence, length: int) -> list[tuple]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def find_instruction(questions: list[list[str]]) -> set[tuple[str, ...]]:
    """N-grams of INSTRUCTION_WORDS that many of these questions share."""
    different = set(map(tuple, questions))  # a repeated question counts once
    counts = Counter(
        gram for words in different for gram in set(list_ngrams(words, INSTRUCTION_WORDS))
    )
    most = max(2, INSTRUCTION_SHARE * len(different))
    return {gram for gram, count in counts.items() if count > most}


def drop_instruction(words: list[str], instruction: set[tuple[str, ...]]) -> Iterator[list[str]]:
    """The parts of a question that are not instruction."""
    shared = [False] * len(words)
    for start, gram in enumerate(list_ngrams(words, INSTRUCTION_WORDS)):
        if gram in instruction:
            shared[start : start + INSTRUCTION_WORDS] = [True] * INSTRUCTION_WORDS
    own: list[str] = []
    for word, is_shared in zip(words, shared):
        if is_shared and own:
            yield own
            own = []
        elif not is_shared:
            own.append(word)
    if own:
        yield own
