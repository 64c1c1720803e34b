"""Routing replay, expert load and balancing, on tiny models of every architecture in the table."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from grpo_settings import make_grpo
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r1pipe.config.base import ProblemSet
from r1pipe.config.sft import Supervised
from r1pipe.data.problems import load_problems
from r1pipe.models.expert_load import (
    ExpertLoad,
    describe_load,
    number_packed,
    number_padded,
    sequence_balance_loss,
    update_bias,
)
from r1pipe.models.model import fast_training_kernels
from r1pipe.models.routing import (
    ROUTINGS,
    find_moe_layers,
    find_routers,
    pack_routes,
    replaying,
    route_in_float32,
)
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.rl.update import Updater
from r1pipe.runs.logs import MetricsLog
from r1pipe.trainer.packing import Sample
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_jsonl
from r1pipe.utils.progress import StageProgress

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
DEEPSEEK = {
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "n_shared_experts": 1,
}
SPECIAL = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    "qwen2_moe": {"norm_topk_prob": True, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False},
}


@pytest.fixture(autouse=True)
def small_kernels() -> Iterator[None]:
    """Nothing here is worth a second thread, which waits busily for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fast_training_kernels(CPU, "float32"):
        yield
    torch.set_num_threads(threads)


def make_model(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    values = {**COMMON, **EXPERTS, **SPECIAL.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    for router in find_routers(model):
        if router.bias is not None:
            router.bias.normal_(std=0.3)
    return model.eval()


@pytest.fixture(params=["deepseek_v3", "qwen3_moe", "olmoe"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def ids_BL() -> Tensor:
    return torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def chosen_experts(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """The routes `[N, L, K]` of a plain forward, seen from outside of routing.py."""
    seen: list[Tensor] = []
    handles = [
        r.module.register_forward_hook(lambda module, args, output: seen.append(output[2]))
        for r in find_routers(model)
    ]
    with torch.no_grad():
        model(input_ids=ids_BL)
    for handle in handles:
        handle.remove()
    return torch.stack(seen, dim=1)


def other_experts(routes_NLK: Tensor) -> Tensor:
    """Routes that share no expert with the given ones in most places."""
    return ((routes_NLK + 3) % 8).sort(-1).values


@pytest.mark.parametrize("model_type", ROUTINGS)
@torch.no_grad()
def test_the_table_weighs_as_the_architecture_does(model_type: str, ids_BL: Tensor) -> None:
    model = make_model(model_type)
    outputs: list[tuple] = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=ids_BL)
    assert len(outputs) == len(find_routers(model)) >= 2
    for router, (logits_NE, weights_NK, experts_NK) in zip(find_routers(model), outputs):
        torch.testing.assert_close(router.weigh(logits_NE, experts_NK), weights_NK)


def test_layers_are_the_decoder_s() -> None:
    model = make_model("deepseek_v3")
    assert [router.layer for router in find_routers(model)] == [1, 2]
    assert find_moe_layers(model.config) == [1, 2]
    assert find_moe_layers(make_model("qwen3_moe").config) == [0, 1, 2]


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
    model = make_model("qwen3_moe")
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
    model = make_model(model_type)
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


def test_bias_update_by_hand() -> None:
    """Loads 6, 2, 4, 4, mean 4: down, up, and two stay."""
    router = find_routers(make_model("deepseek_v3"))[0]
    before = router.bias.clone()
    update_bias(router, torch.tensor([6, 2, 4, 4, 4, 4, 4, 4]), 0.01)
    expected = torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(router.bias - before, expected)
    update_bias(find_routers(make_model("qwen3_moe"))[0], torch.zeros(8), 0.01)  # has no bias


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
    model = make_model("deepseek_v3")
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
    model = make_model("qwen3_moe")
    load = ExpertLoad(model)
    routes_NLK = torch.tensor([5, 6]).expand(21, 3, 2)
    with load.counting(torch.zeros(21, dtype=torch.long), 1), replaying(model, routes_NLK):
        model(input_ids=ids_BL)
    load.balance()
    assert load._total_LE.tolist() == [[0, 0, 0, 0, 0, 21, 21, 0]] * 3


def test_the_bias_evens_the_load_out(ids_BL: Tensor) -> None:
    """Only the bias moves here. Groups off: with them an expert depends on its group's others."""
    model = make_model("deepseek_v3")
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
    model = make_model("deepseek_v3")
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

    model = make_model("deepseek_v3")
    extra: list[Tensor] = []
    for router in find_routers(model):
        router.module.register_forward_hook(
            lambda module, args, output: extra.append(
                sequence_balance_loss(output[0], output[0].sigmoid(), sequences_N, 2)
            )
        )
    (model(input_ids=ids_BL).logits.square().mean() + 0.3 * sum(extra) / 6).backward()
    expected = gradients(model)

    model = make_model("deepseek_v3")
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


def make_samples(routes_NLK: Tensor | None = None) -> list[Sample]:
    """Three rollouts of 7 tokens, prompts of 3, with advantages of both signs."""
    samples = []
    for row in range(3):
        ids = [(7 * row + 5 * column) % 59 + 1 for column in range(7)]
        routes = None if routes_NLK is None else routes_NLK[6 * row : 6 * row + 6].numpy()
        rollout = Rollout("p", row, ids[:3], ids[3:], [-1.0] * 4, "", "stop", routes)
        samples.append(Sample(rollout, row - 1.5))
    return samples


def make_updater(model: PreTrainedModel, **changes: object) -> Updater:
    changes = {"learning_rate": 1e-3, "prompts_per_step": 1, "num_generations": 3, **changes}
    return Updater(model, None, make_grpo(**changes), dtype="float32", seed=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_update_replays(model: PreTrainedModel, steps: int) -> None:
    """Old log-probs and update alike take the sampler's routes, and the routers learn."""
    routers = find_routers(model)
    before = [router.module.weight.detach().clone() for router in routers]
    routes_NLK = torch.tensor([5, 6]).expand(18, len(routers), 2)
    updater = make_updater(model, routing_replay=True, steps_per_generation=steps)
    metrics = updater.step(make_samples(routes_NLK), 1, lambda metrics: None)
    for router, weight in zip(routers, before):
        changed_E = (router.module.weight - weight).abs().amax(1) > 0
        assert changed_E[[5, 6]].all()
    # 18 of 21 tokens went to experts 5 and 6: each had at least 18 of the mean's 21 / 4.
    assert metrics["experts/max_violation"] >= 18 / (21 / 4) - 1


def test_the_update_replays_nothing_unasked(model: PreTrainedModel) -> None:
    routes_NLK = torch.tensor([5, 6]).expand(18, len(find_routers(model)), 2)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    with_routes = make_updater(one).step(make_samples(routes_NLK), 1, lambda metrics: None)
    without = make_updater(other).step(make_samples(), 1, lambda metrics: None)
    assert with_routes == without


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_the_update_moves_the_bias(rate: float) -> None:
    model = make_model("deepseek_v3")
    routers = find_routers(model)
    before = [router.bias.clone() for router in routers]
    updater = make_updater(model, bias_update_rate=rate, steps_per_generation=3)
    updater.step(make_samples(), 1, lambda metrics: None)
    moved = [float((router.bias - start).abs().max()) for router, start in zip(routers, before)]
    assert all(0 < m < 3.01 * rate for m in moved) if rate else moved == [0.0, 0.0]


class StageStub:
    """What supervised training reads of a stage's context."""

    def __init__(self, folder: Path):
        self.folder = self.shared_folder = folder
        self.recipe = SimpleNamespace(dtype="float32", seed=0)

    def open_log(self) -> MetricsLog:
        return MetricsLog(self.folder)

    def open_progress(self, label: str, num_steps: int) -> StageProgress:
        return StageProgress(label, num_steps)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe"])
def test_supervised_training_balances(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is counted once, the bias moves by one rate a step, the log has both."""
    from r1pipe.sft.trainer import train_on_traces

    problems = load_problems(ProblemSet(recipe="arithmetic", options={"size": 30}))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = make_model(model_type, **changes)
    routers = find_routers(model)
    before = [router.bias.clone() for router in routers if router.bias is not None]
    counts: list[int] = []
    balance = ExpertLoad.balance

    def count_and_balance(load: ExpertLoad, *, move_bias: bool) -> None:
        counts.append(int(load._counts_LE.sum()))
        balance(load, move_bias)

    monkeypatch.setattr(ExpertLoad, "balance", count_and_balance)
    settings = Supervised(
        max_steps=5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        bias_update_rate=0.01,
        seq_aux_loss_coef=0.1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=10,
    )
    train_on_traces(model, tokenizer, problems, settings, StageStub(tmp_path), "sft")

    rows = [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(counts) == 5
    assert sum(counts) == rows[-1]["num_tokens"] * 2 * len(routers)
    assert 0 < rows[-1]["experts/entropy"] < 1
    assert rows[-1]["learning_rate"] == pytest.approx(4e-4), "the fifth step of a warmup of ten"
    assert rows[-1]["experts/seq_aux_loss"] > 0.9
    for router, start in zip(routers, before):
        moves = (router.bias - start) / 0.01
        torch.testing.assert_close(moves, moves.round(), atol=1e-3, rtol=0)
        assert 0 < moves.abs().max() < 5.01
