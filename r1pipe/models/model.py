"""Policies and students: built from a config, loaded from a folder or the hub."""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import ModuleList
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r1pipe.models.gguf import UNREADABLE
from r1pipe.models.quirks import find_quirks
from r1pipe.models.tokenizer import SPECIAL
from r1pipe.models.weights import check_weights
from r1pipe.utils.distributed import local_rank
from r1pipe.utils.errors import UserError, first_line


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
