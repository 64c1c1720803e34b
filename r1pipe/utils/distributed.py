"""The processes of one run, as torchrun starts them: this rank, and messages between ranks.

In a run of one process every function is a no-op or answers for that process. Imports no torch
until a run has several, because rank 0 prints before anything heavy is loaded.

A branch with collectives must be taken by all ranks or by none, so a decision on what only one rank
knows goes through `gather` or `on_first_rank`.
"""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from r1pipe.utils.errors import LostRank, UserError
from r1pipe.utils.phases import phase

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Number = TypeVar("Number", int, float)

LAUNCHER = "R1PIPE_LAUNCHER"
"""Set in the environment of processes that r1pipe.launch starts."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
"""What it sets in a rank's environment that torch, vLLM or this module read."""

_lanes: list[Any] = []
"""Process groups: the main thread's, and one for each batch that may be sampled beside the
training. Collectives of two threads in one group could be ordered differently on every rank."""


class _Here(threading.local):
    lane = 0


_here = _Here()

PATIENCE_S = 60.0
"""Seconds beyond the recipe's `phase_timeout_s` that a collective waits for a slow rank: the hang
guard must be first, because it says where each rank is. A dead rank is noticed at once: its
connections close, and torchrun ends the others."""


def rank() -> int:
    """This process's number in the run, from 0."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine: which of the machine's GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def alone() -> bool:
    return world_size() == 1


def leave() -> None:
    """Be no rank: for what a rank has started, which inherits its environment."""
    for name in TORCHRUN:
        os.environ.pop(name, None)


def has_launcher() -> bool:
    """Whether r1pipe.launch started this process, and not torchrun itself."""
    return LAUNCHER in os.environ


def is_first() -> bool:
    """Whether this process writes the run folder and talks to the person."""
    return rank() == 0


@contextmanager
def joined(device: str, phase_timeout_s: float | None = None, num_lanes: int = 1) -> Iterator[None]:
    """Process groups of all ranks: gloo, and NCCL for GPUs. `device` ("auto", "cpu", "cuda") and
    `phase_timeout_s` (None: a year) are the recipe's. `num_lanes`: for threads, see `lane`.

    Raises LostRank for a collective that fails because another rank is gone.
    """
    if alone():
        yield
        return
    import torch
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{local_rank() + 1} processes on a machine of {torch.cuda.device_count()} GPUs: "
                "each needs one of its own"
            )
        torch.cuda.set_device(local_rank())
    # Objects and numbers use gloo: they must not wait for a GPU's queue.
    timeout = timedelta(seconds=phase_timeout_s + PATIENCE_S if phase_timeout_s else 365 * 86400)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    _lanes[:] = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(num_lanes)]
    try:
        yield
    except RuntimeError as error:
        if is_lost_connection(error):
            raise LostRank(f"rank {rank()}: the connection to another rank broke") from error
        raise
    else:
        # Not after an error: it would wait for lost ranks in open collectives.
        dist.destroy_process_group()


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: only the message says so."""
    signs = ("onnection closed by peer", "onnection reset", "gloo/", "Broken pipe", "NCCL error")
    return any(sign in str(error) for sign in signs)


@contextmanager
def lane(number: int) -> Iterator[None]:
    """Within it this thread's collectives meet apart from others': the main thread's lane is 0."""
    _here.lane = number
    try:
        yield
    finally:
        _here.lane = 0


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order. Collective. Concurrent threads need a `lane` each."""
    if alone():
        return [value]
    import torch.distributed as dist

    values: list = [None] * world_size()
    with phase("waiting for other ranks"):
        dist.all_gather_object(values, value, group=_lanes[_here.lane])
    return values


def gather_to_first(value: T) -> list[T]:
    """As `gather`, on rank 0 only; the others get an empty list."""
    if alone():
        return [value]
    import torch.distributed as dist

    values: list | None = [None] * world_size() if is_first() else None
    dist.gather_object(value, values, group=_lanes[_here.lane])
    return values or []


def sum_counts(counts: dict[str, Number]) -> dict[str, Number]:
    """Sums over ranks by name; a rank may lack a name. Bit-equal on every rank."""
    total: dict[str, Number] = {}
    for part in gather(counts):
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def exchange(parcels: list[T]) -> list[T]:
    """All-to-all of Python objects: entry i goes to rank i, one comes from each. Collective."""
    if alone():
        return parcels
    import torch
    import torch.distributed as dist

    data = [pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL) for parcel in parcels]
    sizes = [len(part) for part in data]
    sizes_here = [others[rank()] for others in gather(sizes)]
    sent = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
    received = torch.empty(sum(sizes_here), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, sizes_here, sizes, group=_lanes[_here.lane])
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(sizes_here)]


def barrier() -> None:
    gather(None)


def on_first_rank(function: Callable[[], T]) -> T:
    """Call it on rank 0 only; every rank gets its result, or its UserError."""
    if alone():
        return function()
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    with phase("waiting for other ranks"):
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def speaks_first() -> bool:
    """Whether this rank is the first to report the end of the run: an error on all ranks is printed
    once, an error on one rank by that rank."""
    if alone():
        return True
    import torch.distributed as dist

    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("r1pipe/end", 1) == 1
    except (RuntimeError, ValueError):
        return is_first()


def cut(count: int, part: int, parts: int) -> slice:
    """Part number `part` of `count` items, cut into `parts` pieces whose sizes differ by at most
    one."""
    return slice(count * part // parts, count * (part + 1) // parts)


def full_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """A sharded tensor gathered, which every rank must call; others unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make_mesh(device: "torch.device", group_size: int | None = None) -> "DeviceMesh":
    """One dimension over all ranks; or two: "across" groups of neighbours, and "within" one."""
    from torch.distributed.device_mesh import init_device_mesh

    if group_size is None:
        return init_device_mesh(device.type, (world_size(),))
    shape = (world_size() // group_size, group_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("across", "within"))
