"""What vLLM's server imports into its engine on CPU, where no process of ours can reach."""

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    x_B: Tensor, ends_B: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """`[num_tokens]`: each request's value for each of its tokens, which end before `ends_B`.

    vLLM's own, without Triton, fills a copy that nobody reads (`_expand_kernel_impl`): where tokens
    were drafted, temperature, top_k and top_p would be what the memory held before.
    """
    counts_B = ends_B.diff(prepend=ends_B.new_zeros(1))
    values_B = torch.where(x_B == replace_from, replace_to, x_B).to(x_B.dtype)
    return values_B.repeat_interleave(counts_B, output_size=num_tokens)


rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


class Repaired:
    """For vLLM's `worker_extension_cls`, which brings the import."""
