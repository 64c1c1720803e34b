"""Schedules, and AdamW with its moments in the CPU's memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from grpo_settings import make_grpo
from transformers import (
    PreTrainedModel,
    get_scheduler,
)

from r1pipe.config.rl import Grpo
from r1pipe.config.sft import Supervised
from r1pipe.trainer.optimizer import OffloadedAdamW, find_schedule

SCHEDULES = [
    (make_grpo, {}, [0, 0.5, 1, 1, 1, 1]),
    (make_grpo, {"lr_scheduler_type": "linear"}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    (make_grpo, {"lr_scheduler_type": "cosine"}, [0, 0.5, 1, 0.854, 0.5, 0.146]),
    (Supervised, {"lr_scheduler_type": "constant"}, [0, 0.5, 1, 1, 1, 1]),
    (Supervised, {"lr_scheduler_type": "linear"}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    (Supervised, {"min_lr": 0.2}, [0, 0.5, 1, 0.883, 0.6, 0.317]),
]


@pytest.mark.parametrize(("make", "settings", "expected"), SCHEDULES)
def test_every_schedule_warms_up(
    make: Callable[..., Grpo | Supervised], settings: dict, expected: list[float]
) -> None:
    """Two steps of six; without them each begins at its top."""
    for warmup_steps in (2, 0):
        stage = make(max_steps=6, learning_rate=1.0, warmup_steps=warmup_steps, **settings)
        name, arguments = find_schedule(stage)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(
            name, optimizer, warmup_steps, stage.max_steps, scheduler_specific_kwargs=arguments
        )
        rates = []
        for _ in expected:
            rates += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        if warmup_steps:
            assert rates == pytest.approx(expected, abs=1e-3)
        else:
            assert rates[0] == 1.0


def test_an_offloaded_optimizer_does_what_adamw_does(model: PreTrainedModel) -> None:
    """To the bit, over a change of the learning rate, and going on from a saved state."""
    makers = {"all": torch.optim.AdamW, "offloaded": OffloadedAdamW}
    models = {name: copy.deepcopy(model) for name in makers}
    for name, make in makers.items():
        parameters = list(models[name].parameters())
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
        optimizer = make(parameters, **settings)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
            if step == 1:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(parameters, **settings)
                optimizer.load_state_dict(state)
        assert len(optimizer.state_dict()["state"]) == len(parameters)
    for one, other in zip(models["all"].parameters(), models["offloaded"].parameters()):
        assert torch.equal(one, other)
