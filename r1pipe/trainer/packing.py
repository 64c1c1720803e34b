"""Micro-batches without padding: completions one after another in one row.

Matrix products then see only tokens that count. Attention is cut at the sequences' borders: see
trainer/attention.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1pipe.types import Rollout


@dataclass
class Sample:
    """A rollout in the trainer. Log-probs are of its sampled tokens, `[T]`."""

    rollout: Rollout
    advantage: float
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    support: "Support | None" = None
    """The tokens that top_p or top_k left to sampling, if set."""

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids)


@dataclass(frozen=True)
class PackedBatch:
    """Samples in one row: N tokens of prompts and completions, C of them sampled."""

    samples: list[Sample]
    ids_N: Tensor
    position_N: Tensor
    """Counts from 0 in each sequence."""
    predictor_C: Tensor
    """Index into N of the token whose output predicts the sampled one."""
    target_C: Tensor
    sequence_C: Tensor
    """The sample that a sampled token belongs to."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and completion."""
        return [sample.num_tokens for sample in self.samples]

    @property
    def next_N(self) -> Tensor:
        """The row's next token; any at its end."""
        return self.ids_N.roll(-1)

    @property
    def has_next_N(self) -> Tensor:
        """Whether it is of the same sequence; not for a first token, whose next one's embedding
        vLLM leaves out as well."""
        return (self.position_N.roll(-1) > 0) & (self.position_N > 0)

    @property
    def predictor_of_second_C(self) -> Tensor:
        """Index into N of the token from which a prediction layer predicts the sampled one; any for
        the second token of a sequence."""
        return (self.predictor_C - 1).clamp(min=0)

    @property
    def completion_lengths(self) -> list[int]:
        """Sampled tokens of each sequence."""
        return [sample.rollout.num_tokens for sample in self.samples]

    @property
    def advantages_B(self) -> Tensor:
        return torch.tensor([s.advantage for s in self.samples], device=self.ids_N.device)

    @property
    def sampler_logprobs_C(self) -> Tensor:
        rollouts = [sample.rollout for sample in self.samples]
        values = [value for r in rollouts for value in r.pick_sampled(r.logprobs)]
        return torch.tensor(values, device=self.ids_N.device)

    def split(self, values_C: Tensor) -> list[Tensor]:
        """Each sample's own part, on the CPU."""
        return list(values_C.cpu().split(self.completion_lengths))

    def join(self, column: str) -> Tensor | None:
        """The inverse of `split` for a field of the samples; None if they have none."""
        rows = [getattr(sample, column) for sample in self.samples]
        return None if rows[0] is None else torch.cat(rows).to(self.ids_N.device)


def cut_batches(samples: list[Sample], token_budget: int) -> list[list[Sample]]:
    """Samples in parts of at most `token_budget` tokens (or one sample), the longest first: if
    memory is short, the first part shows it."""
    parts: list[list[Sample]] = []
    remaining = 0
    for sample in sorted(samples, key=lambda s: s.num_tokens, reverse=True):
        if sample.num_tokens > remaining:
            parts.append([])
            remaining = token_budget
        parts[-1].append(sample)
        remaining -= sample.num_tokens
    return parts


def pack(samples: list[Sample], device: torch.device) -> PackedBatch:
    """The samples in one row, those of equal length next to each other."""
    samples = sorted(samples, key=lambda s: s.num_tokens, reverse=True)
    ids, positions, predictors, targets, sequences = [], [], [], [], []
    for number, sample in enumerate(samples):
        prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
        first = len(ids) + len(prompt) - 1
        ids += prompt + completion
        positions += range(len(prompt) + len(completion))
        for start, stop in sample.rollout.sampled_spans:
            predictors += range(first + start, first + stop)
        targets += sample.rollout.pick_sampled(completion)
        sequences += [number] * sample.rollout.num_tokens
    columns = (ids, positions, predictors, targets, sequences)
    return PackedBatch(samples, *(torch.tensor(column, device=device) for column in columns))


def assign(numbers: Sequence[int], costs: dict[int, float], num_ranks: int) -> dict[int, int]:
    """A rank for each number: the costliest first, each to the rank with the least so far (Graham
    1969: at most 4/3 of the optimum)."""
    loads = [0.0] * num_ranks
    ranks = {}
    for number in sorted(numbers, key=lambda n: (-costs[n], n)):
        rank = loads.index(min(loads))
        ranks[number] = rank
        loads[rank] += costs[number]
    return ranks


@dataclass(frozen=True)
class Support:
    """The tokens that sampling could choose from at each of C positions: few of the vocabulary, so
    kept as ids, one position after another."""

    counts_C: Tensor
    ids: Tensor

    @classmethod
    def of(cls, keep_CV: Tensor) -> "Support":
        return cls(keep_CV.sum(-1), keep_CV.nonzero()[:, 1].int())

    @classmethod
    def join(cls, parts: list["Support"], device: torch.device) -> "Support":
        counts_C = torch.cat([part.counts_C for part in parts]).to(device)
        return cls(counts_C, torch.cat([part.ids for part in parts]).to(device))

    def cpu(self) -> "Support":
        return Support(self.counts_C.cpu(), self.ids.cpu())

    def split(self, sizes: list[int]) -> list["Support"]:
        """Parts of so many positions."""
        counts = self.counts_C.split(sizes)
        ids = self.ids.split([int(part.sum()) for part in counts])
        return [Support(*part) for part in zip(counts, ids, strict=True)]

    def mask(self, vocab_size: int) -> Tensor:
        """True for the tokens that could be chosen: `[C, V]`."""
        rows = torch.arange(len(self.counts_C), device=self.ids.device)
        keep_CV = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=self.ids.device)
        keep_CV[rows.repeat_interleave(self.counts_C), self.ids.long()] = True
        return keep_CV
