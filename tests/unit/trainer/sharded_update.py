"""What test_distributed.py runs on each of two ranks: three updates of sharded policies, the last
two of them once more from a checkpoint.

    torchrun --nproc-per-node 2 tests/unit/trainer/sharded_update.py FOLDER cpu

FOLDER/cases.pickle holds, by name, the settings and each rank's samples; FOLDER/<name>-start
is the checkpoint to start from. Writes FOLDER/<name>.json, the checkpoint FOLDER/<name>-saved, and
FOLDER/<name>-partial/checkpoints to resume from.
"""

import copy
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from r1pipe.config.rl import OnPolicyDistill
from r1pipe.models.adapter import NewAdapter
from r1pipe.models.model import pick_device
from r1pipe.models.tokenizer import load_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.update import Updater
from r1pipe.trainer.checkpoints import Checkpoints
from r1pipe.trainer.fsdp import load_sharded, own_shard
from r1pipe.trainer.policy import Policy
from r1pipe.utils import distributed


def run(folder: Path, name: str, case: dict, device: torch.device) -> dict:
    policy, reference, updater, checkpoints = begin(folder, name, case, device)
    computed_in = watch_dtype(policy)
    metrics = take_steps(updater, case, 1, 1)
    checkpoints.save(1)
    metrics += take_steps(updater, case, 2, 3)
    adapted = updater.settings.adapter is not None
    assert all(same_weights(policy, reference)) is adapted
    checkpoints.save(3)
    again = resume(folder, name, case, device)
    if isinstance(updater, GrpoUpdater) and updater.reference is not None and not adapted:
        updater.refresh_reference()
        assert all(same_weights(policy, reference))
    settings = updater.settings
    samples = case["samples"][distributed.rank()]
    first_pass = updater.plan_minibatches(samples, 1)[: settings.steps_per_generation]
    share = updater.share_out(samples, first_pass)
    tokenizer = load_tokenizer(str(folder / f"{name}-start"))
    save_checkpoint(policy.model, tokenizer, made(folder, f"{name}-saved"))
    parameters = list(policy.parameters()) + list(reference.parameters())
    moments = [m for state in updater.optimizer.state.values() for m in (state["exp_avg"],)]
    return {
        "metrics": metrics,
        "again": again["metrics"],
        "same_weights_again": all(same_weights(policy, again["policy"])),
        "all_sharded": all(isinstance(tensor, DTensor) for tensor in parameters + moments),
        "share": {n: sample.rollout.completion_ids for n, sample in share.items()},
        "minibatches": first_pass,
        "computed_in": computed_in[0],
        "masters": sorted({str(tensor.dtype) for tensor in [*policy.parameters(), *moments]}),
        "reference": sorted({str(tensor.dtype) for tensor in reference.parameters()}),
        "bytes": sum(own_shard(p).nbytes for p in policy.parameters()),
        "biases": {n: b.tolist() for n, b in policy.model.named_buffers() if "correction" in n},
    }


def begin(
    folder: Path, name: str, case: dict, device: torch.device
) -> tuple[Policy, Policy | TeacherModel, Updater, Checkpoints]:
    start = str(folder / f"{name}-start")
    dtype, settings = case["dtype"], case["settings"]
    adapter = settings.adapter and NewAdapter(settings.adapter, 0)
    groups = settings.parallel
    policy = load_sharded(start, device, "sdpa", Policy, dtype=dtype, adapter=adapter, **groups)
    if isinstance(settings, OnPolicyDistill):
        taught_by = str(folder / f"{name}-teacher")
        reference = load_sharded(
            taught_by, device, "sdpa", TeacherModel, dtype=dtype, trained=False
        )
        teachers = {"": reference}
        if settings.teachers:
            other = load_sharded(start, device, "sdpa", TeacherModel, dtype=dtype, trained=False)
            teachers = {"math": reference, "code": other}
        routes = case["routes"]
        updater = DistillUpdater(policy, teachers, settings, dtype=dtype, seed=0, routes=routes)
    else:
        reference = load_sharded(
            start, device, "sdpa", Policy, dtype=dtype, trained=False, **groups
        )
        kept = (reference if settings.keeps_reference else policy) if settings.beta else None
        updater = GrpoUpdater(policy, kept, settings, dtype=dtype, seed=0)
    partial = folder / f"{name}-partial"
    return policy, reference, updater, Checkpoints(partial, settings, name, {"it": updater}, {})


def take_steps(updater: Updater, case: dict, first: int, last: int) -> list[dict]:
    samples = case["samples"][distributed.rank()]
    return [
        updater.step(copy.deepcopy(samples), step, lambda metrics: None)
        for step in range(first, last + 1)
    ]


def resume(folder: Path, name: str, case: dict, device: torch.device) -> dict:
    """Steps 2 and 3 as a process does them that was started again; the newest checkpoint, of step
    3, is damaged on one rank only."""
    if distributed.is_first():
        file = folder / f"{name}-partial" / "checkpoints" / "step-3" / "rank-1.pt"
        file.write_bytes(file.read_bytes()[:-1])
    distributed.barrier()
    policy, _, updater, checkpoints = begin(folder, name, case, device)
    assert checkpoints.restore_last_good() == 1
    return {"metrics": take_steps(updater, case, 2, 3), "policy": policy}


def watch_dtype(policy: Policy) -> list[str]:
    """Gets the dtype that a layer's weights have in each forward pass."""
    seen: list[str] = []
    attention = policy.model.base_model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args: seen.append(str(next(module.parameters()).dtype))
    )
    return seen


def same_weights(one: Policy, other: Policy) -> Iterator[bool]:
    """By parameter that the other has, too, in its dtype."""
    mine = dict(one.named_parameters())
    for name, b in other.named_parameters():
        yield torch.equal(own_shard(mine[name]).to(b.dtype), own_shard(b))


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
