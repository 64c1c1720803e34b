"""vLLM on CPU, faster: one random draw for each token, and its own kernels for RMS norms.

vLLM gives every request a generator and draws an exponential variate for each token of the
vocabulary from it, one request after the other. Here a token's draw is a hash of its request's seed
and its position: the same whatever else is in the batch, before and after a preemption, on every
rank of an engine; all rows of a batch in one call. One uniform variate through the inverse of the
cumulative distribution replaces the exponential ones.
"""

import dataclasses
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

KERNELS = "r1pipe"
LANES = 16
"""The norms' kernels take rows of a multiple of so many numbers."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
DRAW_BITS = 50
"""Fewer than float64's 53: a draw times a distribution's sum stays below the sum."""


def mix(values_N: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), a
    bijection of 64 bits."""
    values_N = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values_N = (values_N ^ (values_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values_N ^ (values_N >> np.uint64(31))


def draw_uniforms(seeds_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), float64 `[N]`: number `position` of splitmix64 started at the mixed seed.
    Both are non-negative integers."""
    start_N = mix((seeds_N.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    bits_N = mix(start_N + (positions_N.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (bits_N >> np.uint64(64 - DRAW_BITS)) * 2.0**-DRAW_BITS


def choose_tokens(logprobs_NV: Tensor, uniforms_N: np.ndarray) -> Tensor:
    """Token ids `[N]`. Sums are float64: in float32 a large vocabulary's small probabilities would
    be lost."""
    cumulative_NV = logprobs_NV.exp().cumsum(-1, dtype=torch.float64)
    targets_N1 = torch.from_numpy(uniforms_N)[:, None] * cumulative_NV[:, -1:]
    chosen_N1 = torch.searchsorted(cumulative_NV, targets_N1, right=True)
    # A row of NaN, which the breaker will look at, must not leave the vocabulary.
    return chosen_N1.squeeze(-1).clamp_(max=logprobs_NV.shape[1] - 1)


def use_counted_draws(worker: Any) -> None:
    """Runs inside the engine."""
    draws = CountedDraws(worker.model_runner)
    draws.runner.sampler.topk_topp_sampler.forward = draws.sample
    if draws.runner.speculative_config:
        draws.runner.rejection_sampler.forward = draws.check_drafts


class CountedDraws:
    """What vLLM's model runner calls to sample, and to check drafted tokens. Requests must have
    seeds, and prompts must not be cut into chunks: then a request's first row of logits is for its
    next token, the others for those behind its drafts."""

    def __init__(self, runner: Any):
        self.runner = runner
        self._rows_B: np.ndarray | None = None
        """Rows of each request while drafts are checked; else one."""

    def sample(
        self,
        logits_NV: Tensor,
        generators: dict[int, torch.Generator],
        top_k_N: Tensor | None,
        top_p_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        batch = self.runner.input_batch
        requests = [self.runner.requests[name] for name in batch.req_ids]
        seeds_N = np.array([request.sampling_params.seed for request in requests])
        count = len(requests)
        positions_N = batch.num_tokens_no_spec[:count] - batch.num_prompt_tokens[:count]
        if self._rows_B is not None:
            seeds_N, positions_N = (part.repeat(self._rows_B) for part in (seeds_N, positions_N))
            positions_N += np.concatenate([np.arange(rows) for rows in self._rows_B])
        logprobs_NV = apply_top_k_top_p(logits_NV, top_k_N, top_p_N).log_softmax(-1)
        return choose_tokens(logprobs_NV, draw_uniforms(seeds_N, positions_N)), logprobs_NV

    def check_drafts(
        self, drafts: Any, draft_probs: None, logits_NV: Tensor, sampling_metadata: Any
    ) -> Any:
        """Speculative sampling (Leviathan et al. 2022, arXiv:2211.17192, section 2.3) of drafts
        that are certain of their token x: x stands with the policy's probability p(x), else a token
        is drawn from p without x. To draw y from p and let x stand if it is y comes to the same.
        So every position has the token that it would have without drafts.

        vLLM's own check would, without Triton, write each row's temperature, top_k and top_p into a
        copy that nobody reads (`_expand_kernel_impl`) and sample by what the memory held before.
        """
        num_drafts_B = np.array(drafts.num_draft_tokens)
        self._rows_B = num_drafts_B + 1
        rows_B = torch.from_numpy(self._rows_B)
        each_N = {
            key: getattr(sampling_metadata, key).repeat_interleave(rows_B)
            for key in ("temperature", "top_k", "top_p")
            if getattr(sampling_metadata, key) is not None
        }
        try:
            output = self.runner.sampler(
                logits_NV, dataclasses.replace(sampling_metadata, **each_N)
            )
        finally:
            self._rows_B = None
        tokens_BK, rows_BK = keep_agreed(
            output.sampled_token_ids.squeeze(-1).numpy(),
            drafts.draft_token_ids.numpy(),
            num_drafts_B,
        )
        output.sampled_token_ids = torch.from_numpy(tokens_BK)
        logprobs, rows = output.logprobs_tensors, torch.from_numpy(rows_BK.ravel())
        output.logprobs_tensors = type(logprobs)(
            logprob_token_ids=logprobs.logprob_token_ids[rows],
            logprobs=logprobs.logprobs[rows],
            selected_token_ranks=logprobs.selected_token_ranks[rows],
        )
        return output


def keep_agreed(
    tokens_N: np.ndarray, drafts_M: np.ndarray, num_drafts_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, K + 1]`, K the most drafts of a request: those drawn up to the first that is not
    its draft, or, if all are, to the one behind the last draft; then -1. And their rows in
    `tokens_N`, which has one of each draft of a request and one behind them."""
    num_rows_B = num_drafts_B + 1
    starts_B1 = (num_rows_B.cumsum() - num_rows_B)[:, None]
    steps_K = np.arange(num_rows_B.max())
    rows_BK = starts_B1 + np.minimum(steps_K, num_drafts_B[:, None])
    tokens_BK = tokens_N[rows_BK]
    drafts_BK = np.full_like(tokens_BK, -1)
    drafts_BK[steps_K < num_drafts_B[:, None]] = drafts_M
    agreed_B1 = (tokens_BK == drafts_BK).cumprod(-1).sum(-1, keepdims=True)
    tokens_BK[steps_K > agreed_B1] = -1
    return tokens_BK, rows_BK


def use_norm_kernels() -> dict[str, Any]:
    """The argument of vLLM's LLM with which float32 norms run in one of its C++ kernels, which on
    CPU it compiles and leaves alone, instead of in eight of PyTorch's: 4 us instead of 16. In bf16
    they would round once where the trainer rounds twice."""
    from vllm.ir import ops

    if KERNELS not in ops.rms_norm.impls:  # an earlier engine's
        ops.rms_norm.register_impl(KERNELS, supports_args=has_norm_kernel)(rms_norm)
        ops.fused_add_rms_norm.register_impl(
            KERNELS, supports_args=has_fused_norm_kernel, inplace=True
        )(fused_add_rms_norm)
    order = [KERNELS, "native"]
    return {"ir_op_priority": {"rms_norm": order, "fused_add_rms_norm": order}}


def replace_kernels_once() -> None:
    """vLLM searches all that is imported for the Triton kernels to replace, once more for each
    engine: half a second each time. They are its own; and those that it has replaced it only wraps
    again."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import dispatcher

    replace, search = CpuPlatform.register_triton_kernel_overrides, dispatcher._rebind_kernels
    if hasattr(replace, "cache_info"):  # an earlier engine's
        return

    def search_own(kernels: list[tuple[Any, Any]]) -> None:
        own = {name: module for name, module in sys.modules.items() if name.startswith("vllm")}
        with mock.patch.object(dispatcher, "sys", SimpleNamespace(modules=own)):
            search(kernels)

    dispatcher._rebind_kernels = search_own
    CpuPlatform.register_triton_kernel_overrides = staticmethod(cache(replace))


def has_norm_kernel(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        weight is not None
        and variance_size is None
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] % LANES == 0
    )


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    x = x.contiguous()
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def has_fused_norm_kernel(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    whole = x.is_contiguous() and x_residual.is_contiguous() and x_residual.dtype == x.dtype
    return whole and has_norm_kernel(x, weight, epsilon, variance_size)


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
