"""The processes of one run, as torchrun starts them: who this one is, what the others say.

Every function does nothing, or answers for one process, in a run of one. Imports no torch until a
run has several: who prints what must be known before anything heavy is loaded.

What the ranks decide, they decide together: a branch that holds collectives must be taken by all of
them or by none, so anything that only one rank knows goes through `gather` or `on_first_rank`.
"""

import os
import pickle
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

LAUNCHER = "R1PIPE_LAUNCHER"
"""Set in the environment of processes that r1pipe.launch starts."""

LANES = ("main", "sampling")
"""Sampling may run in a thread beside the training. Collectives of two threads in one group of
processes would meet in another order on every rank."""
_lanes: dict[str, Any] = {}

PATIENCE_S = 60.0
"""Seconds beyond the recipe's `phase_timeout_s` that a collective waits for a living but slower
rank: the hang guard is to be the first, because it tells where each rank is. A dead one is noticed
at once: its connections close, and torchrun ends the others."""


def rank() -> int:
    """This process's number in the run, from 0."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine: which of the machine's GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def alone() -> bool:
    return world_size() == 1


def has_launcher() -> bool:
    """Whether r1pipe.launch started this process, and not torchrun itself."""
    return LAUNCHER in os.environ


def is_first() -> bool:
    """Whether this process writes the run folder and talks to the person."""
    return rank() == 0


@contextmanager
def joined(device: str, phase_timeout_s: float | None = None) -> Iterator[None]:
    """Within it, the ranks can talk to each other: gloo, and NCCL beside it for GPUs. Both are the
    recipe's: "auto", "cpu" or "cuda", and how long nothing may go on (None: a year).

    A collective that fails because another rank has gone raises LostRank.
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
    # Objects and numbers always go through gloo: they must not wait for a GPU's queue.
    timeout = timedelta(seconds=phase_timeout_s + PATIENCE_S if phase_timeout_s else 365 * 86400)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    _lanes.update({lane: dist.new_group(backend="gloo", timeout=timeout) for lane in LANES})
    try:
        yield
    except RuntimeError as error:
        if is_lost_connection(error):
            raise LostRank(f"rank {rank()}: the connection to another rank broke") from error
        raise
    else:
        # Not after an error: with collectives still open it would wait for ranks that are gone.
        dist.destroy_process_group()


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: gloo and NCCL tell by text only."""
    signs = ("onnection closed by peer", "onnection reset", "gloo/", "Broken pipe", "NCCL error")
    return any(sign in str(error) for sign in signs)


def gather(value: T, lane: str = "main") -> list[T]:
    """What every rank gives, in the order of the ranks. Every rank must call it.

    Two threads may do so at once if they have a lane of their own, one of LANES.
    """
    if alone():
        return [value]
    import torch.distributed as dist

    values: list = [None] * world_size()
    with phase("waiting for other ranks"):
        dist.all_gather_object(values, value, group=_lanes[lane])
    return values


def gather_to_first(value: T) -> list[T]:
    """As `gather`, for what only rank 0 needs; the others get an empty list."""
    if alone():
        return [value]
    import torch.distributed as dist

    values: list | None = [None] * world_size() if is_first() else None
    dist.gather_object(value, values, group=_lanes["main"])
    return values or []


def sum_counts(counts: dict[str, float]) -> dict[str, float]:
    """Sums over ranks, name by name; a rank may lack a name. Every rank gets the same bits."""
    total: dict[str, float] = {}
    for part in gather(counts):
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def exchange(parcels: list[T]) -> list[T]:
    """A parcel for every rank, against one from each: point to point, so that no rank sees what is
    not meant for it. Every rank must call it."""
    if alone():
        return parcels
    import torch
    import torch.distributed as dist

    data = [pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL) for parcel in parcels]
    sizes = [len(part) for part in data]
    sizes_here = [others[rank()] for others in gather(sizes)]
    sent = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
    received = torch.empty(sum(sizes_here), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, sizes_here, sizes, group=_lanes["main"])
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
    """Whether this rank is the first with something to say about the end of the run: an error that
    all ranks meet is told once, one that a single rank meets by that rank."""
    if alone():
        return True
    import torch.distributed as dist

    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("r1pipe/end", 1) == 1
    except (RuntimeError, ValueError):
        return is_first()


def cut(count: int, part: int, parts: int) -> slice:
    """Where part number `part` of so many things lies, if they are cut into `parts` pieces that
    differ by at most one."""
    return slice(count * part // parts, count * (part + 1) // parts)


def make_mesh(device: "torch.device") -> "DeviceMesh":
    """All ranks in one row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (world_size(),))
