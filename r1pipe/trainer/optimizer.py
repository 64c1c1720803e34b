"""The learning rate schedule; and AdamW with moments in CPU memory, which saves half of what a
sharded trainer holds on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1pipe.config.base import Optimization

MOMENTS = ("exp_avg", "exp_avg_sq")


def find_schedule(settings: Optimization) -> tuple[str, dict[str, Any]]:
    """transformers' name for the recipe's schedule, and its arguments besides the steps."""
    schedule = settings.lr_scheduler_type
    if schedule == "constant" and settings.warmup_steps:
        return "constant_with_warmup", {}  # transformers' constant has no warmup
    if schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr": settings.min_lr}
    return schedule, {}


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
