"""A layer's experts on a CPU: tokens sorted by expert, one product for each.

transformers' own loop (`eager`) selects an expert's matrices from the stack of all: the gradient of
each selection is a stack of zeros but for one, and these are added up, which for small experts
takes longer than the products. Its `grouped_mm` is for GPUs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "r1pipe_sorted"


def run_sorted(self: nn.Module, hidden_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
    """The forward of a module of experts, `[N, D]`; P are pairs of a token and its expert."""
    expert_P = experts_NK.flatten()
    pair_P = expert_P.argsort(stable=True)
    token_P = pair_P // experts_NK.shape[1]
    counts = expert_P.bincount(minlength=self.num_experts).tolist()
    rows_PD = hidden_ND.index_select(0, token_P)
    raised = multiply(self, "gate_up_proj" if self.has_gate else "up_proj", rows_PD, counts)
    gated = self._apply_gate(raised) if self.has_gate else self.act_fn(raised)
    out_PD = multiply(self, "down_proj", gated, counts)
    weighted_PD = out_PD * gates_NK.flatten().index_select(0, pair_P).unsqueeze(1)
    return torch.zeros_like(hidden_ND).index_add(0, token_P, weighted_PD.to(hidden_ND.dtype))


def multiply(self: nn.Module, name: str, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows, `counts` of each expert, by the experts' matrices."""
    matrices = getattr(self, name)
    matrices = (matrices.mT if self.is_transposed else matrices).unbind()
    biases = getattr(self, f"{name}_bias").unbind() if self.has_bias else [None] * len(matrices)
    parts = zip(rows.split(counts), matrices, biases, strict=True)
    return torch.cat([linear(*part) for part in parts])


ALL_EXPERTS_FUNCTIONS.register(NAME, run_sorted)
