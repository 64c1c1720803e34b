"""The experts' load, the bias that evens it out, and the auxiliary loss."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moe_models import chosen_experts, make_moe_model, number_padded
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.models.expert_load import (
    ExpertLoad,
    describe_load,
    sequence_balance_loss,
    update_bias,
)
from r1pipe.models.routing import (
    find_routers,
    replaying,
)

CPU = torch.device("cpu")


def test_bias_update_by_hand() -> None:
    """Loads 6, 2, 4, 4, mean 4: down, up, and two stay."""
    router = find_routers(make_moe_model("deepseek_v3"))[0]
    before = router.bias.clone()
    update_bias(router, torch.tensor([6, 2, 4, 4, 4, 4, 4, 4]), 0.01)
    expected = torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(router.bias - before, expected)
    update_bias(find_routers(make_moe_model("qwen3_moe"))[0], torch.zeros(8), 0.01)  # has no bias


def test_load_by_hand() -> None:
    """Layer 1 sends everything to one of two experts, layer 3 is even."""
    metrics = describe_load(torch.tensor([[8, 0], [4, 4]]), [1, 3])
    assert metrics["experts/layer_1/max_violation"] == 1
    assert metrics["experts/layer_3/max_violation"] == 0
    assert metrics["experts/layer_1/entropy"] == 0
    assert metrics["experts/layer_3/entropy"] == pytest.approx(1)
    assert metrics["experts/max_violation"] == metrics["experts/entropy"] == pytest.approx(0.5)
    assert describe_load(torch.zeros(2, 4), [0, 1]) == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_is_not_counted_and_recomputation_counts_once(
    ids_BL: Tensor, checkpointing: bool
) -> None:
    model = make_moe_model("deepseek_v3")
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    routes_NLK = chosen_experts(model, ids_BL)
    sequences_N = number_padded(torch.arange(7) < torch.tensor([[7], [4], [2]]))
    load = ExpertLoad(model)
    with load.counting(sequences_N, 3):
        model(input_ids=ids_BL, use_cache=False).logits.sum().backward()
    model(input_ids=ids_BL)  # not counted
    load.balance()
    expected = [routes_NLK[sequences_N >= 0, i].flatten().bincount(minlength=8) for i in (0, 1)]
    assert torch.equal(load._total_LE, torch.stack(expected))
    assert load._total_LE.sum() == (7 + 4 + 2) * 2 * 2
    assert load.metrics()["experts/max_violation"] > 0
    assert load.metrics() == {}, "counted anew from the last call on"


def test_replayed_routes_are_what_is_counted(ids_BL: Tensor) -> None:
    model = make_moe_model("qwen3_moe")
    load = ExpertLoad(model)
    routes_NLK = torch.tensor([5, 6]).expand(21, 3, 2)
    with load.counting(torch.zeros(21, dtype=torch.long), 1), replaying(model, routes_NLK):
        model(input_ids=ids_BL)
    load.balance()
    assert load._total_LE.tolist() == [[0, 0, 0, 0, 0, 21, 21, 0]] * 3


def test_the_bias_evens_the_load_out(ids_BL: Tensor) -> None:
    """Only the bias moves here. Groups off: with them an expert depends on its group's others."""
    model = make_moe_model("deepseek_v3")
    for router in find_routers(model):
        router.module.num_group = router.module.topk_group = 1
        router.bias.zero_()
        router.bias[0] = 3.0  # chosen by every token
    load = ExpertLoad(model, bias_update_rate=0.05)
    ids_BL = torch.randint(1, 60, (8, 16), generator=torch.Generator().manual_seed(1))
    violations = []
    with torch.no_grad():
        for _ in range(80):
            with load.counting(torch.zeros(ids_BL.numel(), dtype=torch.long), 1):
                model(input_ids=ids_BL)
            load.balance()
            violations.append(load.metrics()["experts/max_violation"])
    assert violations[0] > 2.9
    assert sum(violations[-10:]) / 10 < 0.5


def balance_on_one_rank(rank: int, folder: str) -> None:
    """One of two ranks: each sends its own 10 tokens to experts of its own."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = make_moe_model("deepseek_v3")
    before = find_routers(model)[0].bias.clone()
    load = ExpertLoad(model, bias_update_rate=0.01, seq_aux_loss_coef=0.1)
    ids_BL = torch.ones(1, 10, dtype=torch.long)
    experts = torch.tensor([[0, 1], [2, 3]])[rank].expand(10, 2, 2)
    with load.counting(torch.zeros(10, dtype=torch.long), 1), replaying(model, experts):
        model(input_ids=ids_BL)
    load.balance()
    moved = (find_routers(model)[0].bias - before).tolist()
    torch.save((moved, load.metrics()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_loads_are_summed_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(balance_on_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    moved, metrics = first
    # A difference of two biases below 1, each rounded to float32.
    assert moved == pytest.approx([-0.01] * 4 + [0.01] * 4, abs=1e-6)
    assert metrics["experts/max_violation"] == 1  # 10 tokens for 4 of 8 experts: mean 5


def test_sequence_balance_loss_by_hand() -> None:
    """Two experts, one chosen, sequences of two and one tokens, and one token of padding.

    Sequence 0: scores (3, 1) and (1, 1) to shares (.75, .25), (.5, .5); choices 0 and 1:
    f = 2 x (1/2, 1/2), P = (.625, .375): loss 1. Sequence 1: share (.2, .8), choice 1: 2 x .8.
    """
    scores_NE = torch.tensor([[3.0, 1.0], [1.0, 1.0], [9.0, 9.0], [1.0, 4.0]])
    logits_NE = torch.tensor([[3.0, 1.0], [1.0, 1.1], [9.0, 9.0], [1.0, 4.0]])
    loss = sequence_balance_loss(logits_NE, scores_NE, torch.tensor([0, 0, -1, 1]), 1)
    assert float(loss) == pytest.approx(1 + 1.6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_loss_reaches_the_router(ids_BL: Tensor, checkpointing: bool) -> None:
    """The same gradient as from adding the loss by hand, with its coefficient and mean."""
    sequences_N = number_padded(torch.arange(7) < torch.tensor([[7], [7], [3]]))

    def gradients(model: PreTrainedModel) -> list[Tensor]:
        return [router.module.weight.grad.clone() for router in find_routers(model)]

    model = make_moe_model("deepseek_v3")
    extra: list[Tensor] = []
    for router in find_routers(model):
        router.module.register_forward_hook(
            lambda module, args, output: extra.append(
                sequence_balance_loss(output[0], output[0].sigmoid(), sequences_N, 2)
            )
        )
    (model(input_ids=ids_BL).logits.square().mean() + 0.3 * sum(extra) / 6).backward()
    expected = gradients(model)

    model = make_moe_model("deepseek_v3")
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    load = ExpertLoad(model, seq_aux_loss_coef=0.3)
    with load.counting(sequences_N, num_sequences=6):
        model(input_ids=ids_BL, use_cache=False).logits.square().mean().backward()
    for own, other in zip(gradients(model), expected):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-4)
    load.balance()
    mean = float(sum(extra).detach()) / 3 / 2
    assert load.metrics()["experts/seq_aux_loss"] == pytest.approx(mean, rel=1e-5)
