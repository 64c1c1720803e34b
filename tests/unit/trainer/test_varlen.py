"""Attention by torch's varlen kernels, whose CUDA code is replaced by the formula here.

The op, its autograd and everything of ours around it are real; the kernels ask of their arguments
what flash-attention's own do (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp).
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_models import MODELS, SMALL
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from r1pipe.models.model import build_model
from r1pipe.trainer import attention
from r1pipe.trainer.attention import attend_packed, attention_arguments, find_implementation
from r1pipe.trainer.fsdp import shard
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def check_layout(states: list[Tensor], ends: Tensor, max_length: int) -> None:
    query, *keys = states
    for tensor in states:
        assert tensor.stride(-1) == 1
        assert all(n % 8 == 0 for n in (tensor.storage_offset(), *tensor.stride()[:-1]))
        assert tensor.dtype == query.dtype
    size = query.shape[-1]
    assert size % 8 == 0
    assert size <= 256
    assert all(tensor.shape == (len(query), keys[0].shape[1], size) for tensor in keys)
    assert query.shape[1] % keys[0].shape[1] == 0
    assert ends.dtype == torch.int32
    # Rows beyond the last sequence would get gradients of NaN (pytorch#176793).
    assert ends[-1] == len(query)
    assert int(ends.diff().max()) == max_length


def weigh(
    query: Tensor, key: Tensor, causal: bool, scale: float, window: list[int]
) -> tuple[Tensor, Tensor]:
    """Of one sequence, `[L, H, D]` and keys of as many heads: weights `[H, L, L]` and the scores'
    log-sum-exp `[H, L]`."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    before, after = window if not causal else (-1, 0)
    distance = torch.arange(len(query)).unsqueeze(1) - torch.arange(len(query))
    seen = torch.ones_like(distance, dtype=torch.bool)
    if before >= 0:
        seen &= distance <= before
    if after >= 0:
        seen &= -distance <= after
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp(), lse


@pytest.fixture
def dtypes() -> Iterator[list[torch.dtype]]:
    """Kernels for the CPU; filled with the dtype of each call, forward and backward."""
    called = []

    def forward(
        query, key, value, ends, ends_k, max_q, max_k, causal=False, scale=None, window=None, *rest
    ):
        check_layout([query, key, value], ends, max_q)
        assert (ends is ends_k, max_q) == (True, max_k)
        called.append(query.dtype)
        group = query.shape[1] // key.shape[1]
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float)
        for part in [slice(*pair) for pair in zip(ends[:-1].tolist(), ends[1:].tolist())]:
            k, v = (t[part].float().repeat_interleave(group, 1) for t in (key, value))
            weights, lse[:, part] = weigh(query[part].float(), k, causal, scale, window)
            out[part] = torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype)
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad, query, key, value, out, lse, ends, ends_k, max_q, max_k, causal, rng, scale, window
    ):
        called.append(grad.dtype)
        assert grad.shape == out.shape == query.shape
        group = query.shape[1] // key.shape[1]
        grads = [torch.empty_like(t) for t in (query, key, value)]
        for part in [slice(*pair) for pair in zip(ends[:-1].tolist(), ends[1:].tolist())]:
            q, o, g = (t[part].float() for t in (query, out, grad))
            k, v = (t[part].float().repeat_interleave(group, 1) for t in (key, value))
            weights, found = weigh(q, k, causal, scale, window)
            torch.testing.assert_close(found, lse[:, part])
            inner = torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).T.unsqueeze(-1)
            scores = weights * inner * scale
            of_heads = (
                torch.einsum("hqk,khd->qhd", scores, k),
                torch.einsum("hqk,qhd->khd", scores, q).unflatten(1, (-1, group)).sum(2),
                torch.einsum("hqk,qhd->khd", weights, g).unflatten(1, (-1, group)).sum(2),
            )
            for total, own in zip(grads, of_heads):
                total[part] = own.to(total.dtype)
        return tuple(grads)

    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield called


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each device and dtype had the kernels."""
    monkeypatch.setattr(attention, "find_obstacle", lambda device, dtype: "")


MANY = [33, 17, 17, 16, 9, 2, 1, 1]
# Query heads, key heads, their size, the values' size, window, scaling, lengths.
CASES = {
    "qwen3": (16, 8, 128, 128, None, None, MANY),
    "deepseek_v3": (4, 4, 192, 128, None, 0.1147, MANY),
    "odd sizes": (4, 4, 20, 12, None, None, MANY),
    "larger values": (4, 2, 24, 40, None, None, MANY),
    "sliding window": (4, 1, 64, 64, 4, 0.3, MANY),
    "window of one token": (4, 2, 32, 32, 1, None, MANY),
    "one token each": (8, 2, 64, 64, None, None, [1] * 7),
    "one sequence": (4, 4, 256, 256, None, None, [50]),
}


def make_states(case: str, device: torch.device = CPU) -> tuple[list[Tensor], dict]:
    """Queries, keys and values as models make them, and the arguments of `attend_packed`."""
    heads, key_heads, size, value_size, window, scaling, lengths = CASES[case]
    torch.manual_seed(0)
    query = torch.randn(1, sum(lengths), heads, size, device=device)
    # MLA has both in one tensor.
    both = torch.randn(1, sum(lengths), key_heads, size + value_size, device=device)
    key, value = both.split([size, value_size], dim=-1)
    states = [t.transpose(1, 2).requires_grad_() for t in (query, key.contiguous(), value)]
    arguments = attention_arguments("r1pipe_varlen", lengths, device)
    return states, {**arguments, "sliding_window": window, "scaling": scaling}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("case", CASES)
def test_it_is_each_sequence_alone(dtypes: list[torch.dtype], case: str) -> None:
    """Forward and gradient."""
    states, arguments = make_states(case)
    results = []
    for implementation in ("varlen", "sdpa"):
        out, _ = attend_packed(None, *states, None, implementation=implementation, **arguments)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), states)))
    assert dtypes == [torch.float32] * 2
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("case", CASES)
def test_the_op_of_torch_takes_the_arguments(case: str) -> None:
    """Its own meta kernels, forward and backward."""
    states, arguments = make_states(case, torch.device("meta"))
    out, _ = attend_packed(None, *states, None, implementation="varlen", **arguments)
    heads, _, _, value_size, _, _, lengths = CASES[case]
    assert out.shape == (1, sum(lengths), heads, value_size)
    gradients = torch.autograd.grad(out, states, torch.empty_like(out))
    assert [g.shape for g in gradients] == [t.shape for t in states]


WINDOWED = {"model_type": "mistral", "sliding_window": 4}


@pytest.mark.usefixtures("anywhere")
# A deepseek_v32 attends by itself to the keys that it selects.
@pytest.mark.parametrize("name", [*(n for n in MODELS if n != "deepseek_v32"), "mistral"])
def test_a_policy_has_the_same_logprobs_and_gradients(
    tokenizer: PreTrainedTokenizerBase, samples: list[Sample], dtypes: list, name: str
) -> None:
    """With its activations computed again in backward, as in training."""
    if name == "mistral":
        config = AutoConfig.for_model(**WINDOWED, **{**SMALL, "vocab_size": len(tokenizer)})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = build_model(MODELS[name], tokenizer, seed=0)
    batch = pack(samples[:8], CPU)
    results = []
    for implementation in ("sdpa", "varlen"):
        own = copy.deepcopy(model)
        own.set_attn_implementation(find_implementation(implementation, CPU, "float32"))
        own.gradient_checkpointing_enable({"use_reentrant": False})
        policy = Policy(own.train())
        logprobs_C = policy(batch, 0.7).logprobs_C
        logprobs_C.square().sum().backward()
        results.append([logprobs_C.detach(), *(p.grad for p in own.parameters())])
    assert len(dtypes) == 3 * model.config.num_hidden_layers
    for expected, found in zip(*results):
        if expected is not None:
            scale = float(expected.abs().max()) + 1e-3
            assert float((found - expected).abs().max()) < 1e-4 * scale


@pytest.mark.usefixtures("anywhere")
def test_auto_takes_it_in_bf16_layers_of_a_float32_model(
    tokenizer: PreTrainedTokenizerBase,
    samples: list[Sample],
    dtypes: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the kernels see is the layers' dtype, not that of the weights held."""

    def find_obstacle(device: torch.device, dtype: torch.dtype) -> str:
        return "" if dtype == torch.bfloat16 else "bfloat16"

    monkeypatch.setattr(attention, "find_obstacle", find_obstacle)
    model = build_model(MODELS["deepseek_v3"], tokenizer, seed=0)
    batch = pack(samples[:8], CPU)
    with torch.no_grad():
        by_sdpa = Policy(model)(batch, 1.0).logprobs_C
        assert not dtypes
        by_varlen = shard(Policy(model), model, CPU, dtype="bfloat16")(batch, 1.0).logprobs_C
    assert dtypes == [torch.bfloat16] * model.config.num_hidden_layers
    assert 0 < float((by_varlen - by_sdpa).abs().mean()) < 0.03


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("change", ["head size", "dropout"])
def test_what_the_kernels_have_not_is_left_to_sdpa(dtypes: list, change: str) -> None:
    states, arguments = make_states("one sequence")
    if change == "dropout":
        arguments["dropout"] = 0.5
    else:
        states = [torch.cat([t, t], dim=-1) for t in states]
    attend_packed(None, *states, None, **arguments)
    assert not dtypes
    with pytest.raises(UserError, match=r"varlen needs (heads of at most 256|a model without)"):
        attend_packed(None, *states, None, implementation="varlen", **arguments)


def test_a_recipe_gets_the_implementation_it_asks_for_or_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(name: str, device: torch.device = CUDA, dtype: str = "bfloat16") -> str:
        return find_implementation(name, device, dtype)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert [find(name) for name in ("auto", "sdpa", "eager", "varlen")] == [
        "r1pipe_auto",
        "r1pipe_sdpa",
        "r1pipe_sdpa",
        "r1pipe_varlen",
    ]
    with pytest.raises(UserError, match=r"^attn_implementation: varlen needs a GPU of .* 8\.0"):
        find("varlen", CPU)
    with pytest.raises(UserError, match="varlen needs dtype: bfloat16"):
        find("varlen", dtype="float32")
    with pytest.raises(UserError, match=r'flash_attention_2 needs flash-attn: .*"\.\[flash\]"'):
        find("flash_attention_2")
    with pytest.raises(UserError, match="flash_attention_3 needs flash-attn-3"):
        find("flash_attention_3")
    assert attention.available_implementations(CUDA, "bfloat16") == ["sdpa", "varlen"]
    assert attention.available_implementations(CPU, "bfloat16") == ["sdpa"]
    package = (lambda: True, "")
    monkeypatch.setitem(attention.FLASH_PACKAGES, "flash_attention_3", package)
    assert find("flash_attention_3") == "flash_attention_3"
    with pytest.raises(UserError, match="flash_attention_3 needs dtype: bfloat16"):
        find("flash_attention_3", dtype="float32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert attention.available_implementations(CUDA, "bfloat16") == ["sdpa"]
