"""The head: from hidden states to logits, and what the losses need of those, a chunk at a time."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from r1pipe.utils.errors import first_line
from r1pipe.utils.progress import log_line

MAX_LOGITS = {"cpu": 2**25, "cuda": 2**27}
"""Logits held at a time, by device: 128 MiB in float32; on a GPU 512 MiB, which is 880 tokens of a
vocabulary of 152k, enough to fill it."""

SLICE = 2**24
"""Logits at a time for functions that are not compiled."""


class Head:
    """The product that makes logits, `[C, D] -> [C, V]`, for the chunks of one micro-batch."""

    fuses_on = ("cuda",)
    """Devices for `score`, where its functions of the logits are compiled."""

    def __init__(self, module: nn.Module, *, detached: bool = False):
        """`detached`: no gradient reaches the module."""
        self.weight_VD, self.bias_V = module.weight, getattr(module, "bias", None)
        if detached:
            self.weight_VD = self.weight_VD.detach()
            self.bias_V = None if self.bias_V is None else self.bias_V.detach()
        self.gradient_VD: Tensor | None = None
        self.adds_up = False

    def add_up_in_float32(self) -> None:
        """Sum the weight's gradient over the chunks in float32. In bf16 every sum would be rounded
        to eight bits: with 75 chunks the error is five times that of one product."""
        self.adds_up = True
        self.weight_VD = TakeGradient.apply(self.weight_VD, self)

    def score(
        self, hidden_CD: Tensor, target_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the targets, entropies, and whether the target is the likeliest, by
        `ScoreTokens`."""
        if torch.is_grad_enabled():
            self.add_up_in_float32()
        # In bf16 it holds four bytes a logit, of which MAX_LOGITS allows for twelve.
        factor = 2 if hidden_CD.dtype == torch.bfloat16 else 1
        sizes = chunk_sizes(len(hidden_CD), len(self.weight_VD), hidden_CD.device, factor)
        scores = [
            ScoreTokens.apply(hidden, target, self.weight_VD, self.bias_V, self, temperature)
            for hidden, target in zip(hidden_CD.split(sizes), target_C.split(sizes))
        ]
        logprobs_C, entropy_C, is_likeliest_C = map(torch.cat, zip(*scores))
        return logprobs_C, entropy_C, is_likeliest_C

    def add_product(self, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        product = (gradient_CV.t(), hidden_CD)
        if self.gradient_VD is None:
            self.gradient_VD = (product[0] @ product[1]).float()
        elif hidden_CD.dtype == torch.float32:
            self.gradient_VD.addmm_(*product)
        elif hidden_CD.is_cuda:
            # Two thirds of the memory traffic, and no rounding to bf16; the CPU has no such kernel.
            torch.addmm(self.gradient_VD, *product, out_dtype=torch.float32, out=self.gradient_VD)
        else:
            self.gradient_VD += product[0] @ product[1]

    def __call__(self, hidden_CD: Tensor) -> Tensor:
        if self.adds_up:
            return AddGradient.apply(hidden_CD, self.weight_VD, self.bias_V, self)
        return linear(hidden_CD, self.weight_VD, self.bias_V)


class TakeGradient(torch.autograd.Function):
    """The weight unchanged; its gradient is the sum from the chunks' backward passes."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, head: Head) -> Tensor:
        ctx.head = head
        ctx.set_materialize_grads(False)
        return weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple[Tensor | None, None]:
        return ctx.head.gradient_VD, None


class AddGradient(torch.autograd.Function):
    """`linear`, whose backward adds the weight's gradient to the head's."""

    @staticmethod
    def forward(
        ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head
    ) -> Tensor:
        ctx.save_for_backward(hidden_CD, weight_VD)
        ctx.head = head
        return linear(hidden_CD, weight_VD, bias_V)

    @staticmethod
    def backward(ctx: Any, gradient_CV: Tensor) -> tuple[Tensor | None, ...]:
        hidden_CD, weight_VD = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.head.add_product(gradient_CV, hidden_CD)
        hidden = gradient_CV @ weight_VD if ctx.needs_input_grad[0] else None
        return hidden, None, gradient_CV.sum(0) if ctx.needs_input_grad[2] else None, None


class ScoreTokens(torch.autograd.Function):
    """What `Policy.score` has of a chunk over the full vocabulary; backward makes its logits again.

    `Policy.score` moves some 120 bytes for each logit, because each of its operations reads and
    writes all of them in float32: on a GPU several times the products' time (docs/log.md). Here the
    logits are read in their own dtype, twice in forward and once in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CD: Tensor,
        target_C: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_CV = linear(hidden_CD, weight_VD, bias_V)
        logprobs_C, entropy_C, lse_C, is_likeliest_C = run(
            reduce_logits, logits_CV, target_C, temperature
        )
        ctx.save_for_backward(hidden_CD, target_C, weight_VD, bias_V, lse_C)
        ctx.head, ctx.temperature = head, temperature
        ctx.mark_non_differentiable(entropy_C, is_likeliest_C)
        ctx.set_materialize_grads(False)
        return logprobs_C, entropy_C, is_likeliest_C

    @staticmethod
    def backward(ctx: Any, gradient_C: Tensor, *nothing: None) -> tuple[Tensor | None, ...]:
        hidden_CD, target_C, weight_VD, bias_V, lse_C = ctx.saved_tensors
        logits_CV = linear(hidden_CD, weight_VD, bias_V)
        columns = (target_C, lse_C, gradient_C)
        (gradient_CV,) = run(differentiate_logits, logits_CV, *columns, ctx.temperature)
        del logits_CV
        if ctx.needs_input_grad[2]:
            ctx.head.add_product(gradient_CV, hidden_CD)
        hidden = gradient_CV @ weight_VD if ctx.needs_input_grad[0] else None
        bias = gradient_CV.sum(0) if ctx.needs_input_grad[3] else None
        return hidden, None, None, bias, None, None


def reduce_logits(
    logits_CV: Tensor, target_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy in nats, log-sum-exp, all float32, and whether the
    target is the likeliest token: `[C]` each."""
    scaled_CV = logits_CV.float() / temperature
    largest_C1 = scaled_CV.amax(-1, keepdim=True)
    below_CV = scaled_CV - largest_C1
    weight_CV = below_CV.exp()
    total_C = weight_CV.sum(-1)
    # A weight of 0 may be that of a logit of -inf.
    mean_C = torch.where(weight_CV > 0, weight_CV * below_CV, 0.0).sum(-1) / total_C
    lse_C = largest_C1.squeeze(-1) + total_C.log()
    own_C = logits_CV.gather(-1, target_C.unsqueeze(-1)).squeeze(-1).float() / temperature
    return own_C - lse_C, total_C.log() - mean_C, lse_C, own_C == largest_C1.squeeze(-1)


def differentiate_logits(
    logits_CV: Tensor, target_C: Tensor, lse_C: Tensor, gradient_C: Tensor, temperature: float
) -> tuple[Tensor]:
    """The logits' gradient, `[C, V]`, from that of the targets' log-probabilities."""
    prob_CV = (logits_CV.float() / temperature - lse_C.unsqueeze(-1)).exp()
    vocab_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    is_target_CV = vocab_V == target_C.unsqueeze(-1)
    scale_C1 = (gradient_C / temperature).unsqueeze(-1)
    return (((is_target_CV.float() - prob_CV) * scale_C1).to(logits_CV.dtype),)


def run(function: Callable, logits_CV: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """A function of a chunk's rows, compiled on a GPU: as written, each operation passes over the
    logits. Elsewhere, and where that fails, it sees a few rows at a time."""
    if logits_CV.device.type in Head.fuses_on and function not in _uncompilable:
        try:
            return compiled(function)(logits_CV, *arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            _uncompilable.add(function)
            log_line(f"torch.compile fails, so that the head is slower: {first_line(error)}")
    size = max(1, SLICE // logits_CV.shape[1])
    columns = [
        value.split(size) if isinstance(value, Tensor) else [value] * len(logits_CV)
        for value in (logits_CV, *arguments)
    ]
    return tuple(torch.cat(parts) for parts in zip(*[function(*row) for row in zip(*columns)]))


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


_uncompilable: set[Callable] = set()


def chunk_sizes(
    num_tokens: int, vocab_size: int, device: torch.device, factor: int = 1
) -> list[int]:
    size = max(1, factor * MAX_LOGITS[device.type] // vocab_size)
    return [min(size, num_tokens - start) for start in range(0, num_tokens, size)]
