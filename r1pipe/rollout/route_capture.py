"""Records which experts vLLM's routers choose, inside the engine's own process.

On GPU vLLM returns routes itself (`enable_return_routed_experts`), by a model runner that does not
run on CPU. Here each router calls a function with its choice, and the rows of a forward pass are
assigned by the runner's order of requests.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from r1pipe.types import Rollout
from r1pipe.utils import distributed


class RouteCapture:
    """`runner` is vLLM's model runner. Prompts must not be read from the prefix cache."""

    def __init__(self, runner: Any):
        self.runner = runner
        layers = {
            module.layer_id: module.router
            for module in runner.get_model().modules()
            if hasattr(module, "routed_experts") and hasattr(module, "router")
        }
        self.routers = [layers[layer] for layer in sorted(layers)]
        self._chosen: dict[int, torch.Tensor] = {}
        self._passes: list[tuple[list[str], np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def dtype(self) -> type[np.integer]:
        return np.uint8 if self.routers[0].global_num_experts <= 256 else np.int16

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record every forward pass within it; `collect` then returns the routes."""
        self._passes.clear()
        execute = self.runner.execute_model

        def execute_and_record(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            self._chosen.clear()
            output = execute(scheduled, *args, **kwargs)
            if self._chosen:
                self._keep(scheduled.num_scheduled_tokens)
            return output

        self.runner.execute_model = execute_and_record
        for index, router in enumerate(self.routers):
            router.set_capture_fn(self._choose(index))
        try:
            yield
        finally:
            del self.runner.execute_model  # the instance's; the class has its own
            for router in self.routers:
                router.set_capture_fn(None)

    def _choose(self, index: int) -> Any:
        def capture(experts_NK: torch.Tensor) -> None:
            self._chosen[index] = experts_NK

        return capture

    def _keep(self, num_scheduled: dict[str, int]) -> None:
        """Split one pass's rows, which are in the order of the runner's batch."""
        requests = list(self.runner.input_batch.req_ids)
        counts = np.array([num_scheduled[request] for request in requests])
        starts = self.runner.input_batch.num_computed_tokens_cpu[: len(requests)].copy()
        routes_NLK = torch.stack([self._chosen[i] for i in range(len(self.routers))], dim=1)
        rows = routes_NLK[: counts.sum()].numpy().astype(self.dtype)
        self._passes.append((requests, starts, counts, rows))

    def collect(self, lengths: dict[str, int]) -> dict[str, np.ndarray]:
        """Routes `[length, L, K]` of each request, by the id of its output.

        Raises RuntimeError if a token's route was not seen.
        """
        shape = (len(self.routers), self.routers[0].top_k)
        routes = {name: np.zeros((length, *shape), self.dtype) for name, length in lengths.items()}
        seen = {name: np.zeros(length, bool) for name, length in lengths.items()}
        for requests, starts, counts, rows in self._passes:
            parts = np.split(rows, np.cumsum(counts)[:-1])
            for request, start, part in zip(requests, starts, parts, strict=True):
                # The engine's own id is the output's plus random characters.
                name = request.rpartition("-")[0]
                part = part[: max(0, lengths[name] - start)]
                routes[name][start : start + len(part)] = part
                seen[name][start : start + len(part)] = True
        self._passes.clear()
        for name, tokens in seen.items():
            if not tokens.all():
                raise RuntimeError(
                    f"request {name}: the routes of {int((~tokens).sum())} of {len(tokens)} tokens "
                    "were not seen; was the prefix cache read?"
                )
        return routes


def routes_on_every_rank(tensor_parallel_size: int) -> contextlib.AbstractContextManager:
    """Engines built within it return routes on every rank.

    vLLM returns them on the first rank of a tensor-parallel group only. Under external_launcher
    every rank is an engine and asks itself.
    """
    if tensor_parallel_size == 1 or distributed.alone():
        return contextlib.nullcontext()
    return mock.patch(
        "vllm.distributed.aux_output_connector.worker.get_tp_group",
        return_value=SimpleNamespace(is_first_rank=True),
    )


def count_routes(rollout: Rollout) -> int:
    """Number of tokens that the sampler has read."""
    return len(rollout.prompt_ids) + len(rollout.completion_ids) - 1


def take_routes(result: Any, moe_layers: list[int]) -> np.ndarray:
    """The routes that vLLM returns, `[prompt + completion - 1, L, K]`, L its mixture-of-experts
    layers. Raises RuntimeError if the sampler was not opened with them."""
    if not moe_layers:
        raise RuntimeError("the sampler was opened without routes")
    output = result.outputs[0]
    rows = output.routed_experts
    length = len(result.prompt_token_ids) + len(output.token_ids) - 1
    if rows is None or len(rows) < length:
        found = 0 if rows is None else len(rows)
        raise RuntimeError(f"vLLM returned the routes of {found} of {length} tokens")
    # One column per decoder layer; those of dense layers are unused.
    return rows[:length, moe_layers]
