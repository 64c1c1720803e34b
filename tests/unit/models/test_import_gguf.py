"""`r1pipe import-gguf` on a file written here, tensor by tensor, as llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from r1pipe.cli.main import main
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import CHAT_TEMPLATE, build_tokenizer, read_end_ids

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp turns neighbouring pairs where transformers turns the two halves of a head."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel, tokens: list[str], merges: list[str]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    writer.add_bos_token_id(tokens.index("<|user|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_eot_token_id(tokens.index("<|system|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                weight = interleave_rotary(weight, heads[theirs])
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    tokenizer = build_tokenizer(["some words, some more words"], 300)
    model = build_model(LLAMA, tokenizer, seed=0)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [" ".join(pair) for pair in stored["model"]["merges"]]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, tokens, merges)
    return path, model


def test_imported_checkpoint_is_the_same_model(source: tuple, tmp_path: Path) -> None:
    path, model = source
    out = tmp_path / "checkpoint"
    assert main(["import-gguf", str(path), str(out)]) == 0
    assert list(out.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(10, 30).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    own = AutoTokenizer.from_pretrained(out)
    assert own.chat_template == CHAT_TEMPLATE
    assert (own.bos_token, own.eos_token) == ("<|user|>", "<|end|>")
    assert own.pad_token is not None
    assert own.convert_ids_to_tokens(read_end_ids(str(out))) == ["<|end|>", "<|system|>"]
    assert own.decode(own.encode("more words")) == "more words"


def test_what_cannot_be_imported(
    source: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, _ = source
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:100])
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for file, out, message in (
        (tmp_path / "none.gguf", tmp_path / "out", "no such file"),
        (broken, tmp_path / "out", "cannot be read as GGUF"),
        (path, full, "exists and is not empty"),
    ):
        assert main(["import-gguf", str(file), str(out)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
