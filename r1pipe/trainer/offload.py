"""Frozen weights that leave the GPU to vLLM: whole while it samples, back for the update.

Between the two a forward pass, which the comparison after a weight sync needs, gets them one layer
at a time. They never change, so that leaving copies nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from r1pipe.models.model import find_layers
from r1pipe.trainer.policy import Policy


class FrozenWeights:
    """Of a policy with an adapter, in one process. At first they are where the policy is."""

    def __init__(self, policy: Policy):
        self.device = policy.model.device
        self.away = False
        layers = list(find_layers(policy.model))
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        parts = [(layer, list_frozen(layer)) for layer in layers]
        parts.append((policy, (p for p in list_frozen(policy) if p not in inside)))
        self.host: dict[Tensor, Tensor] = {}
        """Copies in the CPU's memory by parameter."""
        for module, parameters in parts:
            part = list(parameters)
            for parameter in part:
                host = parameter.data.to("cpu", copy=True)
                self.host[parameter] = host.pin_memory() if self.device.type == "cuda" else host
            module.register_forward_pre_hook(lambda *_, part=part: self.lend(part))
            module.register_forward_hook(lambda *_, part=part: self.take_back(part))

    def leave(self) -> None:
        """Only forward passes without gradient until `enter`."""
        self.away = True
        self.take_back(self.host)

    def enter(self) -> None:
        self.lend(self.host)
        self.away = False

    def lend(self, parameters: "list[Tensor] | dict[Tensor, Tensor]") -> None:
        if self.away:
            for parameter in parameters:
                # A copy on the CPU, too: what is tested there is what runs on a GPU.
                parameter.data = self.host[parameter].to(self.device, copy=True)

    def take_back(self, parameters: "list[Tensor] | dict[Tensor, Tensor]") -> None:
        if self.away:
            for parameter in parameters:
                parameter.data = self.host[parameter]
            if self.device.type == "cuda" and parameters is self.host:
                torch.cuda.empty_cache()  # vLLM's allocator is another


def list_frozen(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module.parameters() if not parameter.requires_grad)
