"""The files of a published repository: weights, configs, GGUF, terms, rollouts."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1pipe.publish.card import CardFacts, write_dataset_card
from r1pipe.publish.hub import Hub, holds_token
from r1pipe.publish.options import Options
from r1pipe.runs.reader import Evaluation, StageFolder
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json, read_jsonl, write_text

if TYPE_CHECKING:
    from r1pipe.models.gguf import Splitting


TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
)
TERMS = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)[\w.-]*", re.IGNORECASE)
"""Files of a base model that belong to its licence and go on with it."""

ROLLOUTS = ("rollouts/*.parquet", "traces.jsonl")


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """A new folder that takes its place, instead of an older one, once everything is in it."""
    try:
        place.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)  # a temporary folder is its maker's only
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(source: Path, folder: Path, dtype: str) -> None:
    """The weights in the dtype that the model was sampled and measured in.

    float32 is what the stage has saved, and the disk holds it once. The master weights of a
    bfloat16 recipe are rounded as its sampler rounded them.
    """
    for file in source.glob("*.safetensors"):
        if dtype == "float32":
            link_file(file, folder / file.name)
        else:
            round_weights(file, folder / file.name, dtype)
    for file in source.glob("*.safetensors.index.json"):
        index = read_json(file)
        index["metadata"]["total_size"] = sum(
            end - begin
            for weights in folder.glob("*.safetensors")
            for begin, end in (t["data_offsets"] for t in list_tensors(weights).values())
        )
        write_text(folder / file.name, json.dumps(index, indent=2) + "\n")


def link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


KEPT_IN_FLOAT32 = ("e_score_correction_bias",)
"""What transformers and vLLM hold in float32 whatever the model's dtype is."""


def round_weights(source: Path, target: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor if name.endswith(KEPT_IN_FLOAT32) else tensor.to(getattr(torch, dtype))
        for name, tensor in load_file(source).items()
    }
    save_file(tensors, target, metadata={"format": "pt"})


def write_configs(
    config: dict[str, Any],
    stage: StageFolder,
    folder: Path,
    evaluations: list[Evaluation],
) -> None:
    """config.json, the tokenizer, and how the model was sampled when it was measured."""
    # Training has no use for the cache, and says so in the config; generating has.
    config = {**config, "dtype": stage.settings["dtype"], "use_cache": True}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for pattern in TOKENIZER:
        for file in stage.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    generation = read_json(stage.folder / "generation_config.json")
    if evaluations:
        sampling = evaluations[0].stage.settings["sampling"]
        generation["do_sample"] = sampling["temperature"] > 0
        if generation["do_sample"]:
            generation |= {key: sampling[key] for key in ("temperature", "top_p", "top_k")}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def write_gguf(
    folder: Path,
    out: Path,
    options: Options,
    licence: str,
    base_hub_id: str | None,
    texts: list[str],
) -> "Splitting":
    """The folder's model as a file for llama.cpp, with the protocol that it was measured under."""
    try:
        from r1pipe.models.gguf import Description, export_gguf
    except ImportError as error:
        raise UserError(f'--gguf: {error}: pip install "r1pipe[gguf]"') from error
    sampling = read_json(folder / "generation_config.json")
    about = Description(out.stem, licence, base_hub_id, sampling)
    return export_gguf(folder, out, options.gguf, about, texts)


def write_terms(base: str | None, hub_id: str | None, folder: Path, hub: Hub) -> None:
    """The base model's licence files, which its licence may ask to be handed on."""
    local = Path(base).expanduser() if base else None
    if local is not None and local.is_dir():
        for file in local.iterdir():
            if file.is_file() and TERMS.fullmatch(file.name):
                shutil.copyfile(file, folder / file.name)
    elif hub_id:
        for name, text in hub.read_texts(hub_id, TERMS).items():
            write_text(folder / name, text)


def list_tensors(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: dtype and shape by name."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header


def count_parameters(file: Path) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in list_tensors(file).values())


def write_rollouts(facts: CardFacts, folder: Path) -> None:
    """What the policies sampled, by stage, and the samples that the checkpoint was measured by."""
    wanted = [(stage, pattern) for stage in facts.lineage for pattern in ROLLOUTS]
    wanted += [(evaluation.stage, evaluation.entry["samples"]) for evaluation in facts.evaluations]
    num_rows: dict[str, int] = {}
    for stage, pattern in wanted:
        sources = list(stage.folder.glob(pattern))
        for source in sources:
            target = folder / stage.name / source.relative_to(stage.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_file(source, target)
        if sources:
            num_rows[f"{stage.name}/{pattern}"] = sum(map(count_rows, sources))
    write_text(folder / "README.md", write_dataset_card(facts, num_rows))


def count_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(file).num_rows
    return sum(1 for _ in read_jsonl(file))


BINARY = (".safetensors", ".parquet", ".gguf")


def check_no_token(folder: Path) -> None:
    """A last look at everything that can be read: a token that a recipe or a data row carries must
    not be published."""
    for file in folder.rglob("*"):
        if file.is_dir() or file.suffix in BINARY:
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if holds_token(line):
                    raise UserError(
                        f"{file.name}: line {number} holds a token of the hub: not published; "
                        "take it out of the recipe or the data, and revoke it"
                    )
