"""What test_kept_implementations.py runs on each of two ranks: transformers' expert parallelism and
torch's context parallelism.

    torchrun --nproc-per-node 2 tests/unit/trainer/kept_implementations.py FOLDER

FOLDER/moe is a tiny deepseek_v3. Writes FOLDER/results.json: rank by rank.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from r1pipe.utils import distributed


def load(folder: Path, **sizes: int) -> PreTrainedModel:
    config = DistributedConfig(enable_expert_parallel=True, **sizes) if sizes else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", distributed_config=config
    )


def beside_fsdp(folder: Path) -> dict:
    """How many experts a layer has, and on how many dimensions they are sharded."""
    experts = load(folder, fsdp_size=2).model.layers[-1].mlp.experts
    return {"experts": experts.num_experts, "dimensions": experts.gate_up_proj.device_mesh.ndim}


def alone(folder: Path, implementation: str, *, same_tokens: bool) -> float:
    """The largest difference of its logits from the plain model's, on this rank's tokens."""
    ids_1N = torch.arange(8).unsqueeze(0) + (0 if same_tokens else 50 * distributed.rank())
    model = load(folder, tp_size=2)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        return float((model(ids_1N).logits - load(folder)(ids_1N).logits).abs().max())


def around_a_ring() -> float:
    """The largest difference of causal attention over both ranks' tokens from one process's."""
    torch.manual_seed(0)
    whole = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    expected = scaled_dot_product_attention(*whole, is_causal=True)
    states = [tensor.clone() for tensor in whole]
    mesh = init_device_mesh("cpu", (2,))
    with context_parallel(mesh, buffers=states, buffer_seq_dims=[2] * 3), torch.no_grad():
        out = scaled_dot_product_attention(*states, is_causal=True)
    # Each rank has two chunks of four, so that both have as much to attend to.
    chunks = expected.chunk(4, dim=2)
    first = distributed.rank()
    return float((out - torch.cat([chunks[first], chunks[3 - first]], 2)).abs().max())


def attempt(function: Callable, *arguments: object, **options: object) -> object:
    try:
        return function(*arguments, **options)
    except Exception as error:  # what it raises is the result
        return f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    with distributed.joined("cpu"):
        moe = folder / "moe"
        own = {
            "beside_fsdp": attempt(beside_fsdp, moe),
            "eager": attempt(alone, moe, "eager", same_tokens=True),
            "same_tokens": attempt(alone, moe, "batched_mm", same_tokens=True),
            "own_tokens": attempt(alone, moe, "batched_mm", same_tokens=False),
            "ring": attempt(around_a_ring),
        }
        results = distributed.gather(own)
        if distributed.is_first():
            (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
