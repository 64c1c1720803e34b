"""Which files of a checkpoint are its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_llama
from transformers import PreTrainedTokenizerBase

from r1pipe.models.model import load_model
from r1pipe.models.tokenizer import (
    build_tokenizer,
)
from r1pipe.models.weights import find_strays, list_weights
from r1pipe.rollout.vllm_args import check_files
from r1pipe.rollout.weight_sync import read_weights
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["What is 1 + 2? <think>"], 300)


def test_only_a_checkpoint_s_own_files_are_its_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Mistral publishes its own format beside the sharded one."""
    checkpoint = save_llama(tmp_path, tokenizer)
    save_file({"wq": torch.zeros(1)}, checkpoint / "consolidated.safetensors")
    own = checkpoint / "model.safetensors"
    assert list_weights(checkpoint) == [own]
    names = {name for name, _ in read_weights(checkpoint)}
    assert "wq" not in names
    assert "model.norm.weight" in names
    # vLLM would take both where no index says which are meant.
    assert find_strays(checkpoint) == [checkpoint / "consolidated.safetensors"]
    with pytest.raises(UserError, match=r"consolidated.safetensors: vLLM would load it beside"):
        check_files(str(checkpoint))
    index = {"weight_map": dict.fromkeys(names, own.name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    check_files(str(checkpoint))


def test_pickled_weights(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path, tokenizer)
    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert {name for name, _ in read_weights(checkpoint)} == set(tensors)
    load_model(str(checkpoint), CPU)
