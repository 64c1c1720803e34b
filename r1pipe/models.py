"""Policies, students and tokenizers: built, loaded, saved.

What a tensor is called differs between transformers (experts fused in one 3-D parameter) and the
checkpoint format that vLLM reads (one tensor per expert): `export_weights` translates.
"""

import contextlib
import difflib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

from r1pipe.distributed import is_first, local_rank
from r1pipe.errors import UserError
from r1pipe.phases import phase
from r1pipe.quirks import find_quirks
from r1pipe.records import Problem, write_text

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")

MAX_FILE_BYTES = 4 * 2**30
"""Of a sharded model's safetensors files: what rank 0 holds of it while it is saved."""


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, an end token and `<think>`/`</think>`.

    Words, numbers of up to three digits and single signs are kept apart, so a number is one token
    wherever it is frequent and any text comes back exactly as it went in.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,3}|[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK),
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    # Not special: the rewards read them, so decoding must not drop them.
    wrapped.add_tokens(list(THINK))
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A model with random weights, float32. `settings`: `model_type` and its config's arguments.

    Raises UserError for a model type that transformers does not know, or a misspelt argument.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise UserError("model: model_type is missing, such as deepseek_v3 or qwen3")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(f'model: transformers knows no model_type "{model_type}"') from error
    for key in settings:
        # Keys that a config does not declare are kept by it, and read by some models (head_dim of
        # Qwen3-MoE): only what looks like a misspelling is refused.
        near = difflib.get_close_matches(key, known.to_dict(), n=1, cutoff=0.85)
        if not hasattr(known, key) and near:
            raise UserError(f'model: a {model_type} config has no "{key}"; did you mean {near[0]}?')
    config = AutoConfig.for_model(
        model_type,
        **{
            **find_quirks(model_type).config,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            **settings,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_model(
    checkpoint: str,
    device: torch.device,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The trainer's copy of a checkpoint (folder or hub id).

    In float32 whatever the recipe's dtype is: these are the master weights, and an update at a
    learning rate of 1e-6 is lost in bf16's eight bits. The trainers compute in bf16.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=attn_implementation
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{checkpoint}: cannot be loaded: {first_line(error)}") from error
    if device.type == "cpu" and hasattr(model, "set_experts_implementation") and is_moe(model):
        # The fastest on CPU for small experts (`make bench` compares); grouped_mm is the GPU's.
        model.set_experts_implementation("eager")
    return model.to(device)


def is_moe(model: PreTrainedModel) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, checked for what every stage needs: a chat template, an end."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{checkpoint}: no tokenizer: {first_line(error)}") from error
    if not tokenizer.chat_template:
        raise UserError(f"{checkpoint}: the tokenizer has no chat template")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{checkpoint}: the tokenizer has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids up to where the assistant begins: what is sampled from, and trained behind."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def check_length(
    problem: Problem, num_tokens: int, max_completion_length: int, context: int
) -> None:
    """Raises UserError for a prompt of so many tokens that does not fit the model's context."""
    if num_tokens + max_completion_length > context:
        raise UserError(
            f'problem "{problem.id}": prompt of {num_tokens} tokens + max_completion_length '
            f"{max_completion_length} do not fit the context of {context}; "
            "raise engine.max_model_len or shorten the problem"
        )


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a completion and its end token: what the sampler would have returned."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


@phase("saving")
def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """safetensors in the original architecture, the tokenizer, and a generation config.

    Of a sharded model rank 0 writes the files, and every rank must call this.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        save_sharded(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes, file by file, with one file's tensors in memory at a time."""
    # fully_shard has made the model's class one of its own.
    plain = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    model.config.architectures = [plain.__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    files: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    # The other ranks only help to put the layers together.
    kept = torch.device("cpu" if is_first() else "meta")
    weights = ((name, tensor.to(kept).contiguous()) for name, tensor in export_weights(model))
    for tensors in cut_files(weights, MAX_FILE_BYTES):
        path = folder / f".{len(files)}.safetensors"
        if is_first():
            save_file(tensors, path, metadata={"format": "pt"})
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        files.append((path, list(tensors)))
    if not is_first():
        return
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    places = {}
    for number, (path, names) in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def cut_files(
    weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors in parts of at most `max_bytes`, or of one tensor."""
    part: dict[str, torch.Tensor] = {}
    room = max_bytes
    for name, tensor in weights:
        if part and tensor.nbytes > room:
            yield part
            part, room = {}, max_bytes
        part[name] = tensor
        room -= tensor.nbytes
    yield part


def export_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as in a saved checkpoint, one layer at a time, without a second full copy.

    Walks `state_dict()`, not the parameters: a router's `e_score_correction_bias` is a buffer, and
    a sampler without it routes other tokens to other experts.

    The layers of a sharded model are put together one by one, on every rank: all must walk to the
    end.
    """
    tensors = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        # Saved checkpoints hold tied weights once, and vLLM ties them itself.
        tensors = {n: t for n, t in tensors.items() if n not in tied_names(model)}

    def layer(name: str) -> str:
        found = re.search(r"\.layers\.(\d+)\.", name)
        return found.group(1) if found else ""

    for _, group in groupby(sorted(tensors, key=layer), key=layer):
        part = {name: whole(tensors[name].detach()) for name in group}
        yield from revert_weight_conversion(model, part).items()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on every rank, which all must ask for it; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tied_names(model: PreTrainedModel) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {"lm_head.weight": ""})


def pick_device(name: str) -> torch.device:
    """The recipe's device; of several GPUs each process has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, and torch sees no GPU")
    return torch.device(name, local_rank()) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def fast_training_kernels(device: torch.device, dtype: str) -> Iterator[None]:
    """Training without oneDNN in float32 on CPU.

    oneDNN compiles a kernel for every new matrix shape; expert batches and sequence lengths change
    at every step, so it compiles for ever. MKL does not (`make bench` compares both).
    In bf16 oneDNN stays: MKL has no such kernels.
    """
    enabled = torch.backends.mkldnn.enabled
    if device.type == "cpu" and dtype == "float32":
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


UNREADABLE = (OSError, ValueError, LookupError, ImportError, NotImplementedError, struct.error)
"""A file that ends early or holds nonsense shows as the error of whatever came to read it."""


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
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read as GGUF: {first_line(error)}") from error
    # A model that came from GGUF carries the conversion along and would save under other names:
    # the same weights under a fresh config save as a plain checkpoint.
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = type(loaded.config)(**values)
    config.dtype = "float32"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    # The config has the file's own ids. The tokenizer of transformers 5.17 has not: its converter
    # for llama takes the token that begins a text for the one that ends it.
    for name in ("bos_token", "eos_token", "pad_token"):
        if (number := getattr(config, f"{name}_id", None)) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    save_checkpoint(model, tokenizer, out)
