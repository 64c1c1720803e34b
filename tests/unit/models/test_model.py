"""Models: settings that make none, and damaged checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA, change_json, save_llama
from transformers import (
    PreTrainedTokenizerBase,
)

from r1pipe.models.model import build_model, load_model
from r1pipe.models.tokenizer import (
    build_tokenizer,
)
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["What is 1 + 2? <think>"], 300)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def point(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def drop_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def keep_adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def pickle_nonsense(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"nonsense" * 99)


def ask_for_code(folder: Path) -> None:
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change_json(folder / "config.json", auto_map=auto_map, model_type="own")
    (folder / "code.py").write_text("raise SystemExit('it ran')")


DAMAGES = [
    (truncate, r"model.safetensors: cut off: \d+ of \d+ bytes"),
    (point, "model.safetensors: a Git LFS pointer .*git lfs pull"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "no safetensors: it has 0 bytes"),
    (lambda f: (f / "model.safetensors").write_bytes(b"a" * 99), "no safetensors, or cut off"),
    (lambda f: (f / "model.safetensors").unlink(), r"no weights \(\*.safetensors\)"),
    (drop_shard, "model-00002-of-00002.safetensors: cannot be read: No such file"),
    (drop_tensor, "its weights have no model.layers.0.self_attn.q_proj.weight"),
    (cut_tensor, r"model.norm.weight has the shape \[8\], by its config.json \[32\]"),
    (keep_adapter_only, "an adapter only: merge it"),
    (lambda f: change_json(f / "config.json", model_type=None), "Unrecognized model"),
    (lambda f: (f / "config.json").write_text('{"model_type":'), "not a valid JSON"),
    (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    (pickle_nonsense, "cannot be loaded: "),
    (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded: "),
    (ask_for_code, "contains custom code"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: object, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    damage(save_llama(tmp_path, tokenizer))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path), CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "t5 is an encoder and a decoder"),
        ({"model_type": "whisper"}, "an encoder and a decoder"),
        (LLAMA | {"hidden_size": 33}, "not a multiple of the number of attention heads"),
        (LLAMA | {"hidden_size": "wide"}, "expected int, got str"),
        (LLAMA | {"num_attention_heads": 0}, "cannot build llama from this"),
        (LLAMA | {"hidden_act": "nope"}, "KeyError: 'nope'"),
    ],
)
def test_settings_that_make_no_model(
    settings: dict, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message):
        build_model(settings, tokenizer, 0)


def test_unknown_model_settings_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match='no "hiden_size"'):
        build_model({"model_type": "qwen3", "hiden_size": 3}, tokenizer, 0)
    with pytest.raises(UserError, match="qwen9"):
        build_model({"model_type": "qwen9"}, tokenizer, 0)
    with pytest.raises(UserError, match="model_type is missing"):
        build_model({}, tokenizer, 0)
