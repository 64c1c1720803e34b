"""An adapter published apart from its base, as peft reads it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1pipe.publish.candidate import Candidate
from r1pipe.publish.origin import Origin
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def find_adapters(candidate: Candidate, origin: Origin) -> list[Path]:
    """Those of the stage and of the stages before it, first to last: beside the base model, which
    others have, they are what the stage made. Raises UserError if something else was trained."""
    from r1pipe.models.weights import ADAPTER

    name: str | None = candidate.stage.name
    folders: list[Path] = []
    while stage := candidate.run.stages.get(name or ""):
        folder = stage.folder / ADAPTER
        if not folder.is_dir():
            raise UserError(f"--adapter: {stage.folder} was trained whole: publish it merged")
        folders.insert(0, folder)
        name = stage.section.weights_from
    if origin.base_hub_id is None:
        raise UserError(
            f"--adapter: {candidate.base_model} is no model that others have: give the hub's name "
            "of it by --base-model FOLDER=HUB_ID"
        )
    return folders


def write_adapter(candidate: Candidate, origin: Origin, folder: Path) -> int:
    """peft's two files; returns the adapter's rank."""
    from safetensors.torch import load_file, save_file

    adapters = [
        (read_json(place / CONFIG), load_file(place / WEIGHTS))
        for place in find_adapters(candidate, origin)
    ]
    config, tensors = adapters[0] if len(adapters) == 1 else stack(adapters)
    config |= {"base_model_name_or_path": origin.base_hub_id}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return config["r"]


def stack(
    adapters: "list[tuple[dict[str, Any], dict[str, Tensor]]]",
) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """One adapter that adds what these add together: their A's rows and B's columns side by side,
    of rank r1 + r2 + ... Where one has no such matrix, its rows and columns are zero.

    peft has those of E experts as `[E R, I]` and `[O, R E]`."""
    import torch

    places = dict.fromkeys(
        name.rpartition(".lora_")[0] for _, tensors in adapters for name in tensors
    )
    rank = sum(config["r"] for config, _ in adapters)
    stacked = {}
    for place in places:
        name_a, name_b = f"{place}.lora_A.weight", f"{place}.lora_B.weight"
        parts_a, parts_b = [], []
        known, tensors = next(pair for pair in adapters if name_a in pair[1])
        inputs, outputs = tensors[name_a].shape[1], tensors[name_b].shape[0]
        experts = tensors[name_a].shape[0] // known["r"]
        for config, tensors in adapters:
            r, scaling = config["r"], config["lora_alpha"] / config["r"]
            a = tensors.get(name_a, torch.zeros(experts * r, inputs))
            b = tensors.get(name_b, torch.zeros(outputs, r * experts))
            parts_a.append(a.reshape(experts, r, inputs))
            parts_b.append(b.reshape(outputs, r, experts) * scaling)
        stacked[name_a] = torch.cat(parts_a, 1).reshape(-1, inputs).contiguous()
        stacked[name_b] = torch.cat(parts_b, 1).reshape(outputs, -1).contiguous()
    targets = {
        key: sorted({target for config, _ in adapters for target in config[key] or ()})
        for key in ("target_modules", "target_parameters")
    }
    config = {**adapters[-1][0], **targets, "r": rank, "lora_alpha": rank}
    return config | {"target_parameters": targets["target_parameters"] or None}, stacked
