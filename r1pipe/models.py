"""Policies, students and tokenizers: built, loaded, saved.

What a tensor is called differs between transformers (experts fused in one 3-D parameter) and the
checkpoint format that vLLM reads (one tensor per expert): `export_weights` translates.
"""

import contextlib
import difflib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import ModuleList
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from r1pipe.distributed import is_first, local_rank
from r1pipe.errors import UserError
from r1pipe.phases import phase
from r1pipe.quirks import find_quirks
from r1pipe.records import Problem, write_text
from r1pipe.thinking import find_opened_tag

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")
SPECIAL = ("pad", "eos", "bos")

TAIL = 16
"""Tokens of a prompt's end that are looked at for an opened tag."""

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

    Raises UserError as `make_model` does.
    """
    if settings.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise UserError(
            f"model: vocab_size {settings['vocab_size']} is less than the {len(tokenizer)} tokens "
            "of the tokenizer: leave it out"
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    return make_model({"vocab_size": len(tokenizer), **ids, **settings}, seed)


def check_settings(settings: dict[str, Any]) -> None:
    """Raises UserError for settings that make no model. Takes no memory for weights."""
    with torch.device("meta"):
        make_model(settings, seed=0)


def make_model(settings: dict[str, Any], seed: int) -> PreTrainedModel:
    """Raises UserError for a model type that transformers does not know, a misspelt argument, or
    values that fit no model."""
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise UserError("model: model_type is missing, such as deepseek_v3 or qwen3")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(f'model: transformers knows no model_type "{model_type}"') from error
    if known.is_encoder_decoder:
        raise UserError(
            f"model: {model_type} is an encoder and a decoder; take a causal language model, such "
            "as qwen3"
        )
    for key in settings:
        # Keys that a config does not declare are kept by it, and read by some models (head_dim of
        # Qwen3-MoE): only what looks like a misspelling is refused.
        near = difflib.get_close_matches(key, known.to_dict(), n=1, cutoff=0.85)
        if not hasattr(known, key) and near:
            raise UserError(f'model: a {model_type} config has no "{key}"; did you mean {near[0]}?')
    try:
        config = AutoConfig.for_model(model_type, **find_quirks(model_type).config | settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each architecture checks its values in its own way, or not at all
        what = f"model: transformers can make no {model_type} of this: {first_line(error)}"
        raise UserError(what) from error


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
    check_weights(checkpoint)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
        )
    except AssertionError as error:
        # vLLM changes the classes of transformers that it runs a model by, for the whole process.
        raise UserError(
            f"{checkpoint}: vLLM has no model of its own for it and has taken transformers' class, "
            "which no stage can train from then on"
        ) from error
    except UNREADABLE as error:
        raise UserError(f"{checkpoint}: cannot be loaded: {first_line(error)}") from error
    if wrong := sorted(report["mismatched_keys"]):
        name, found, wanted = wrong[0]
        what = f"{name} has the shape {list(found)}, by its config.json {list(wanted)}"
        raise UserError(f"{checkpoint}: {what}")
    if absent := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers.
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"{checkpoint}: its weights have no {absent[0]}{more}")
    if device.type == "cpu" and hasattr(model, "set_experts_implementation") and is_moe(model):
        # The fastest on CPU for small experts (`make bench` compares); grouped_mm is the GPU's.
        model.set_experts_implementation("eager")
    return model.to(device)


UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    NotImplementedError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
    struct.error,
)
"""A file that ends early or holds nonsense shows as the error of whatever came to read it."""


def check_weights(checkpoint: str) -> None:
    """Raises UserError if a checkpoint folder's weights are not whole. Reads their headers only."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return
    files = list_weights(folder)
    if not files:
        adapter = (folder / "adapter_config.json").exists()
        what = "an adapter only: merge it into its base model" if adapter else "no weights"
        raise UserError(f"{folder}: {what} (*.safetensors)")
    for file in files:
        if problem := find_damage(file):
            raise UserError(f"{file}: {problem}")


def list_weights(folder: Path) -> list[Path]:
    """A checkpoint's own files: those that its index names, or model.safetensors, or all; PyTorch's
    *.bin if there are no safetensors. Some may be missing."""
    for suffix in ("safetensors", "bin"):
        for index in sorted(folder.glob(f"*model.{suffix}.index.json")):
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / name for name in sorted(set(names))]
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        if (only := folder / f"{stem}.{suffix}").exists():
            return [only]
        if files := sorted(set(folder.glob(f"*model*.{suffix}")) - set(folder.glob("adapter_*"))):
            return files
    return []


def find_strays(folder: Path) -> list[Path]:
    """Safetensors files beside the checkpoint's own, which vLLM would load as well: without an
    index it takes all."""
    if list(folder.glob("*.safetensors.index.json")):
        return []
    return sorted(set(folder.glob("*.safetensors")) - set(list_weights(folder)))


def find_damage(file: Path) -> str:
    """What is wrong with a file of weights; nothing if it is whole, as far as its header tells."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            begin = opened.read(64)
            if begin.startswith(b"version https://git-lfs"):
                return "a Git LFS pointer in place of the weights: fetch them by git lfs pull"
            if file.suffix == ".bin":
                return "" if size else "empty"
            if len(begin) < 8:
                return f"no safetensors: it has {size} bytes; copy or download it again"
            length = int.from_bytes(begin[:8], "little")
            if length > size:
                return "no safetensors, or cut off; copy or download it again"
            opened.seek(8)
            header = json.loads(opened.read(length))
            ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "no safetensors: its header is broken; copy or download it again"
    wanted = 8 + length + max(ends, default=0)
    if size < wanted:
        return f"cut off: {size} of {wanted} bytes; copy or download it again"
    return ""


def find_layers(model: PreTrainedModel) -> ModuleList:
    """The decoder layers, which architectures call `layers`, `decoder.layers` or `h`. Raises
    UserError for a model that has none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.base_model.modules():
        if isinstance(module, ModuleList) and len(module) == count:
            return module
    raise UserError(f"{model.config.model_type}: no row of {count} decoder layers in it")


def is_moe(model: PreTrainedModel) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def load_tokenizer(checkpoint: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, checked for what every stage needs: a chat template, an end.

    `chat_template`, Jinja, is for one that has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # a damaged file shows as the error of whatever reads it
        raise UserError(f"{checkpoint}: no tokenizer: {first_line(error)}") from error
    if not tokenizer.encode("2", add_special_tokens=False):
        # transformers makes an empty one of an architecture's own class, without a word.
        raise UserError(f"{checkpoint}: no tokenizer: no tokenizer.json, or an empty one")
    if lost := find_rowless(tokenizer, checkpoint):
        raise UserError(
            f"{checkpoint}: the embedding has no row for the token {lost!r}: take it out of "
            "tokenizer.json, or model.resize_token_embeddings(len(tokenizer)) first"
        )
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if not tokenizer.chat_template:
        raise UserError(
            f"{checkpoint}: the tokenizer has no chat template, as a base model's: give one in the "
            "recipe (chat_template: FILE.jinja) or in the model's folder, as chat_template.jinja"
        )
    if tokenizer.eos_token_id is None:
        known = [tokenizer.convert_ids_to_tokens(n) for n in read_end_ids(checkpoint)]
        if not any(known):
            raise UserError(
                f"{checkpoint}: no end token: set eos_token in its tokenizer_config.json"
            )
        tokenizer.eos_token = next(filter(None, known))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_rowless(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> str | None:
    """A token of the checkpoint's that its embedding is too small for."""
    try:
        num_rows = AutoConfig.from_pretrained(checkpoint).get_text_config().vocab_size
        stored = Path(cached_file(checkpoint, "tokenizer.json", local_files_only=True))
        tokens = json.loads(stored.read_text(encoding="utf-8"))["added_tokens"]
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    # Not all of the tokenizer's: transformers gives any Qwen2 an <|endoftext|> of its own, as the
    # unknown token that its bytes never need, and saves it with the rest.
    added = (t["content"] for t in tokens if t["content"] != tokenizer.unk_token)
    return next((t for t in added if (tokenizer.convert_tokens_to_ids(t) or 0) >= num_rows), None)


def read_end_ids(checkpoint: str) -> list[int]:
    """The end tokens of a checkpoint's generation_config.json or, without such a file, of its
    config.json: those at which vLLM stops, beside the tokenizer's one."""
    ids, num_rows = [], None
    with contextlib.suppress(OSError, ValueError):
        config = AutoConfig.from_pretrained(checkpoint)
        ids, num_rows = list_ids(config), getattr(config.get_text_config(), "vocab_size", None)
    with contextlib.suppress(OSError, ValueError):
        ids = list_ids(GenerationConfig.from_pretrained(checkpoint))
    for number in ids:
        if not isinstance(number, int) or number not in range(num_rows or 2**31):
            raise UserError(
                f"{checkpoint}: eos_token_id of its generation_config.json or config.json: "
                f"{number!r} is the number of no token"
            )
    return ids


def list_ids(config: GenerationConfig | PreTrainedConfig) -> list[int]:
    """`eos_token_id`, which is one, several or None."""
    ids = getattr(config, "eos_token_id", None)
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def join_end_ids(tokenizer: PreTrainedTokenizerBase, others: Iterable[int]) -> list[int]:
    """All tokens that end a completion, the tokenizer's own first."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *others]))


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # A KeyError's text is the key alone.
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text


Messages = list[dict[str, str]]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, name: str = "the conversation"
) -> list[int]:
    """Token ids up to where the assistant begins: what is sampled from, and trained behind.

    Raises UserError, with the prompt's `name`, if the chat template refuses it."""
    return use_template(tokenizer, messages, name, add_generation_prompt=True, return_dict=False)


def use_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, name: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program
        hint = ""
        if any(message["role"] == "system" for message in messages):
            hint = "; it may know no system prompt: leave out `system`, or write it into the prompt"
        what = f"{name}: the chat template refuses it: {first_line(error)}{hint}"
        raise UserError(what) from error


ASKED, SHOWN = "Which numbers?", "4 and 2"
"""A conversation that shows what a template writes around an answer."""


def show_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and behind an answer that is given; nothing if it leaves
    answers out. Raises UserError if it cannot be used."""
    messages = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": SHOWN},
    ]
    name = f"{tokenizer.name_or_path}: a question and its answer"
    text = use_template(tokenizer, messages, name, tokenize=False)
    if ASKED not in text:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template leaves out what the user says; one for "
            "content in parts, as of a multimodal model, must take texts as well"
        )
    before, _, behind = text.rpartition(SHOWN)
    return before, behind if before else ""


def find_end_id(tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> int:
    """The token that completions are trained to end with: of all `end_ids` the one that the chat
    template writes behind an answer. phi's is not the tokenizer's own."""
    _, behind = show_turn(tokenizer)
    texts = {number: tokenizer.convert_ids_to_tokens(number) for number in end_ids}
    written = [number for number, text in texts.items() if text and text in behind]
    return min(written, key=lambda n: behind.index(texts[n]), default=tokenizer.eos_token_id)


def find_opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], header: str) -> str:
    """What the prompt has begun of the completion, such as "<think>\\n"; mostly nothing.

    `header`: what `show_turn` finds before an answer."""
    return find_opened_tag(tokenizer.decode(prompt_ids[-TAIL:]), header)


def check_length(
    problem: Problem, num_tokens: int, max_completion_length: int, context: int
) -> None:
    """Raises UserError for a prompt of so many tokens that does not fit the model's context."""
    if num_tokens + max_completion_length > context:
        raise UserError(
            f'problem "{problem.id}": prompt of {num_tokens} tokens + max_completion_length '
            f"{max_completion_length} do not fit the context of {context}; "
            "raise engine.max_model_len, or, where the stage trains, drop such problems by "
            "max_prompt_length"
        )


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, text: str, end_id: int | None = None
) -> list[int]:
    """Token ids of a completion and its end token: what the sampler would have returned."""
    end = tokenizer.eos_token_id if end_id is None else end_id
    return [*tokenizer.encode(text, add_special_tokens=False), end]


@phase("saving")
def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """safetensors in the original architecture, the tokenizer, and a generation config, which has
    all end tokens of the model's.

    Of a sharded model rank 0 writes the files, and every rank must call this.
    """
    first, *others = join_end_ids(tokenizer, list_ids(model.generation_config))
    model.generation_config = GenerationConfig(
        eos_token_id=[first, *others] if others else first, pad_token_id=tokenizer.pad_token_id
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
        # A model that came from GGUF carries the conversion along and would save under other
        # names: the same weights under a fresh config save as a plain checkpoint.
        values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        config = type(loaded.config)(**values)
        config.dtype = "float32"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read as GGUF: {first_line(error)}") from error
    # The config has the file's own ids. The tokenizer of transformers 5.17 has not: its converter
    # for llama takes the token that begins a text for the one that ends it.
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
