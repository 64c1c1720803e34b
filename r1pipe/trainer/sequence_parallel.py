"""Sequence parallelism (DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509): each rank of a
team computes its part of every packed row's tokens; in attention, all tokens for its part of the
heads. All ranks of a team have the same samples, and compute the same loss from all tokens'
log-probabilities.

Not the implementations that others keep (tests/unit/trainer/test_kept_implementations.py shows it):
torch's `context_parallel` (2.13) passes keys around a ring for three CUDA kernels of SDPA alone,
causal over the whole row, so not within its sequences; transformers' `enable_sequence_parallel`
(5.17) is "not wired up yet"; accelerate's (1.15) are torch's, and DeepSpeed's.

Shape suffixes: N tokens, of the row or of this rank's part; H heads, K of keys and values; D size
of a query's head, E of a value's; C sampled tokens.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from transformers import PretrainedConfig

from r1pipe.models.sparse_attention import has_indexer
from r1pipe.trainer.exchange import Exchange, Sum
from r1pipe.trainer.packing import PackedBatch
from r1pipe.utils.errors import UserError


def require_teams(
    config: PretrainedConfig, attn_implementation: str, size: int, num_processes: int
) -> None:
    """Raises UserError if heads or processes cannot be grouped by `size`."""
    if size == 1:
        return
    if has_indexer(config):
        raise UserError(f"sequence_parallel {size}: not with the {config.model_type}'s attention")
    if (heads := config.get_text_config().num_attention_heads) % size:
        raise UserError(f"sequence_parallel {size}: {heads} heads cannot be shared out evenly")
    if num_processes % size:
        raise UserError(
            f"sequence_parallel {size}: {num_processes} process{'es' * (num_processes > 1)} cannot "
            f"be grouped by {size}: start as many with NPROC"
        )
    if attn_implementation.startswith("flash_attention"):
        raise UserError(
            f"sequence_parallel does not go with attn_implementation: {attn_implementation}: take "
            "auto, or varlen"
        )


@dataclass(frozen=True)
class Share:
    """Of a row's sampled tokens those that tokens of this rank predict."""

    predictor_C: Tensor
    """Index into this rank's tokens."""
    target_C: Tensor
    place_C: Tensor
    """Index into all sampled tokens of the row."""
    num_sampled: int
    team: ProcessGroup

    @classmethod
    def of(cls, predictor_C: Tensor, target_C: Tensor, length: int, team: ProcessGroup) -> "Share":
        """`predictor_C`, `target_C`: all of the row's; `length`: number of this rank's tokens."""
        predictor_C = predictor_C - team.rank() * length
        place_C = ((predictor_C >= 0) & (predictor_C < length)).nonzero().flatten()
        # The head must have a gradient on every rank: a share without a sampled token has any.
        computed_C = place_C if len(place_C) else place_C.new_zeros(1)
        own_C = predictor_C[computed_C].clamp(0, length - 1)
        return cls(own_C, target_C[computed_C], place_C, len(predictor_C), team)

    def join(self, values_C: Tensor) -> Tensor:
        """From this rank's sampled tokens to all of the row."""
        whole_C = values_C.new_zeros(self.num_sampled)
        own_C = values_C[: len(self.place_C)]
        return Sum.apply(whole_C.index_copy(0, self.place_C, own_C), self.team)


@dataclass(frozen=True)
class RowPart:
    """This rank's tokens of a packed row. Names as in PackedBatch."""

    ids_N: Tensor
    position_N: Tensor
    next_N: Tensor
    has_next_N: Tensor
    lengths: list[int]
    """Tokens of each sequence of the whole row, padding as the last."""
    first: Share
    """The next tokens."""
    second: Share
    """Those after the next, which a prediction layer predicts."""
    team: ProcessGroup

    @classmethod
    def of(cls, batch: PackedBatch, team: ProcessGroup) -> "RowPart":
        columns = (batch.ids_N, batch.position_N, batch.next_N, batch.has_next_N)
        own = [cut_tokens(column, team, 0) for column in columns]
        missing = -len(batch.ids_N) % team.size()
        lengths = [*batch.lengths, missing] if missing else batch.lengths
        first, second = (
            Share.of(predictor_C, batch.target_C, len(own[0]), team)
            for predictor_C in (batch.predictor_C, batch.predictor_of_second_C)
        )
        return cls(*own, lengths, first, second, team)


def cut_tokens(values_N: Tensor, team: ProcessGroup | None, filler: int) -> Tensor:
    """This rank's part of the tokens of a row, which is filled up to a multiple of the ranks."""
    if team is None:
        return values_N
    missing = -len(values_N) % team.size()
    values_N = pad(values_N, (0,) * (2 * values_N.ndim - 1) + (missing,), value=filler)
    return values_N.chunk(team.size())[team.rank()]


def trade_tokens_for_heads(states_1HND: Tensor, team: ProcessGroup) -> Tensor:
    """From this rank's tokens and all heads to all tokens and this rank's heads. Heads of keys and
    values are repeated where there are fewer than ranks."""
    heads, size = states_1HND.shape[1], team.size()
    states_HND = states_1HND[0].repeat_interleave(size // math.gcd(heads, size), dim=0)
    shares = [len(states_HND) // size] * size
    traded_HND = Exchange.apply(states_HND, shares, shares, team)
    return traded_HND.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2).unsqueeze(0)


def trade_heads_for_tokens(out_1NHE: Tensor, team: ProcessGroup) -> Tensor:
    """The way back, for what attention returns."""
    size = team.size()
    shares = [out_1NHE.shape[1] // size] * size
    traded_NHE = Exchange.apply(out_1NHE[0], shares, shares, team)
    return traded_NHE.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2).unsqueeze(0)
