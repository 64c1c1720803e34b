"""What test_distributed.py runs on each of two ranks: three updates of sharded policies.

    torchrun --nproc-per-node 2 tests/unit/sharded_update.py FOLDER cpu

FOLDER/cases.pickle holds, by name, the settings and each rank's samples; FOLDER/<name>-start
is the checkpoint to start from. Writes FOLDER/<name>.json and the checkpoint FOLDER/<name>-saved.
"""

import copy
import json
import pickle
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from r1pipe import distributed
from r1pipe.config import Grpo
from r1pipe.grpo.logprobs import Policy
from r1pipe.grpo.update import Updater
from r1pipe.models import load_tokenizer, pick_device, save_checkpoint
from r1pipe.sharding import load_sharded


def run(folder: Path, name: str, case: dict, device: torch.device) -> dict:
    start = str(folder / f"{name}-start")
    policy, reference = (load_sharded(start, device, "sdpa", Policy) for _ in range(2))
    reference.requires_grad_(False)
    settings: Grpo = case["settings"]
    updater = Updater(
        policy, reference if settings.beta else None, settings, dtype="float32", seed=0
    )
    metrics = []
    for step in range(1, 4):
        samples = case["samples"][distributed.rank()]
        metrics.append(updater.step(copy.deepcopy(samples), step, lambda metrics: None))
    assert any(
        not torch.equal(one.to_local(), other.to_local())
        for one, other in zip(policy.parameters(), reference.parameters())
    )
    if settings.beta:
        updater.refresh_reference()
        for one, other in zip(policy.parameters(), reference.parameters()):
            assert torch.equal(one.to_local(), other.to_local())
    save_checkpoint(policy.model, load_tokenizer(start), made(folder, f"{name}-saved"))
    parameters = list(policy.parameters()) + list(reference.parameters())
    moments = [m for state in updater.optimizer.state.values() for m in (state["exp_avg"],)]
    return {
        "metrics": metrics,
        "all_sharded": all(isinstance(tensor, DTensor) for tensor in parameters + moments),
        "bytes": sum(p.to_local().nbytes for p in policy.parameters()),
        "biases": {n: b.tolist() for n, b in policy.model.named_buffers() if "correction" in n},
    }


def made(folder: Path, name: str) -> Path:
    """Rank 0 writes into the folder, the others somewhere beside it."""
    path = folder / name / ("" if distributed.is_first() else "other")
    path.mkdir(parents=True, exist_ok=True)
    return path


def main(folder: Path, device: str) -> None:
    with distributed.joined(device):
        for name, case in pickle.loads((folder / "cases.pickle").read_bytes()).items():
            results = distributed.gather(run(folder, name, case, pick_device(device)))
            if distributed.is_first():
                (folder / f"{name}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
