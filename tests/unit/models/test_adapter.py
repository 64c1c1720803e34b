"""Adapters against the real peft: the same logits, gradients and files."""

import copy
from pathlib import Path

import pytest
import torch
from moe_models import make_moe_model
from safetensors.torch import load_file
from tiny_models import MODELS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r1pipe.config.adapter import Adapter
from r1pipe.models.adapter import (
    add_adapter,
    describe,
    initialize,
    is_adapters,
    save_adapter,
    without_adapter,
)
from r1pipe.models.weights import export_weights, save_sharded
from r1pipe.utils.errors import UserError

peft = pytest.importorskip("peft")
SETTINGS = Adapter(r=3, alpha=12)
KINDS = ("qwen3", "llama", "deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss")
IDS_BL = torch.arange(3, 23).reshape(2, 10)


def make_model(kind: str) -> PreTrainedModel:
    if kind in ("qwen3", "llama"):
        torch.manual_seed(0)
        settings = {k: v for k, v in MODELS[kind].items() if k != "model_type"}
        config = AutoConfig.for_model(kind, vocab_size=60, **settings)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return make_moe_model(kind)


def adapt(model: PreTrainedModel, settings: Adapter = SETTINGS) -> PreTrainedModel:
    """With an adapter that has learnt something."""
    model.requires_grad_(False)
    add_adapter(model, settings)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("_lora_B"):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def find_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS_BL).logits


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapter_changes_nothing(kind: str) -> None:
    model = make_model(kind)
    before = find_logits(model)
    add_adapter(model, SETTINGS)
    initialize(model, 0)
    assert torch.allclose(find_logits(model), before, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind: str, tmp_path: Path) -> None:
    """Names and tensors of the export are those of a checkpoint; the base stays bit by bit."""
    base = make_model(kind)
    model = adapt(copy.deepcopy(base))
    with torch.no_grad():
        unmerged = find_logits(model)
        with without_adapter(model):
            assert torch.equal(find_logits(model), find_logits(base))
    assert (unmerged - find_logits(base)).abs().mean() > 0.05
    assert {n for n, _ in export_weights(model)} == {n for n, _ in export_weights(base)}
    save_sharded(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(find_logits(merged), unmerged, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", ["all", "some"])
def test_peft_reads_the_files(kind: str, chosen: str, tmp_path: Path) -> None:
    """The real peft computes the same logits, and the same gradients of A and B."""
    base = make_model(kind)
    keys = None if chosen == "all" else ["q_proj", "down_proj"]
    model = adapt(copy.deepcopy(base), Adapter(r=3, alpha=12, target_modules=keys))
    logits = find_logits(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert torch.allclose(find_logits(theirs), logits, atol=1e-4)
    assert (
        sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        == describe(model)["adapter_parameters"]
    )

    loss_weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * loss_weights).sum().backward()
    (find_logits(theirs) * loss_weights).sum().backward()
    for some in (model, theirs):
        for parameter in some.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.grad
    save_adapter(model, tmp_path)
    wanted = peft.get_peft_model_state_dict(theirs)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-3)


def test_only_the_adapter_has_gradients() -> None:
    model = adapt(make_model("deepseek_v3"))
    find_logits(model).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if is_adapters(name)}


def test_unknown_name_is_told() -> None:
    with pytest.raises(UserError, match=r'qwen3_moe has no "w1"; it has q_proj, .*gate_up_proj'):
        add_adapter(make_model("qwen3_moe"), Adapter(target_modules=["w1"]))


def test_routers_and_head_are_no_targets() -> None:
    names = {
        target.key for kind in KINDS for target in add_adapter(make_model(kind), SETTINGS).targets
    }
    assert {"gate_up_proj", "down_proj", "q_proj", "kv_b_proj"} <= names
    assert not {"gate", "router", "lm_head", "shared_expert_gate"} & names
