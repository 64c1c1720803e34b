"""The learning rate schedule; the gradient's norm over all ranks; and AdamW with moments in CPU
memory, which saves half of what a sharded trainer holds on a GPU."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from r1pipe.config.base import Optimization
from r1pipe.utils import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 2**25
"""Most numbers that are summed over ranks in one message."""


def find_schedule(settings: Optimization) -> tuple[str, dict[str, Any]]:
    """transformers' name for the recipe's schedule, and its arguments besides the steps."""
    schedule = settings.lr_scheduler_type
    if schedule == "constant" and settings.warmup_steps:
        return "constant_with_warmup", {}  # transformers' constant has no warmup
    if schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr": settings.min_lr}
    return schedule, {}


def group_by_mesh(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """An optimizer's groups: its kernels for many tensors take those of one mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": group} for group in groups.values()]


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Over ranks that each hold every parameter in full; every rank must call it, with gradients of
    the same ones."""
    if distributed.alone():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        return
    while gradients:
        bucket, size = [], 0
        while gradients and (not bucket or size + gradients[-1].numel() <= BUCKET):
            bucket.append(gradients.pop())
            size += bucket[-1].numel()
        flat_N = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat_N)
        for gradient, sum_N in zip(bucket, flat_N.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(sum_N.view_as(gradient))


@torch.no_grad()
def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> float:
    """torch's `clip_grad_norm_`, which takes parameters of one mesh only. Returns the norm before
    clipping; every rank must call it."""
    whole = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in whole]
    norm = get_total_norm(gradients)
    if any(isinstance(gradient, DTensor) for gradient in whole):
        square = norm.double().square()
        dist.all_reduce(square)
        norm = square.sqrt().to(norm.dtype)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(coefficient)
    return float(norm)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW one parameter at a time: its moments move to its device, are used, and move back.

    As in ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840), but the arithmetic stays on the GPU and
    equals AdamW's bit by bit. It moves 16 bytes per parameter over the bus at each step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ValueError("no closure: the loss is not computed again between parameters")
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    self.move_moments(parameter, parameter.device)
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step()
                    self.move_moments(parameter, torch.device("cpu"))
        finally:
            self.param_groups = groups

    def load_state_dict(self, state_dict: dict) -> None:
        """Unlike torch's, without moving all moments to the parameters' device on the way."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = (n for group in state_dict["param_groups"] for n in group["params"])
        parameters = (p for group in self.param_groups for p in group["params"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])

    def move_moments(self, parameter: Tensor, device: torch.device) -> None:
        # Not self.state[parameter], which adds an empty state that AdamW takes for initialised.
        state = self.state.get(parameter, {})
        for name in MOMENTS:
            if name in state:
                state[name] = state[name].to(device)
