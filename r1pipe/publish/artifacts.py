"""The files of a published repository: weights, configs, GGUF, license files, rollouts."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1pipe.models.yarn import describe_yarn
from r1pipe.publish.adapter import write_adapter
from r1pipe.publish.candidate import Candidate
from r1pipe.publish.hub import Hub, holds_token
from r1pipe.publish.options import Options
from r1pipe.publish.origin import Origin
from r1pipe.runs.hashes import hash_file
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
LICENSE_FILES = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)[\w.-]*", re.IGNORECASE)
"""License files of a base model, which are published with its derivatives."""

ROLLOUTS = ("rollouts/*.parquet", "traces.jsonl")


@dataclass(frozen=True)
class Artifacts:
    """The written model."""

    model_type: str
    dtype: str
    num_parameters: int
    hashes: dict[str, str]
    """SHA-256 of weights and GGUF, by file."""
    adapter_rank: int | None
    """None: the whole model."""
    gguf_type: str | None
    """None: no GGUF file."""
    gguf_splitting: "Splitting | None"
    long_context: str
    """What extends it, as a sentence; empty if nothing does."""


def write_artifacts(
    candidate: Candidate,
    config: dict[str, Any],
    origin: Origin,
    options: Options,
    hub: Hub,
    folder: Path,
) -> Artifacts:
    """Everything but the card. `config`: the model's config.json."""
    dtype = candidate.stage.settings["dtype"]
    rank = None
    if options.adapter:
        rank = write_adapter(candidate, origin, folder)
        write_tokenizer(candidate, folder)
    else:
        write_weights(candidate.stage.folder, folder, dtype)
        write_configs(config, candidate, folder)
    write_license_files(candidate.base_model, origin.base_hub_id, folder, hub)
    weights = sorted(folder.glob("*.safetensors"))
    published, splitting = list(weights), None
    if options.gguf:
        file = folder / f"{options.repo_id.split('/')[1]}-{options.gguf}.gguf"
        splitting = write_gguf(candidate, origin, options.gguf, file)
        published.append(file)
    return Artifacts(
        model_type=config["model_type"],
        dtype=dtype,
        num_parameters=sum(map(count_parameters, weights)),
        hashes={file.name: hash_file(file) for file in published},
        adapter_rank=rank,
        gguf_type=options.gguf,
        gguf_splitting=splitting,
        long_context=describe_yarn(config),
    )


@contextmanager
def replace_folder(place: Path) -> Iterator[Path]:
    """A new folder, which replaces the one at `place` once everything is in it."""
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
    """The weights in the dtype that the model was sampled and evaluated in: float32 as hard links
    to the stage's files, bfloat16 rounded as the sampler rounded the master weights."""
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
"""transformers and vLLM keep these in float32, whatever the model's dtype."""


def round_weights(source: Path, target: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor if name.endswith(KEPT_IN_FLOAT32) else tensor.to(getattr(torch, dtype))
        for name, tensor in load_file(source).items()
    }
    save_file(tensors, target, metadata={"format": "pt"})


def write_configs(config: dict[str, Any], candidate: Candidate, folder: Path) -> None:
    """config.json, the tokenizer, and how the model was sampled when it was evaluated."""
    stage = candidate.stage
    # The trainer has switched the KV cache off.
    config = {**config, "dtype": stage.settings["dtype"], "use_cache": True}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_tokenizer(candidate, folder)
    generation = read_json(stage.folder / "generation_config.json")
    if candidate.evaluations:
        sampling = candidate.evaluations[0].stage.settings["sampling"]
        generation["do_sample"] = sampling["temperature"] > 0
        if generation["do_sample"]:
            generation |= {key: sampling[key] for key in ("temperature", "top_p", "top_k")}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def write_tokenizer(candidate: Candidate, folder: Path) -> None:
    for pattern in TOKENIZER:
        for file in candidate.stage.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def write_gguf(candidate: Candidate, origin: Origin, file_type: str, out: Path) -> "Splitting":
    """The model beside `out` as a file for llama.cpp, with the sampling it was evaluated with."""
    try:
        from r1pipe.models.gguf import Description, export_gguf
    except ImportError as error:
        raise UserError(f'--gguf: {error}: pip install "r1pipe[gguf]"') from error
    sampling = read_json(out.parent / "generation_config.json")
    about = Description(out.stem, origin.license, origin.base_hub_id, sampling)
    return export_gguf(out.parent, out, file_type, about, candidate.find_texts())


def write_license_files(base: str | None, hub_id: str | None, folder: Path, hub: Hub) -> None:
    """The base model's: its license may ask that derivatives carry them."""
    local = Path(base).expanduser() if base else None
    if local is not None and local.is_dir():
        for file in local.iterdir():
            if file.is_file() and LICENSE_FILES.fullmatch(file.name):
                shutil.copyfile(file, folder / file.name)
    elif hub_id:
        for name, text in hub.read_texts(hub_id, LICENSE_FILES).items():
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


def write_rollouts(candidate: Candidate, folder: Path) -> dict[str, int]:
    """Rollouts of the stages in the lineage and samples of the evaluations; the number of rows by
    file or pattern of files."""
    wanted = [(stage, pattern) for stage in candidate.lineage for pattern in ROLLOUTS]
    wanted += [(e.stage, e.entry["samples"]) for e in candidate.evaluations]
    num_rows: dict[str, int] = {}
    for stage, pattern in wanted:
        sources = list(stage.folder.glob(pattern))
        for source in sources:
            target = folder / stage.name / source.relative_to(stage.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_file(source, target)
        if sources:
            num_rows[f"{stage.name}/{pattern}"] = sum(map(count_rows, sources))
    return num_rows


def count_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(file).num_rows
    return sum(1 for _ in read_jsonl(file))


BINARY = (".safetensors", ".parquet", ".gguf")


def check_no_token(folder: Path) -> None:
    """Raises UserError if a text file holds a hub token, from a recipe or a data row."""
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
