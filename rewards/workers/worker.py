"""A worker process: reads tasks from its standard input, answers on its standard output.

Started by ``rewards.workers.pool`` as its own program, never forked: it inherits no CUDA context,
no locks and no ``__main__``. Frames are a length in four bytes and that much JSON. The parent keeps
the clock and kills a worker that is late; what is here is the memory limit, and two ends for an
orphan whose parent died while it was busy: it notices, or, in one long call of C, a timer does.
"""

import importlib
import json
import os
import select
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any

HEADER = struct.Struct("!I")
STACK_BYTES = 128 << 20
RECURSION_LIMIT = 20_000

Message = dict[str, Any]  # one JSON object


def read_frame(stream: IO[bytes]) -> Message | None:
    """Return the next frame, None at the end of the stream (also within a frame)."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    body = stream.read(size)
    if len(body) < size:
        return None
    message: Message = json.loads(body)
    return message


def encode_frame(message: Message) -> bytes:
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


def main(memory_mb: int, preload: list[str]) -> None:
    """Serve tasks until the input ends. Called by the command line that ``workers`` builds."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not break a frame
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which kills; the parent may have ignored it
    try:
        _limit_memory(memory_mb)
        for module in preload:  # now, not within the first item's time limit
            importlib.import_module(module)
    except BaseException:
        replies.write(encode_frame({"failed": traceback.format_exc()}))
        raise
    replies.write(encode_frame({"ready": True}))
    # Recursive descent over long sums needs a deeper stack than the main thread may have.
    threading.stack_size(STACK_BYTES)
    sys.setrecursionlimit(RECURSION_LIMIT)
    threading.Thread(target=_serve_to_the_end, args=(replies,)).start()
    _wait_for_hang_up()
    os._exit(0)


def _wait_for_hang_up() -> None:
    """Return when the parent has exited, also while an item is being judged."""
    poll = select.poll()
    poll.register(0, 0)  # a hang-up is always reported
    poll.poll()


def _serve_to_the_end(replies: IO[bytes]) -> None:
    try:
        _serve(replies)
    finally:
        os._exit(1)


def find_task(path: str) -> Callable[..., object]:
    """Return the function that ``module:name`` stands for, importing the module."""
    module, _, name = path.partition(":")
    task: Callable[..., object] = getattr(importlib.import_module(module), name)
    return task


def _serve(replies: IO[bytes]) -> None:
    while (task := read_frame(sys.stdin.buffer)) is not None:
        _die_after(task["limit_s"] + 1)
        try:
            frame = encode_frame({"value": find_task(task["path"])(*task["args"])})
        except MemoryError:
            os._exit(3)  # its heap may be corrupt; the parent starts another worker
        except Exception as error:
            frame = encode_frame({"error": f"{type(error).__name__}: {error}"[:500]})
        _die_after(0)
        replies.write(frame)


def _die_after(seconds: float) -> None:
    """Have the kernel kill this process after ``seconds``; 0 cancels that."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(memory_mb: int) -> None:
    import resource

    limit = memory_mb << 20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
