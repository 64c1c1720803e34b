"""Operations of a training pass against torch's own count, and peaks by the device's name."""

import pytest
import torch
from faked_gpu import fake_gpu
from tiny_models import MODELS, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedTokenizerBase

from r1pipe.config.adapter import Adapter
from r1pipe.models import flops
from r1pipe.models.adapter import add_adapter, initialize
from r1pipe.models.flops import count_pairs, peak_flops, train_flops
from r1pipe.models.model import build_model
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy

QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
CASES = {
    # Without the one of sparse attention, whose selected pairs torch counts as they are gathered.
    **{name: model for name, model in MODELS.items() if "index_topk" not in model},
    "grouped heads": {**TINY, "num_attention_heads": 4, "num_key_value_heads": 1},
    "tied head": {**TINY, "tie_word_embeddings": True},
    "latent queries": {**MODELS["deepseek_v3"], "q_lora_rank": 24, "n_shared_experts": 2},
    "qwen2_moe": {
        **MODELS["qwen3_moe"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 24,
    },
    "mixtral": {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
}


@pytest.mark.parametrize("mtp", [None, "joint", "detached"])
def test_a_prediction_layer_counts_where_it_is_trained(
    mtp: str | None,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**CASES["latent queries"], "num_mtp_layers": 1}
    compare_with_torch(settings, mtp, samples, tokenizer, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_that_torch_counts(
    name: str,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare_with_torch(CASES[name], None, samples, tokenizer, monkeypatch)


def compare_with_torch(
    settings: dict,
    mtp: str | None,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One forward and backward pass of the trainer's policy. In attention torch counts all pairs of
    tokens; rotary angles, a product in transformers' code, are no operations of ours."""
    model = build_model(settings, tokenizer, seed=0)
    model.set_experts_implementation("eager")
    policy, batch = Policy(model), pack(samples, torch.device("cpu"))
    policy.mtp = mtp
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        now = policy(batch, 1.0)
        (now.logprobs_C.sum() + (now.second.logprobs_C.sum() if mtp else 0)).backward()
    rotary = [
        sum(counts.values())
        for module, counts in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
    ]
    num_logits = sum(batch.completion_lengths)
    monkeypatch.setattr(flops, "count_pairs", lambda length, window: length**2)
    found = train_flops(model.config, batch.lengths, num_logits, mtp=mtp)
    assert found == counter.get_total_flops() - sum(rotary)


@pytest.mark.parametrize("name", ["qwen3", "latent queries"])
def test_frozen_weights_have_no_gradient_to_compute(
    name: str,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside an adapter of one matrix, whose products are not counted."""
    model = build_model(CASES[name], tokenizer, seed=0).requires_grad_(False)
    model.set_experts_implementation("eager")
    model.enable_input_require_grads()
    target = add_adapter(model, Adapter(r=2, target_modules=["o_proj"])).targets[-1]
    initialize(model, 0)
    policy, batch = Policy(model), pack(samples, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        policy(batch, 1.0).logprobs_C.sum().backward()
    counts = counter.get_flop_counts()
    others = sum(sum(c.values()) for m, c in counts.items() if m.endswith("rotary_emb"))
    outputs, inputs = model.get_parameter(f"{target.path}.weight").shape
    others += 2 * 6 * sum(batch.lengths) * 2 * (inputs + outputs)  # two layers, rank 2
    monkeypatch.setattr(flops, "count_pairs", lambda length, window: length**2)
    num_logits = sum(batch.completion_lengths)
    found = train_flops(model.config, batch.lengths, num_logits, frozen=True)
    assert found == counter.get_total_flops() - others


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_pairs_are_those_of_a_causal_mask(window: int | None) -> None:
    for length in range(1, 12):
        mask = torch.ones(length, length).tril()
        assert count_pairs(length, window) == mask.triu(1 - window if window else -99).sum()


def test_layers_with_a_window_count_fewer_pairs() -> None:
    kinds = ["sliding_attention", "full_attention"]
    settings = {**TINY, "vocab_size": 400}
    config = AutoConfig.for_model(**settings)
    windowed = AutoConfig.for_model(
        **settings, use_sliding_window=True, sliding_window=4, layer_types=kinds
    )
    fewer = train_flops(config, [10]) - train_flops(windowed, [10])
    assert fewer == 6 * (2 * 2 * 16) * (55 - 34)


def test_figures_that_others_publish_are_reproduced() -> None:
    """prime-rl's benchmarks of January 2026 on one H100, sequences of 16,384 tokens: tokens a
    second and MFU in percent, of GRPO and of SFT."""
    config = AutoConfig.for_model(**QWEN3_06B)
    a_token = train_flops(config, [16_384]) / 16_384
    for tokens_per_s, utilization in ((16_450, 15.3), (25_486, 23.7)):
        assert 100 * tokens_per_s * a_token / 989e12 == pytest.approx(utilization, abs=0.05)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks(name: str, teraflops: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_gpu(monkeypatch, name)
    assert peak_flops(device) == (teraflops and teraflops * 1e12)
    assert peak_flops(device, "float32") is None
    assert peak_flops(torch.device("cpu")) is None
