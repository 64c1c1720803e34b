"""Models: built from a config, loaded from a folder or the hub."""

import contextlib
import copy
import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import ModuleList
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r1pipe.models import experts
from r1pipe.models.adapter import is_adapters
from r1pipe.models.mtp import drop_mtp_layer, find_mtp_layer, pick_class
from r1pipe.models.quirks import find_quirks
from r1pipe.models.tokenizer import SPECIAL
from r1pipe.models.weights import UNREADABLE, check_weights
from r1pipe.models.yarn import check_yarn_keys
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
    """Raises UserError for settings that make no model. Allocates no weights."""
    with torch.device("meta"):
        make_model(settings, seed=0)


def make_model(settings: dict[str, Any], seed: int) -> PreTrainedModel:
    """Raises UserError for a model type unknown to transformers, a misspelt argument, or invalid
    values."""
    settings = copy.deepcopy(settings)  # a config writes its defaults into rope_parameters
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise UserError("model: model_type is missing, such as deepseek_v3 or qwen3")
    check_yarn_keys(settings)
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
        # A config keeps keys that it does not declare, and some models read them (Qwen3-MoE's
        # head_dim): only likely misspellings are refused.
        near = difflib.get_close_matches(key, known.to_dict(), n=1, cutoff=0.85)
        if not hasattr(known, key) and near:
            raise UserError(f'model: a {model_type} config has no "{key}"; did you mean {near[0]}?')
    try:
        config = AutoConfig.for_model(model_type, **find_quirks(model_type).config | settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pick_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:  # architectures check their values in their own ways, or not
        what = f"model: transformers cannot build {model_type} from this: {first_line(error)}"
        raise UserError(what) from error


def load_model(
    checkpoint: str,
    device: torch.device,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The trainer's copy of a checkpoint (folder or hub id).

    In float32 whatever the recipe's dtype: these are the master weights, and bf16's eight bits
    would lose an update at a learning rate of 1e-6. The trainers compute in bf16.
    """
    check_weights(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        model, report = pick_class(config).from_pretrained(
            checkpoint,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below in one line
        )
    except AssertionError as error:
        # vLLM patches the transformers classes that it runs, for the whole process.
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
    absent = sorted(name for name in report["missing_keys"] if not is_adapters(name))
    if any(name.endswith(".eh_proj.weight") for name in absent):
        # Most fine-tuned models have lost the prediction layer that their config still counts.
        lost = drop_mtp_layer(model)
        absent = [name for name in absent if not name.startswith(lost)]
    if absent:
        # transformers would initialize them randomly.
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"{checkpoint}: its weights have no {absent[0]}{more}")
    if device.type == "cpu" and hasattr(model, "set_experts_implementation") and is_moe(model):
        # The fastest there for small experts (`make bench` compares).
        model.set_experts_implementation(experts.NAME)
    return model.to(device)


def find_layers(model: PreTrainedModel) -> ModuleList:
    """The decoder layers, and the prediction layer behind them if there is one; architectures call
    them `layers`, `decoder.layers` or `h`. Raises UserError if there are none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    num_predicting = find_mtp_layer(model) is not None
    for module in model.base_model.modules():
        if isinstance(module, ModuleList) and len(module) - num_predicting == count:
            return module
    raise UserError(f"{model.config.model_type}: has no list of {count} decoder layers")


def is_moe(model: PreTrainedModel) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def pick_device(name: str) -> torch.device:
    """The recipe's device; each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, and torch sees no GPU")
    return torch.device(name, local_rank()) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def fast_training_kernels(device: torch.device, dtype: str) -> Iterator[None]:
    """Turn off oneDNN for float32 training on CPU.

    oneDNN compiles a kernel for each new matrix shape, and shapes change at every step with expert
    batches and sequence lengths. MKL does not compile (`make bench` compares both). In bf16 oneDNN
    stays on: MKL has no bf16 kernels.
    """
    enabled = torch.backends.mkldnn.enabled
    if device.type == "cpu" and dtype == "float32":
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
