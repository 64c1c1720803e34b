"""`publish --gguf`: the file, read by transformers' own loader, is the same model.

What no test here can say is that llama.cpp reads it so, too: docs/log.md has what it did.
"""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from r1pipe.models.gguf import TIKTOKEN, Description, export_gguf, find_splitting
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.utils.errors import UserError

TEXTS = ["Tom has 3 books.\n<think>\n3+4=7</think>\n\\boxed{7}"]
ABOUT = Description("mini", "apache-2.0", "org/base", {"temperature": 0.6, "top_p": 0.95})
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "vocab_size": 320,
}
MODELS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}
PLACES = ("eos", "eot", "eom")
TOLERANCE = {"F32": 1e-5, "F16": 0.05, "Q8_0": 0.5}
"""The largest of 25,000 differences of logits, whose standard deviation is 1 to 2: matrices of 64
columns with random weights are what suffers most."""


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = build_tokenizer(TEXTS, 300)
    model = build_model({**SMALL, **MODELS[request.param]}, tokenizer, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    save_checkpoint(model, tokenizer, folder)
    return folder


def read_field(reader: gguf.GGUFReader, key: str) -> object:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("file_type", TOLERANCE)
def test_the_file_is_the_same_model(checkpoint: Path, file_type: str, tmp_path: Path) -> None:
    export_gguf(checkpoint, tmp_path / "mini.gguf", file_type, ABOUT, TEXTS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = AutoConfig.from_pretrained(checkpoint)  # transformers reads no head_dim of a Qwen3
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="mini.gguf", config=config, dtype=torch.float32
    )
    ids = torch.arange(10, 90).unsqueeze(0)
    with torch.no_grad():
        wanted, found = model(ids).logits, loaded(ids).logits
    assert 0.5 < wanted.std() < 3
    differences = (found - wanted).abs()
    assert differences.max() < TOLERANCE[file_type]
    assert differences.mean() < TOLERANCE[file_type] / 5
    assert differences.any() or file_type == "F32"  # what is to be rounded is rounded


def test_all_end_tokens_have_a_place(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "ends")
    ends = [1, 2, 3]  # <|end|>, <|system|>, <|user|>
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (file,) = folder.glob("chat_template*")
    file.write_text("{% for m in messages %}{{ m.content }}<|user|>{% endfor %}")
    export_gguf(folder, tmp_path / "mini.gguf", "F32", ABOUT, TEXTS)
    reader = gguf.GGUFReader(tmp_path / "mini.gguf")
    places = {name: read_field(reader, f"tokenizer.ggml.{name}_token_id") for name in PLACES}
    assert places == {"eos": 1, "eot": 3, "eom": 2}  # eot: as the template ends a turn


def test_what_the_file_says_of_itself(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "mini.gguf"
    splitting = export_gguf(checkpoint, out, "Q8_0", ABOUT, TEXTS)
    reader = gguf.GGUFReader(out)
    architecture = read_field(reader, "general.architecture")
    assert architecture == AutoConfig.from_pretrained(checkpoint).model_type
    assert read_field(reader, "general.name") == "mini"
    assert read_field(reader, "general.license") == "apache-2.0"
    assert read_field(reader, "general.base_model.0.repo_url").endswith("/org/base")
    assert read_field(reader, "general.sampling.temp") == pytest.approx(0.6)
    tokens = read_field(reader, "tokenizer.ggml.tokens")
    types = read_field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 320
    kinds = {token: gguf.TokenType(kind) for token, kind in zip(tokens, types, strict=True)}
    assert kinds["<|end|>"] == gguf.TokenType.CONTROL
    assert kinds["<think>"] == gguf.TokenType.USER_DEFINED  # decoding must not drop it
    assert kinds["a"] == gguf.TokenType.NORMAL
    assert kinds["[PAD319]"] == gguf.TokenType.UNUSED
    assert tokens[read_field(reader, "tokenizer.ggml.eos_token_id")] == "<|end|>"
    assert read_field(reader, "tokenizer.ggml.add_bos_token") is False
    assert "<|assistant|>" in read_field(reader, "tokenizer.chat_template")
    if architecture == "qwen2":  # transformers gives any Qwen2 the splitting of the real one
        assert (splitting.name, splitting.is_exact) == ("qwen2", True)
    else:  # llama.cpp has none like ours, but one that does the same to this text
        assert (splitting.name, splitting.is_exact) == ("gpt-2", False)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    assert ("output.weight" in types) != (architecture == "llama")  # tied


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "olmoe", "num_experts": 4}, "cannot write a olmoe model, only llama"),
        (
            {
                "model_type": "qwen3",
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            },
            "knows no rope_type yarn",
        ),
        ({"model_type": "llama", "hidden_act": "gelu"}, "knows no hidden_act gelu"),
    ],
)
def test_other_models_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    AutoConfig.for_model(**{**SMALL, **settings}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--gguf: {message}"):
        export_gguf(tmp_path, tmp_path / "mini.gguf", "F32", ABOUT, TEXTS)
    assert not (tmp_path / "mini.gguf").exists()


def make_tokenizer(*parts: object, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    alphabet = {token: id for id, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    merges = [("Ġ", "1"), ("3", "4")]
    for pair in merges:
        alphabet["".join(pair)] = len(alphabet)
    tokenizer = Tokenizer(models.BPE(alphabet, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def by_regex(expression: str) -> tuple[object, object]:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Split(Regex(expression), "isolated"), level


GPT2_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN2, LLAMA3 = (TIKTOKEN.replace("DIGITS", digits) for digits in ("", "{1,3}"))


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (make_tokenizer(GPT2_LEVEL), "gpt-2"),
        (make_tokenizer(pre_tokenizers.Digits(individual_digits=True), GPT2_LEVEL), "smollm"),
        (make_tokenizer(*by_regex(QWEN2)), "qwen2"),
        (make_tokenizer(*by_regex(LLAMA3), ignore_merges=True), "llama-bpe"),
        (make_tokenizer(*by_regex(LLAMA3)), "smaug-bpe"),
    ],
)
def test_known_splittings_are_told_apart(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    splitting = find_splitting(tokenizer, TEXTS)
    assert (splitting.name, splitting.is_exact) == (name, True)


def test_a_splitting_must_give_the_same_tokens_of_all_texts() -> None:
    words = make_tokenizer(*by_regex(r" ?\p{L}+| ?\p{N}{1,3}|[^\s\p{L}\p{N}]|\s+"))
    assert not find_splitting(words, ["in 123 days"]).is_exact
    for texts in (["in 1234 days"], []):
        with pytest.raises(UserError, match="no splitting of text that gives this tokenizer"):
            find_splitting(words, texts)
