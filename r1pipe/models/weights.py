"""Weight files of checkpoints: checked, exported, saved in the hub's format.

transformers fuses a layer's experts in one 3-D parameter; checkpoints, which vLLM reads, have one
tensor per expert. `export_weights` translates.
"""

import contextlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from r1pipe.models.adapter import find_adapter, merge, save_adapter
from r1pipe.models.fp8 import list_rounded, round_matrix
from r1pipe.models.tokenizer import join_end_ids, list_ids
from r1pipe.utils.distributed import full_tensor, is_first
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_text
from r1pipe.utils.phases import phase

MAX_FILE_BYTES = 4 * 2**30
"""Largest safetensors file of a sharded model: what rank 0 holds while saving."""
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
"""A damaged file raises whatever its reader raises."""


ADAPTER = "adapter"
"""Folder within a checkpoint's with the adapter that is merged in it."""


def check_weights(checkpoint: str) -> None:
    """Raises UserError if a checkpoint folder's weights are incomplete. Reads only headers."""
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
    """A checkpoint's weight files: those in its index, or model.safetensors, or all; PyTorch's
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


def has_mtp_weights(folder: Path) -> bool:
    """Whether a checkpoint has those of a prediction layer, which its config may only count."""
    files = [file for file in list_weights(folder) if file.suffix == ".safetensors"]
    return any(name.endswith(".eh_proj.weight") for file in files for name in read_names(file))


def read_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def find_strays(folder: Path) -> list[Path]:
    """Safetensors files that are not the checkpoint's own. vLLM would load them too: without an
    index it takes all."""
    if list(folder.glob("*.safetensors.index.json")):
        return []
    return sorted(set(folder.glob("*.safetensors")) - set(list_weights(folder)))


def find_damage(file: Path) -> str:
    """What is wrong with a weight file, judged by its header; empty if nothing."""
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


@phase("saving")
def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save safetensors in the original architecture, the tokenizer, and a generation config with
    all of the model's end tokens.

    Every rank must call this for a sharded model; rank 0 writes the files.
    """
    first, *others = join_end_ids(tokenizer, list_ids(model.generation_config))
    model.generation_config = GenerationConfig(
        eos_token_id=[first, *others] if others else first, pad_token_id=tokenizer.pad_token_id
    )
    if find_adapter(model) or any(isinstance(p, DTensor) for p in model.parameters()):
        save_sharded(model, folder)
    elif is_first():
        model.save_pretrained(folder)
    if find_adapter(model):
        save_adapter(model, folder / ADAPTER)
    tokenizer.save_pretrained(folder)


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    """Like `save_pretrained`, with one file's tensors in memory at a time."""
    # fully_shard has replaced the model's class by one of its own.
    plain = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    model.config.architectures = [plain.__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    files: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    # The other ranks only take part in gathering the layers.
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
    """Tensors in parts of at most `max_bytes`, or one tensor."""
    part: dict[str, torch.Tensor] = {}
    room = max_bytes
    for name, tensor in weights:
        if part and tensor.nbytes > room:
            yield part
            part, room = {}, max_bytes
        part[name] = tensor
        room -= tensor.nbytes
    yield part


def export_weights(
    model: PreTrainedModel, *, fp8: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as in a saved checkpoint, an adapter merged, one layer at a time, without a
    second full copy; with `fp8` rounded (models/fp8.py).

    Iterates `state_dict()`, not the parameters: a router's `e_score_correction_bias` is a buffer,
    and a sampler without it routes tokens to other experts.

    A sharded model's layers are gathered one by one, on every rank: all ranks must iterate to the
    end.
    """
    tensors = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        # Saved checkpoints have tied weights once; vLLM ties them itself.
        tensors = {n: t for n, t in tensors.items() if n not in tied_names(model)}

    rounded = {f"{t.path}.{t.name}": t for t in list_rounded(model)} if fp8 else {}

    def layer(name: str) -> str:
        found = re.search(r"\.layers\.(\d+)\.", name)
        return found.group(1) if found else ""

    for _, group in groupby(sorted(tensors, key=layer), key=layer):
        part = merge(model, {name: full_tensor(tensors[name].detach()) for name in group})
        part = {n: round_matrix(t, rounded[n]) if n in rounded else t for n, t in part.items()}
        yield from revert_weight_conversion(model, part).items()


def tied_names(model: PreTrainedModel) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {"lm_head.weight": ""})
