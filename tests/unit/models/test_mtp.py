"""The prediction layer of DeepSeek-V3: made, saved, loaded, left out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1pipe.config.adapter import Adapter
from r1pipe.models.adapter import add_adapter
from r1pipe.models.model import build_model, find_layers, load_model
from r1pipe.models.mtp import find_mtp_layer, require_mtp_layer
from r1pipe.models.routing import find_moe_layers, replaying
from r1pipe.models.shape import Shape
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")
LAYER = "model.layers.2."


def build(tokenizer: PreTrainedTokenizerBase, **changes: object) -> PreTrainedModel:
    return build_model({**MODELS["deepseek_v3"], **changes}, tokenizer, seed=0)


@pytest.fixture
def predicting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build(tokenizer, num_mtp_layers=1)


@pytest.fixture
def saved(predicting: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    save_checkpoint(predicting, tokenizer, tmp_path)
    return tmp_path


def change_weights(folder: Path, keep: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if keep(name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("key", ["num_mtp_layers", "num_nextn_predict_layers"])
def test_the_layer_is_initialized_as_the_others(
    tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    """transformers' own has memory as it was found in its fused experts."""
    model, plain = build(tokenizer, **{key: 1}), build(tokenizer)
    main = {n: w for n, w in model.state_dict().items() if not n.startswith(LAYER)}
    assert main.keys() == plain.state_dict().keys()
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in main.items())
    for name, parameter in find_mtp_layer(model).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.2, rel=0.25), name


def test_a_model_has_none_unasked(tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers' config counts one by default."""
    model = build(tokenizer)
    assert find_mtp_layer(model) is None
    assert model.config.num_mtp_layers == 0
    with pytest.raises(UserError, match="mtp: the deepseek_v3 has no prediction layer"):
        require_mtp_layer(model.config)
    with pytest.raises(UserError, match="num_mtp_layers is 2: there can be one"):
        build(tokenizer, num_mtp_layers=2)


def test_the_model_is_the_same_without_it(
    predicting: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_BL: Tensor
) -> None:
    plain = build(tokenizer)
    assert torch.equal(predicting(input_ids=ids_BL).logits, plain(input_ids=ids_BL).logits)
    assert len(find_layers(predicting)) == 3
    assert find_moe_layers(predicting.config) == [1]
    with replaying(predicting, torch.zeros(ids_BL.numel(), 1, 2, dtype=torch.int16)):
        predicting(input_ids=ids_BL)
    shape, without = Shape.of(predicting.config), Shape.of(plain.config)
    layer = find_mtp_layer(predicting)
    assert shape.parameters - without.parameters == sum(p.numel() for p in layer.parameters())
    assert shape.outside_layers == without.outside_layers


def test_saved_and_loaded_alike(predicting: PreTrainedModel, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    loaded = load_model(str(saved), CPU).state_dict()
    assert loaded.keys() == predicting.state_dict().keys()
    assert all(torch.equal(tensor, loaded[n]) for n, tensor in predicting.state_dict().items())


def test_its_weights_are_called_as_vllm_reads_them(
    predicting: PreTrainedModel, saved: Path
) -> None:
    """The layer's own, and a block's, which are called as those of the layer before."""
    deepseek_mtp = pytest.importorskip("vllm.model_executor.models.deepseek_mtp")
    names = {name for name, _ in export_weights(predicting)}
    assert names == load_file(saved / "model.safetensors").keys()
    find_layer = deepseek_mtp.get_spec_layer_idx_from_weight_name
    rename = deepseek_mtp.DeepSeekMTP._rewrite_spec_layer_name
    found = {
        rename(None, layer, name)
        for name in names
        if (layer := find_layer(predicting.config, name)) is not None
    }
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    before = {n.removeprefix("model.layers.1.") for n in names if n.startswith("model.layers.1.")}
    assert found == {f"{LAYER}{n}" for n in own} | {f"{LAYER}mtp_block.{n}" for n in before}


def test_a_checkpoint_that_has_lost_the_layer(saved: Path, ids_BL: Tensor) -> None:
    """Its config still counts it: as transformers saves what it has loaded without."""
    expected = load_model(str(saved), CPU)(input_ids=ids_BL).logits
    change_weights(saved, lambda name: name != f"{LAYER}self_attn.o_proj.weight")
    with pytest.raises(UserError, match=r"its weights have no model.layers.2.self_attn.o_proj"):
        load_model(str(saved), CPU)
    change_weights(saved, lambda name: not name.startswith(LAYER))
    model = load_model(str(saved), CPU)
    assert find_mtp_layer(model) is None
    assert model.config.num_mtp_layers == 0
    assert torch.equal(model(input_ids=ids_BL).logits, expected)


def test_an_adapter_leaves_it_alone(predicting: PreTrainedModel) -> None:
    targets = add_adapter(predicting, Adapter()).targets
    assert targets
    assert not any(target.path.startswith(LAYER) for target in targets)
