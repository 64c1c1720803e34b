"""What test_traffic.py runs on each rank: one forward and backward pass, and what it sends.

    torchrun --nproc-per-node 2 tests/unit/trainer/traffic_of_ranks.py FOLDER TOKENS

FOLDER/start is the checkpoint. Writes FOLDER/sent.json: bytes that rank 0 has sent, by the size of
the groups of experts.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout
from r1pipe.utils import distributed

CPU = torch.device("cpu")


@contextmanager
def counting() -> Iterator[list[float]]:
    """Bytes that this rank sends by torch's collectives, if parts are passed around a ring; rows
    for the own rank are counted as if all ranks got as many."""
    sent = [0.0]

    def watch(name: str, whole: str) -> object:
        collective = getattr(dist, name)

        def counted(*arguments: object, **options: object) -> object:
            given = inspect.signature(collective).bind(*arguments, **options).arguments
            size = dist.get_world_size(given.get("group"))
            sent[0] += given[whole].nbytes * (size - 1) / size
            return collective(*arguments, **options)

        return mock.patch.object(dist, name, counted)

    with (
        watch("all_gather_single", "output_tensor"),
        watch("reduce_scatter_single", "input"),
        watch("all_to_all_single", "input"),
    ):
        yield sent


def measure(folder: Path, num_tokens: int, groups: int) -> float:
    policy = load_sharded(
        str(folder / "start"), CPU, "sdpa", Policy, dtype="float32", expert_parallel=groups
    )
    ids = torch.randint(5, 300, (num_tokens,)).tolist()
    rollout = Rollout("", 0, ids[:1], ids[1:], [0.0] * (num_tokens - 1), "", "stop")
    with counting() as sent:
        policy(pack([Sample(rollout, 1.0)], CPU), 1.0).logprobs_C.mean().backward()
    return sent[0]


def main(folder: Path, num_tokens: int) -> None:
    with distributed.joined("cpu"):
        torch.manual_seed(distributed.rank())
        size = distributed.world_size()
        sent = {groups: measure(folder, num_tokens, groups) for groups in (1, size)}
        if distributed.is_first():
            (folder / "sent.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
