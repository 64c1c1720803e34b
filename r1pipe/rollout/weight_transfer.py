"""Weights from the trainer's process to a fleet's engines by vLLM's weight transfer: a broadcast in
a communicator of which the trainer is rank 0 and each engine another rank.

A communicator ends with the first process that it loses, and those that wait in it wait for ever:
then `stop` frees the trainer's side, the fleet replaces the engines that wait, and the next
broadcast makes a new communicator.
"""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from r1pipe.config.recipe import Engine
from r1pipe.rollout.vllm_args import choose_speculation, keep_own_config
from r1pipe.utils.errors import UserError, first_line

BACKENDS = {"cuda": "nccl"}
"""vLLM's, by torch's name for the kind of device. On others weights are read from shared memory."""
BUFFER_BYTES = 2**28
"""Weights travel packed in parts of about this size."""
NUM_BUFFERS = 2
"""Parts on their way at a time."""


def choose_backend(device_type: str, settings: Engine, config: Any) -> str | None:
    """None: weights go through memory. vLLM's transfer does not reach a module for multi-token
    prediction."""
    speculative = choose_speculation(settings, config)
    drafts_itself = speculative is not None and speculative.method == "mtp"
    return None if drafts_itself else BACKENDS.get(device_type)


class Broadcast:
    """`address`: of this machine, for the engines. Imports vLLM, whose environment must be set."""

    def __init__(self, device: torch.device, num_engines: int, address: str):
        from vllm.distributed.weight_transfer import nccl_common, packed_tensor

        keep_own_config()
        self._nccl_common, self._packed_tensor = nccl_common, packed_tensor
        self.device, self.num_engines, self.address = device, num_engines, address
        self.failure = ""
        """Why the last one has stopped by itself."""
        self._communicator: Any = None
        self._weights: Iterator[tuple[str, Tensor]] = iter(())
        self._thread: threading.Thread | None = None
        """That sends; another one's, or None, tells it that it was stopped."""
        self._deciding = threading.Lock()

    def begin(self, weights: Iterator[tuple[str, Tensor]]) -> dict[str, Any] | None:
        """Send them, in a thread. Returns what engines need to join, if they have to."""
        group = None
        if self._communicator is None:
            group = {
                "master_address": self.address,
                "master_port": find_port(self.address),
                "rank_offset": 1,
                "world_size": 1 + self.num_engines,
                "packed": True,
                "packed_buffer_size_bytes": BUFFER_BYTES,
                "packed_num_buffers": NUM_BUFFERS,
            }
        self._weights = weights
        self._thread = threading.Thread(target=self._send, args=(group,), daemon=True)
        self._thread.start()
        return group

    @torch.no_grad()
    def _send(self, group: dict[str, Any] | None) -> None:
        own = threading.current_thread()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # is each thread's own
            torch.cuda.synchronize()  # vLLM packs in streams that wait for no other
        try:
            communicator = self._communicator
            if group:
                communicator = self._nccl_common.trainer_init(group)
                if not communicator.available:
                    raise UserError("the trainer finds no NCCL to send weights by")
            with self._deciding:
                if self._thread is not own:  # stopped, while it waited for engines
                    communicator.destroy()
                    return
                self._communicator = communicator
            self._packed_tensor.packed_nccl_broadcast_producer(
                self._weights,
                communicator,
                src=0,
                post_iter_func=lambda pair: pair[1].to(self.device),
                buffer_size_bytes=BUFFER_BYTES,
                num_buffers=NUM_BUFFERS,
            )
        except Exception as error:
            if self._thread is own:
                self.failure = first_line(error, with_type=True)

    def end(self) -> None:
        """When the engines have all weights."""
        if thread := self._thread:
            thread.join()
        if self.failure:
            self.stop()

    def stop(self) -> None:
        """End the communicator, if there is one, and the sending. All weights have been taken then,
        sent or not."""
        with self._deciding:
            communicator, self._communicator = self._communicator, None
            thread, self._thread = self._thread, None
            self.failure = ""
        if communicator and thread:
            communicator.destroy()
            thread.join()
        # Else it waits for engines that will never join: nobody waits for it.
        for _ in self._weights:
            pass


def find_port(address: str) -> int:
    """A free one of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind((address, 0))
        return listener.getsockname()[1]
