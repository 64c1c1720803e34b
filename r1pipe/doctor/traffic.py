"""Bytes that each rank of a sharded run sends, on paper: for collectives that pass parts around a
ring. tests/unit/trainer/test_traffic.py counts it."""

from r1pipe.config.base import Optimization
from r1pipe.models.shape import MASTER, Shape

LABELS, GATE = 16, 4
"""Bytes beside a token's row, for each of its experts on that rank: two integers, a weight."""


def estimate_traffic(
    shape: Shape, num_ranks: int, num_tokens: int, element: int, settings: Optimization
) -> float:
    """Of one micro-batch, forward and backward, of so many tokens on every rank."""
    size = settings.expert_parallel
    in_groups = shape.experts if size > 1 else 0
    sent = gathering(shape.parameters - in_groups, num_ranks, element)
    sent += gathering(in_groups / size, num_ranks // size, element)
    forwards = 2 if settings.gradient_checkpointing else 1
    if size > 1:
        chosen = shape.num_chosen()
        # Of a token whose experts are chosen evenly: ranks that have some of them.
        rows = size * (1 - (1 - 1 / size) ** chosen)
        per_token = 2 * (forwards + 1) * rows * element * shape.config.hidden_size
        per_token += chosen * (LABELS * forwards + GATE * (forwards + 1))
        sent += num_tokens * shape.num_moe_layers * per_token * (size - 1) / size
    if (team := settings.sequence_parallel) > 1:
        queries, keys, values = shape.head_sizes()
        numbers = (
            queries
            + keys
            + values
            + shape.config.num_attention_heads * (values // max(1, shape.groups()))
        )
        per_token = (forwards + 1) * element * numbers * shape.num_layers
        sent += num_tokens * per_token * (team - 1) / team
    return sent


def gathering(parameters: float, num_ranks: int, element: int) -> float:
    """FSDP: weights gathered for forward and for backward, gradients summed in float32."""
    return parameters * (2 * element + MASTER) * (num_ranks - 1) / num_ranks
