"""GGUF, llama.cpp's format: export and import of checkpoints."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from r1pipe.models.tokenizer import find_end_id, list_ids, read_end_ids
from r1pipe.models.weights import UNREADABLE, save_checkpoint
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.progress import log_line

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""By `model_type` of transformers."""

FILE_TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Types of matrices; vectors, such as norms and biases, are always float32."""


@dataclass(frozen=True)
class Splitting:
    """How llama.cpp splits text before BPE."""

    name: str
    """llama.cpp's name, `tokenizer.ggml.pre`."""
    is_exact: bool
    """Whether it equals the tokenizer's own splitting; if not, it gave the same tokens for
    `num_texts` texts."""
    num_texts: int


@dataclass(frozen=True)
class Description:
    """Metadata of the file."""

    name: str
    license: str
    base_hub_id: str | None
    sampling: dict[str, Any]
    """`temperature`, `top_p` and `top_k` of its evaluation, where known."""


def export_gguf(
    folder: Path, out: Path, file_type: str, about: Description, texts: Sequence[str]
) -> Splitting:
    """Write the checkpoint in `folder` to `out`, one tensor in memory at a time.

    `texts`: samples of what the model reads and writes. If none of llama.cpp's splittings is the
    tokenizer's own, one that gives the same tokens for all of them is used.
    Raises UserError for a model or tokenizer that llama.cpp would run differently.
    """
    config = AutoConfig.from_pretrained(folder)
    check_model(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splitting = find_splitting(tokenizer, texts)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[file_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_description(writer, about)
    add_settings(writer, config)
    end_ids = read_end_ids(str(folder))
    add_tokenizer(writer, tokenizer, splitting, config.vocab_size, end_ids)

    for name, tensor in read_tensors(folder, config):
        kind = choose_type(tensor.shape, file_type)
        shape = quant_shape_to_byte_shape(tensor.shape, kind) if is_packed(kind) else tensor.shape
        dtype = np.uint8 if is_packed(kind) else quantize(tensor[:0], kind).dtype
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, shape, np.dtype(dtype), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in read_tensors(folder, config):
        writer.write_tensor_data(quantize(tensor, choose_type(tensor.shape, file_type)))
    writer.close()
    return splitting


def check_model(config: PreTrainedConfig) -> None:
    """Raises UserError unless llama.cpp computes this model like transformers."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"--gguf: cannot write a {config.model_type} model, only {known}")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ("default", "llama3"):
        raise UserError(f"--gguf: knows no rope_type {rope_type}, only default and llama3")
    if getattr(config, "use_sliding_window", False):
        raise UserError("--gguf: use_sliding_window: llama.cpp has none for this model")
    if config.hidden_act != "silu":
        raise UserError(f"--gguf: knows no hidden_act {config.hidden_act}, only silu")


def add_description(writer: gguf.GGUFWriter, about: Description) -> None:
    writer.add_name(about.name)
    writer.add_license(about.license)
    if about.base_hub_id:
        organization, _, name = about.base_hub_id.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base_hub_id}")
    for key, add in (
        ("temperature", writer.add_sampling_temp),
        ("top_p", writer.add_sampling_top_p),
        ("top_k", lambda k: writer.add_sampling_top_k(max(k, 0))),  # all: -1 for vLLM, 0 there
    ):
        if key in about.sampling:
            add(about.sampling[key])


def add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    head_dim = find_head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def find_head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# Weights


def read_tensors(folder: Path, config: PreTrainedConfig) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF's names, weights in float32. A tied output matrix is left out: llama.cpp then uses the
    embedding."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for ours in weights.offset_keys():
                if ours == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(ours, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise UserError(f"--gguf: {file.name}: GGUF has no place for {ours}")
                tensor = weights.get_tensor(ours).float().numpy()
                yield name, interleave_heads(tensor, ours, config)
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", find_frequency_factors(config)


def interleave_heads(tensor: np.ndarray, name: str, config: PreTrainedConfig) -> np.ndarray:
    """Interleave the two halves of each head in a Llama's query and key rows, as GGUF has them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    num_heads = heads.get(name.split(".")[-2])
    if config.model_type != "llama" or num_heads is None:
        return tensor
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def find_frequency_factors(config: PreTrainedConfig) -> np.ndarray:
    """Divisors of the rotary embedding's frequencies, `[head_dim / 2]`: GGUF stores Llama 3.1's
    long context as a tensor, not as settings."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = np.arange(len(scaled)) / len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -exponents
    return (plain / scaled.numpy()).astype(np.float32)


def choose_type(shape: Sequence[int], file_type: str) -> gguf.GGMLQuantizationType:
    """Rows that are not a whole number of blocks stay F16, as in llama.cpp."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    kind, _ = FILE_TYPES[file_type]
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return gguf.GGMLQuantizationType.F16
    return kind


def is_packed(kind: gguf.GGMLQuantizationType) -> bool:
    return gguf.GGML_QUANT_SIZES[kind][0] > 1


# The tokenizer


def add_tokenizer(
    writer: gguf.GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    splitting: Splitting,
    vocab_size: int,
    end_ids: Sequence[int],
) -> None:
    """`vocab_size`: rows of the embedding; the tokenizer may use fewer. `end_ids`: all tokens that
    end a completion; GGUF has three keys for them, and llama.cpp stops at each."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    # A token may have no row: transformers gives every Qwen2 its own <|endoftext|>.
    for token, number in tokenizer.get_vocab().items():
        if number < vocab_size:
            tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in stored["added_tokens"]:
        if added["id"] >= vocab_size:
            continue
        is_special = added["special"]
        types[added["id"]] = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
    pairs = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting.name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([p if isinstance(p, str) else " ".join(p) for p in pairs])
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    others = [n for n in end_ids if n != tokenizer.eos_token_id and n < vocab_size]
    turn_end = find_end_id(tokenizer, others)
    others.sort(key=lambda number: number != turn_end)
    if len(others) > 2:
        left_out = ", ".join(tokenizer.convert_ids_to_tokens(others[2:]))
        log_line(f"--gguf: warning: GGUF has places for three end tokens; without {left_out}")
    for number, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id)):
        add(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITTINGS: dict[str, tuple[Sequence[str], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "qwen2": ((TIKTOKEN.replace("DIGITS", ""),), False),
    "llama-bpe": ((TIKTOKEN.replace("DIGITS", "{1,3}"),), True),
    "smaug-bpe": ((TIKTOKEN.replace("DIGITS", "{1,3}"),), False),
    "deepseek-v3": (DEEPSEEK, False),
}
"""By llama.cpp's name: expressions applied one after another, and whether a piece that is a token
is kept whole (`ignore_merges`)."""

PROBE = (
    "It's WE'LL they'd I'M; foo_bar(x)=y+1 -- 3.14,1000 12345  6 78 999 1234567\n\n  indent\t\ttab"
    "\r\nÜber naïve façade 你好世界 こんにちは Привет мир 🙂👍 ½ ² <tag attr='v'>$100 #1 @you"
    "\n    - x?!...   \n \n end  "
)
"""Text on which splittings differ: contractions, digits, runs of signs, spaces and line ends."""


def find_splitting(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Splitting:
    """The one of SPLITTINGS that acts like the tokenizer's own. Raises UserError if none does."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = stored["decoder"] or {}
    decoders = {part["type"] for part in parts.get("decoders", [parts]) if part}
    if stored["model"]["type"] != "BPE" or "ByteLevel" not in decoders:
        raise UserError("--gguf: the tokenizer is not a byte-level BPE")
    others = {name: replace_splitting(stored, *how) for name, how in SPLITTINGS.items()}
    ignores_merges = bool(stored["model"].get("ignore_merges"))
    for name, other in others.items():
        if SPLITTINGS[name][1] == ignores_merges and split(other) == split(
            tokenizer.backend_tokenizer
        ):
            return Splitting(name, True, len(texts))
    wanted = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for name, other in others.items() if texts else ():
        if [e.ids for e in other.encode_batch(texts, add_special_tokens=False)] == wanted:
            return Splitting(name, False, len(texts))
    raise UserError(
        "--gguf: llama.cpp has no splitting of text that gives this tokenizer's tokens; looked at: "
        f"{', '.join(SPLITTINGS)}"
    )


def split(tokenizer: Tokenizer) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)]


def replace_splitting(
    stored: dict[str, Any], expressions: Sequence[str], ignore_merges: bool
) -> Tokenizer:
    """The tokenizer with another splitting and, like llama.cpp, without a normalizer."""
    splits = [
        {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": False}
        for e in expressions
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer = {
        "type": "Sequence",
        "pretokenizers": [*splits, {**level, "use_regex": False}],
    }
    model = {**stored["model"], "ignore_merges": ignore_merges}
    other = {**stored, "pre_tokenizer": pre_tokenizer, "model": model, "normalizer": None}
    return Tokenizer.from_str(json.dumps(other))


def import_gguf(file: Path, out: Path) -> None:
    """Turn a GGUF file into a checkpoint: dequantised float32 weights and the tokenizer.

    Raises UserError if the file is missing or transformers cannot read it.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # A model loaded from GGUF remembers the conversion and would save under other names: with
        # a fresh config the same weights save as a plain checkpoint.
        values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        config = type(loaded.config)(**values)
        config.dtype = "float32"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read as GGUF: {first_line(error)}") from error
    # The config has the file's ids. The tokenizer does not: the llama converter of transformers
    # 5.17 takes the token that begins a text for the one that ends it.
    for name in ("bos_token", "eos_token", "pad_token"):
        if (number := getattr(config, f"{name}_id", None)) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    others = [read_gguf_number(file, f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    model.generation_config.eos_token_id = [
        *list_ids(model.generation_config),
        *(number for number in others if number is not None),
    ]
    save_checkpoint(model, tokenizer, out)


def read_gguf_number(file: Path, key: str) -> int | None:
    from gguf import GGUFReader  # transformers has needed it to read the weights

    field = GGUFReader(file).get_field(key)
    return None if field is None else int(field.contents())
