"""A plugin of vLLM's for tests: its NCCL weight transfer with gloo in the place of NCCL, on CPU.
All else is vLLM's own code."""

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions

destroyed: list["Communicator"] = []
"""Kept: the end of a gloo group waits for what it does."""


class Communicator:
    """What vLLM's weight transfer uses of PyNcclCommunicator."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, device: int):
        store = TCPStore(host, port, world_size, is_master=rank == 0)
        self.group = ProcessGroupGloo(store, rank, world_size, timedelta(minutes=1))
        self.available = True

    def broadcast(self, tensor: Tensor, src: int) -> None:
        options = BroadcastOptions()
        options.rootRank = src
        work = self.group.broadcast([tensor], options)
        while self.available and not work.is_completed():
            time.sleep(1e-3)
        if self.available:
            work.wait()

    def destroy(self) -> None:
        """Then nobody waits in it any more, as after NCCL's abort."""
        self.available = False
        destroyed.append(self)


def list_patches() -> list[tuple[Any, str, Any]]:
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    return [
        (nccl_common, "stateless_init_process_group", Communicator),
        (packed_tensor, "_get_streams", lambda index, count: (stream,) * count),
        (torch.accelerator, "current_device_index", lambda: 0),
    ]


def register() -> None:
    """vLLM calls it in every engine's process that sees the folder of `announce`."""
    for patch in list_patches():
        setattr(*patch)


def announce(folder: Path) -> None:
    """Make this a plugin wherever the folder is in Python's path."""
    package = folder / "gloo_transfer-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gloo_transfer\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ngloo_transfer = gloo_transfer:register\n"
    )
