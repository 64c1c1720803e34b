"""FP8, emulated: against a slow rounding block by block, number by number."""

import copy
import itertools

import pytest
import torch
from moe_models import chosen_experts, make_moe_model
from test_adapter import IDS_BL, KINDS, find_logits, make_model
from tiny_models import MODELS
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r1pipe.models import fp8
from r1pipe.models.adapter import Target
from r1pipe.models.fp8 import (
    BLOCK,
    Product,
    RoundedMatrix,
    add_fp8,
    computing_as_sampler,
    lay_out,
    list_rounded,
    multiply_codes,
    round_blocks,
    round_matrix,
)
from r1pipe.models.routing import find_routers, replaying
from r1pipe.models.weights import export_weights

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""Every number that e4m3 has, and two NaN."""
PLAIN = Target("", "weight")


def make(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_by_hand(x_RC: Tensor, rows: int, columns: int) -> Tensor:
    """Each number of a block becomes the nearest multiple of the scale that e4m3 has."""
    numbers = CODES[CODES.isfinite()].unique()
    rounded = torch.empty_like(x_RC)
    num_rows, num_columns = x_RC.shape
    for top, left in itertools.product(range(0, num_rows, rows), range(0, num_columns, columns)):
        place = slice(top, top + rows), slice(left, left + columns)
        block = x_RC[place].double()
        scale = block.abs().max() / 448
        nearest = (block.unsqueeze(-1) / scale - numbers).abs().argmin(-1)
        rounded[place] = numbers[nearest] * scale
    return rounded


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((256, 128), 128, 128),
        ((150, 200), 128, 128),
        ((5, 3), 128, 128),
        ((4, 256), 1, 128),
        ((3, 130), 1, 128),
        ((130, 3), 128, 1),
    ],
)
@pytest.mark.parametrize("scale", [1e-30, 0.02, 1e30])
def test_rounding_is_that_by_hand(
    shape: tuple[int, int], rows: int, columns: int, scale: float
) -> None:
    """Ragged last blocks, too; a batch of matrices each by itself."""
    x = make(2, *shape, scale=scale)
    rounded = round_blocks(x, rows, columns)
    for matrix, found in zip(x, rounded):
        expected = round_by_hand(matrix, rows, columns)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # Half of the distance of two numbers with three bits behind the first.
    large = x.abs() > x.abs().max() / 448
    assert ((rounded - x).abs() / x.abs())[large].max() < 2**-4 + 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (1, 128), (128, 1)])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-37, 1e-6, 1.0, 1e35])
def test_rounding_twice_is_rounding_once(rows: int, columns: int, scale: float) -> None:
    for seed in range(5):
        once = round_blocks(make(300, 200, seed=seed, scale=scale), rows, columns)
        assert once.isfinite().all()
        assert torch.equal(round_blocks(once, rows, columns), once)


def test_bfloat16_stays() -> None:
    x = make(3, 200).bfloat16()
    rounded = round_blocks(x, 1, 128)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, round_blocks(x.float(), 1, 128).bfloat16())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_spoils_its_block_alone(wrong: float) -> None:
    x = make(256, 256)
    spoiled = x.clone()
    spoiled[3, 5] = wrong
    rounded, expected = round_blocks(spoiled, 128, 128), round_blocks(x, 128, 128)
    assert rounded[:128, :128].isnan().all()
    expected[:128, :128] = 0
    assert torch.equal(rounded.nan_to_num(0), expected)


def test_a_pair_of_fused_matrices_is_rounded_as_two() -> None:
    """Gate and up of experts: the blocks of a checkpoint's own matrices."""
    gate, up = make(2, 100, 70), make(2, 100, 70, seed=1, scale=30)
    rounded = round_matrix(torch.cat([gate, up], dim=1), Target("x.experts", "gate_up_proj"))
    parts = [round_blocks(part, BLOCK, BLOCK) for part in (gate, up)]
    assert torch.equal(rounded, torch.cat(parts, dim=1))
    assert not torch.equal(rounded, round_blocks(torch.cat([gate, up], dim=1), BLOCK, BLOCK))


def test_three_products() -> None:
    """Forward x W^T, then dy W and dy^T x, each from operands rounded along what it adds up."""
    x_BLI = make(2, 75, 200).requires_grad_()
    weight_OI = make(150, 200, seed=1).requires_grad_()
    gradient_BLO = make(2, 75, 150, seed=2, scale=1e-6)
    product_BLO = Product.apply(x_BLI, RoundedMatrix.apply(weight_OI, PLAIN))
    product_BLO.backward(gradient_BLO)

    x_NI, gradient_NO = x_BLI.detach().flatten(0, 1), gradient_BLO.flatten(0, 1)
    matrix_OI = round_by_hand(weight_OI.detach(), 128, 128)
    tiles_NI = round_by_hand(x_NI, 1, 128)
    expected = {
        "y": tiles_NI @ matrix_OI.mT,
        "dx": round_by_hand(gradient_NO, 1, 128) @ matrix_OI,
        "dW": round_by_hand(gradient_NO, 128, 1).mT @ round_by_hand(tiles_NI, 128, 1),
    }
    found = {
        "y": product_BLO.detach().flatten(0, 1),
        "dx": x_BLI.grad.flatten(0, 1),
        "dW": weight_OI.grad,
    }
    for name, tensor in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5 * size)
    # So small that a product in full precision is told apart.
    plain = gradient_NO.mT @ x_NI
    assert (found["dW"] - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("rows", [1, BLOCK])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 200, 130), (128, 128, 128), (300, 7, 700)])
def test_the_devices_product_is_asked_for_as_torch_demands(
    m: int, n: int, k: int, rows: int
) -> None:
    """On the meta device, where torch checks shapes and strides as on a Hopper GPU."""
    a_MK, b_NK = torch.empty(m, k, device="meta"), torch.empty(n, k, device="meta")
    product_MN = multiply_codes(a_MK, b_NK, rows)
    assert product_MN.shape == (m, n)
    assert product_MN.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, BLOCK])
def test_codes_and_scales_for_the_device_are_the_rounded_numbers(rows: int) -> None:
    x_RC = make(200, 700) * torch.logspace(-3, 3, 700)
    codes_RC, scales = lay_out(x_RC, rows)
    assert codes_RC.shape == (256, 768)
    scales_RC = scales if rows == 1 else scales.mT[:, :6]
    each_RC = scales_RC.repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)
    found_RC = (codes_RC.float() * each_RC)[:200, :700]
    torch.testing.assert_close(found_RC, round_blocks(x_RC, rows, BLOCK), rtol=1e-6, atol=0)


def make_changed(kind: str, changes: dict[str, float]) -> PreTrainedModel:
    if kind not in ("qwen3", "llama"):
        return make_moe_model(kind, **changes)
    torch.manual_seed(0)
    settings = {**MODELS[kind], **changes, "model_type": kind}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=60, **settings))


def find_rounded(model: torch.nn.Module) -> set[str]:
    """Names of a checkpoint's tensors that differ when exported in FP8."""
    plain = dict(export_weights(model))
    rounded = dict(export_weights(model, fp8=True))
    assert plain.keys() == rounded.keys()
    return {name for name in plain if not torch.equal(plain[name], rounded[name])}


def test_what_stays_in_full_precision() -> None:
    model = make_model("deepseek_v3")
    kept = set(dict(export_weights(model))) - find_rounded(model)
    parts = {name.removesuffix(".weight").rpartition(".")[2] for name in kept}
    assert parts == {
        *("embed_tokens", "lm_head", "gate", "e_score_correction_bias"),
        *("norm", "input_layernorm", "post_attention_layernorm", "kv_a_layernorm"),
        *("kv_a_proj_with_mqa", "kv_b_proj"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_a_checkpoint_are_rounded_one_by_one(kind: str) -> None:
    """However the model holds them; wider than a block, so that a pair is told from one."""
    sizes = {"moe_intermediate_size": 80, "hidden_size": 160, "intermediate_size": 80}
    model = make_changed(kind, sizes)
    rounded, plain = dict(export_weights(model, fp8=True)), dict(export_weights(model))
    names = find_rounded(model)
    assert names
    for name in names:
        assert torch.equal(rounded[name], round_blocks(plain[name], BLOCK, BLOCK)), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_computes_as_its_sampler(kind: str) -> None:
    """As one that was given the rounded weights; outside of that, if it is off, as before."""
    model = make_model(kind)
    before = find_logits(model)
    sampler = copy.deepcopy(model)
    for target in list_rounded(sampler):
        weight = getattr(sampler.get_submodule(target.path), target.name)
        weight.copy_(round_matrix(weight, target))
    add_fp8(model, is_on=False)
    with computing_as_sampler(model, weights=True):
        assert torch.equal(find_logits(model), find_logits(sampler))
    assert torch.equal(find_logits(model), before)
    add_fp8(model, is_on=True)
    with computing_as_sampler(model, weights=False):
        assert torch.equal(find_logits(model), before)
    assert (find_logits(model) - find_logits(sampler)).abs().max() > 1e-3, "activations, too"


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_in_fp8(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each expert that a token goes to, too; attention, routers and head are not. Gradients are
    near those of the model in full precision, with the same routes."""
    model, plain = (make_changed(kind, {"initializer_range": 0.1}) for _ in range(2))
    count = add_fp8(model, is_on=True)
    assert count == len([*list_rounded(model)])
    taken: list[int] = []
    multiply = fp8.multiply

    def note(x: Tensor, weight_OI: Tensor, *bias: Tensor) -> Tensor:
        taken.append(x.numel() // x.shape[-1])
        return multiply(x, weight_OI, *bias)

    monkeypatch.setattr(fp8, "multiply", note)
    routes_NLK = chosen_experts(plain, IDS_BL) if find_routers(plain) else None
    gradients = []
    for some in (model, plain):
        with replaying(some, routes_NLK):
            find_logits(some).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in some.parameters()]))
    assert 0.95 < cosine_similarity(*gradients, dim=0) < 0.999
    experts = [t for t in list_rounded(model) if t.path.endswith(".experts")]
    # A token is in each linear layer once, and once for each of its experts in an expert's.
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    assert sum(taken) == IDS_BL.numel() * (count - len(experts) + top_k * len(experts))
