"""Routing replay, on tiny models of every architecture in the table."""

import copy

import numpy as np
import pytest
import torch
from moe_models import COMMON, chosen_experts, make_moe_model, number_padded, other_experts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r1pipe.models.expert_load import (
    ExpertLoad,
    number_packed,
)
from r1pipe.models.routing import (
    ROUTINGS,
    find_moe_layers,
    find_routers,
    pack_routes,
    replaying,
    route_in_float32,
)
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(params=["deepseek_v3", "qwen3_moe", "olmoe"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_moe_model(request.param)


@pytest.mark.parametrize("model_type", ROUTINGS)
@torch.no_grad()
def test_the_table_weighs_as_the_architecture_does(model_type: str, ids_BL: Tensor) -> None:
    model = make_moe_model(model_type)
    outputs: list[tuple] = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=ids_BL)
    assert len(outputs) == len(find_routers(model)) >= 2
    for router, (logits_NE, weights_NK, experts_NK) in zip(find_routers(model), outputs):
        torch.testing.assert_close(router.weigh(logits_NE, experts_NK), weights_NK)


def test_layers_are_the_decoder_s() -> None:
    model = make_moe_model("deepseek_v3")
    assert [router.layer for router in find_routers(model)] == [1, 2]
    assert find_moe_layers(model.config) == [1, 2]
    assert find_moe_layers(make_moe_model("qwen3_moe").config) == [0, 1, 2]


@torch.no_grad()
def test_replaying_its_own_routes_changes_nothing(model: PreTrainedModel, ids_BL: Tensor) -> None:
    plain = model(input_ids=ids_BL).logits
    routes_NLK = chosen_experts(model, ids_BL)
    with replaying(model, routes_NLK.flip(-1)):
        replayed = model(input_ids=ids_BL).logits
    torch.testing.assert_close(replayed, plain, atol=1e-5, rtol=0)
    assert torch.equal(model(input_ids=ids_BL).logits, plain), "the hooks are gone"


@torch.no_grad()
def test_given_routes_are_taken_and_change_the_output(
    model: PreTrainedModel, ids_BL: Tensor
) -> None:
    routes_NLK = other_experts(chosen_experts(model, ids_BL))
    with replaying(model, routes_NLK):
        assert torch.equal(chosen_experts(model, ids_BL), routes_NLK)
        replayed = model(input_ids=ids_BL).logits
    assert (replayed - model(input_ids=ids_BL).logits).abs().max() > 0.01


@torch.no_grad()
def test_minus_one_is_the_model_s_own_choice(model: PreTrainedModel, ids_BL: Tensor) -> None:
    own_NLK = chosen_experts(model, ids_BL)
    plain = model(input_ids=ids_BL).logits
    with replaying(model, torch.full_like(own_NLK, -1)):
        assert torch.equal(chosen_experts(model, ids_BL), own_NLK)
        torch.testing.assert_close(model(input_ids=ids_BL).logits, plain, atol=1e-5, rtol=0)
    # Only the last token of the last row is routed elsewhere: nothing before it notices.
    part_NLK = torch.full_like(own_NLK, -1)
    part_NLK[-1] = other_experts(own_NLK)[-1]
    with replaying(model, part_NLK):
        logits = model(input_ids=ids_BL).logits
    torch.testing.assert_close(logits[:, :-1], plain[:, :-1], atol=1e-5, rtol=0)
    assert (logits[-1, -1] - plain[-1, -1]).abs().max() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_router_learns_under_replay(
    model: PreTrainedModel, ids_BL: Tensor, checkpointing: bool
) -> None:
    """The gradient is that of the scores at the given experts; recomputation sees the same routes.

    The expected one comes from a difference quotient along the gradient."""
    routes_NLK = other_experts(chosen_experts(model, ids_BL))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()

    def loss() -> Tensor:
        return model(input_ids=ids_BL, use_cache=False).logits.double().square().mean()

    weight = find_routers(model)[0].module.weight
    with replaying(model, routes_NLK):
        loss().backward()
        gradient = weight.grad.clone()
        assert gradient.norm() > 1e-4
        step = 1e-2 * gradient / gradient.norm()
        with torch.no_grad():
            weight += step
            above = loss()
            weight -= 2 * step
            below = loss()
    slope = float(above - below) / (2 * float(step.norm()))
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)


def test_wrong_shapes_are_refused(ids_BL: Tensor) -> None:
    model = make_moe_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"2\) for a model of 3 mixture-of-experts layers"):
        replaying(model, torch.zeros(21, 2, 2, dtype=torch.int16)).__enter__()
    with (
        replaying(model, torch.zeros(20, 3, 2, dtype=torch.int16)),
        pytest.raises(ValueError, match="routes of 20 tokens for an input of 21"),
    ):
        model(input_ids=ids_BL)


def test_dense_and_unknown_models() -> None:
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **COMMON))
    load = ExpertLoad(dense, bias_update_rate=1e-3, seq_aux_loss_coef=1e-4)
    with load.counting(torch.zeros(5, dtype=torch.long), 1):
        dense(input_ids=torch.ones(1, 5, dtype=torch.long))
    load.balance()
    assert load.metrics() == {}
    with replaying(dense, None):
        pass
    dense.config.model_type = "new_moe"
    dense.experts = torch.nn.Identity()
    assert ExpertLoad(dense, bias_update_rate=1e-3).metrics() == {}
    with pytest.raises(UserError, match=r'"new_moe" is a mixture of experts whose routing'):
        find_routers(dense)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("model_type", ROUTINGS)
def test_routers_compute_in_float32(model_type: str, autocast: bool, ids_BL: Tensor) -> None:
    """Under autocast, and in layers that are bf16 themselves; a copy of the model with its own."""
    model = make_moe_model(model_type)
    route_in_float32(model)
    model = copy.deepcopy(model)
    if not autocast:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    seen = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda *call: seen.append(call))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids_BL)
    for router, (module, (hidden,), (logits_NE, weights_NK, _)) in zip(
        find_routers(model), seen, strict=True
    ):
        assert module is router.module
        hidden_ND = hidden.reshape(-1, hidden.shape[-1]).float()
        bias = getattr(module, "bias", None)
        expected = hidden_ND @ module.weight.float().T + (0 if bias is None else bias.float())
        torch.testing.assert_close(logits_NE, expected, atol=1e-5, rtol=1e-5)
        assert weights_NK.dtype == torch.float32


def test_where_tokens_lie() -> None:
    """Rollouts of 3 and 2 tokens, of which the sampler read 2 and 1."""
    first, second = np.full((2, 1, 2), 7, np.uint8), np.full((1, 1, 2), 250, np.uint8)
    packed_NLK = pack_routes([first, second], CPU)
    assert packed_NLK.shape == (5, 1, 2)
    assert packed_NLK[:, 0, 1].tolist() == [7, 7, -1, 250, -1]
    assert number_packed([3, 2], CPU).tolist() == [0, 0, 0, 1, 1]
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
    assert number_padded(mask).tolist() == [0, 0, 0, -1, -1, 1, 1, -1]
