"""Floating-point operations of training, and a device's peak, for model FLOPs utilization (MFU:
PaLM, arXiv:2204.02311, appendix B).

Counted are the matrix products of one forward and backward pass, 2 operations for each multiply-add
forward and 4 backward:

- 6 for every weight that multiplies a token ("6N"): projections (MLA's own, too), feed-forward
  layers, routers, shared experts, and of the routed experts those chosen. The embedding is a
  lookup.
- 6 for every weight of the head and token whose logits are computed: in training on completions,
  theirs only.
- in each layer, 6 (query + value sizes over all heads) for every pair of a token and one that it
  attends to: causal, itself included, s (s + 1) / 2 pairs in a sequence of s tokens. PaLM's
  12 L H Q T counts all s² pairs, twice as many as flash-attention computes.

Weights that are frozen beside an adapter have no gradient and count 4; the adapter's own products
are left out. A prediction layer counts where it is trained: its weights and pairs, and the head
once more, by 4 where its gradient does not reach the head.
Of sparse attention the selected pairs count, the indexer's scores do not.

Recomputation by gradient checkpointing does not count, nor do forward passes without a gradient
(old policy, reference, teacher), the optimizer, norms and activations.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PretrainedConfig

from r1pipe.models.shape import Shape

PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100 HBM3": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
}
"""bf16 tensor cores with float32 sums, dense, operations a second, by words of the device's name:
NVIDIA's data sheets, which print twice as many for the cards since H100 ("with sparsity"). An H100
SXM calls itself "NVIDIA H100 80GB HBM3"."""

OTHERS = {"MIG", "Laptop", "D"}
"""Words of a part of a card, and of slower cards of the same name."""


def train_flops(
    config: PretrainedConfig,
    lengths: Sequence[int],
    num_logits: int | None = None,
    *,
    frozen: bool = False,
    mtp: Literal["joint", "detached"] | None = None,
) -> float:
    """Operations of one forward and backward pass over sequences of these lengths, `num_logits` of
    their tokens having logits (by default all). `frozen`: the weights, not the activations. `mtp`:
    how the prediction layer is trained."""
    whole = Shape.of(config)
    shape = whole.main
    num_tokens = sum(lengths)
    head = shape.config.vocab_size * shape.config.hidden_size
    head *= num_tokens if num_logits is None else num_logits
    products = shape.active() * num_tokens + head
    queries, _, values = shape.head_sizes()
    heads = shape.config.num_attention_heads
    width = queries + heads * (values // shape.groups())
    windows = shape.windows() + [None] * bool(mtp)
    pairs = sum(count_pairs(length, window) for window in windows for length in lengths)
    flops = (4 if frozen else 6) * products + 6 * width * pairs
    if mtp:
        flops += 6 * (whole.active() - shape.active()) * num_tokens
        flops += (4 if mtp == "detached" else 6) * head
    return flops


def count_pairs(length: int, window: int | None) -> int:
    """A causal sequence's pairs of a token and one that it attends to."""
    outside = max(0, length - window) if window else 0
    return (length * (length + 1) - outside * (outside + 1)) // 2


def peak_flops(device: torch.device, dtype: str = "bfloat16") -> float | None:
    """Operations a second; None for a CPU, for a card not in PEAKS, and for float32, which is
    computed without tensor cores here."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    if words & OTHERS:
        return None
    return next((peak for card, peak in PEAKS.items() if set(card.split()) <= words), None)
