"""Publishing: a finished stage's checkpoint as a model on the Hugging Face hub. Run it with:

    r1pipe publish runs/demo/distill --repo user/name --dry-run

Reads the run's folder and writes RUN/publish/STAGE/, which is what the hub gets: the weights, the
tokenizer, a generation config with the protocol that the model was measured under, the licence, and
a card filled by the run (card.py).
"""

import difflib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from r1pipe.card import Facts, TrainingData, write_dataset_card, write_model_card
from r1pipe.errors import UserError
from r1pipe.hub import (
    MAX_DIFF_BYTES,
    Hub,
    Remote,
    RepoType,
    Unreachable,
    check_repo_id,
    compare,
    holds_token,
)
from r1pipe.licences import Source, settle_licence
from r1pipe.lineage import hash_file, verify_stage
from r1pipe.problems import read_constants
from r1pipe.progress import say
from r1pipe.records import read_json, read_jsonl, write_text
from r1pipe.stage_folders import Evaluation, FinishedRun, StageFolder, find_checkpoint

if TYPE_CHECKING:
    from r1pipe.export_gguf import Splitting

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

MAX_TEXTS = 2_000
"""That llama.cpp's splitting of text is tried on, where it has not the tokenizer's own."""

MAX_TOLD = 3
"""Objections in an error's one line."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    target: Path
    repo_id: str
    public: bool = False
    dry_run: bool = False
    force: bool = False
    max_overlap: float = 0.0
    licences: dict[str, str] = field(default_factory=dict)
    """By source; the model's own under ""."""
    base_models: dict[str, str] = field(default_factory=dict)
    """Hub ids by the folders that the recipe names."""
    rollouts: bool = False
    gguf: str | None = None
    """F32, F16 or Q8_0; None: no such file."""
    collection: str | None = None


def publish(options: Options) -> None:
    """Write the folder, say what it changes on the hub, and unless `dry_run` send it there.

    Raises UserError, before anything is written, for a stage that should not be published.
    """
    check_repo_id(options.repo_id)
    run, stage = find_checkpoint(options.target)
    evaluations = run.evaluations(stage.name)
    objections = find_objections(run, stage, evaluations, options.max_overlap)
    if objections and not options.force:
        told = objections[:MAX_TOLD]
        if len(objections) > MAX_TOLD:
            told.append(f"and {len(objections) - MAX_TOLD} more")
        raise UserError(f"{'; '.join(told)} (--force publishes all the same and says so)")
    hub = Hub()
    if not options.dry_run:
        hub.check_login()
    base = run.base_model(stage.name)
    base_hub_id = find_hub_id(base, options)
    data = list(list_data(run, stage))
    sources = list_sources(run, stage, data, options, hub)
    licence = settle_licence(sources, options.licences.get(""))
    config = read_json(stage.folder / "config.json")
    if "auto_map" in config:
        raise UserError(f"{stage.folder}/config.json: auto_map: the model needs code of its own")

    with whole_folder(run.path / "publish" / stage.name) as folder:
        dtype = stage.settings["dtype"]
        write_weights(stage.folder, folder, dtype)
        write_configs(config, stage, folder, evaluations)
        write_terms(base, base_hub_id, folder, hub)
        weights = sorted(folder.glob("*.safetensors"))
        published = list(weights)
        splitting = None
        if options.gguf:
            file = folder / f"{options.repo_id.split('/')[1]}-{options.gguf}.gguf"
            texts = find_texts(run, stage, evaluations)
            splitting = write_gguf(folder, file, options, licence, base_hub_id, texts)
            published.append(file)
        facts = Facts(
            repo_id=options.repo_id,
            run=run,
            stage=stage,
            model_type=config["model_type"],
            num_parameters=sum(map(count_parameters, weights)),
            dtype=dtype,
            base_model=base,
            base_hub_id=base_hub_id,
            licence=licence,
            sources=sources,
            data=data,
            evaluations=evaluations,
            objections=objections,
            hashes={file.name: hash_file(file) for file in published},
            gguf_type=options.gguf,
            gguf_splitting=splitting,
            messages=find_prompt(run, stage),
        )
        write_text(folder / "README.md", write_model_card(facts))
        check_no_token(folder)
    send(hub, run.path / "publish" / stage.name, options.repo_id, "model", options)
    if options.rollouts:
        place = run.path / "publish" / f"{stage.name}-rollouts"
        with whole_folder(place) as folder:
            write_rollouts(facts, folder)
            check_no_token(folder)
        send(hub, place, f"{options.repo_id}-rollouts", "dataset", options)


def find_objections(
    run: FinishedRun, stage: StageFolder, evaluations: list[Evaluation], max_overlap: float
) -> list[str]:
    """Why the stage should not be published."""
    objections = []
    if not evaluations:
        objections.append(
            f"{stage.folder}: not evaluated since it was made; run r1pipe eval with "
            f'"{stage.name}" among its checkpoints'
        )
    for evaluation in evaluations:
        overlap, dataset = evaluation.entry["overlap"], evaluation.entry["dataset"]
        if overlap is not None and overlap > max_overlap:
            objections.append(
                f"{stage.folder}: {overlap:.2%} of {dataset} overlaps with what it was trained on; "
                f"--max-overlap is {max_overlap:.2%}"
            )
    looked_at = [*run.lineage(stage.name), *(evaluation.stage for evaluation in evaluations)]
    for looked in looked_at:
        objections += [
            f"{looked.folder}: {finding.what}"
            for finding in verify_stage(looked.folder)
            if finding.is_problem
        ]
    return objections


def list_data(run: FinishedRun, stage: StageFolder) -> Iterator[TrainingData]:
    """The data recipes of everything that the stage comes from."""
    for ancestor in run.lineage(stage.name):
        for source in ancestor.section.problem_sets():
            if source.recipe is None:
                continue
            constants = read_constants(source.recipe)
            name, hub_id = source.recipe, constants.get("HUB_ID")
            path = source.options.get("path")
            elsewhere = path is not None and not Path(path).expanduser().exists()
            if path is not None and (hub_id is None or (elsewhere and path != hub_id)):
                # Somebody else's rows, of which the recipe knows the form only.
                name, hub_id, constants = path, path if elsewhere else None, {}
            licence = constants.get("LICENSE")
            yield TrainingData(ancestor, name, source.split, hub_id, licence)


def list_sources(
    run: FinishedRun,
    stage: StageFolder,
    data: list[TrainingData],
    options: Options,
    hub: Hub,
) -> list[Source]:
    """What the model was made from, each with its licence as far as it can be found: from the
    command line, the recipe, or what the source says of itself."""
    given = {**(stage.config.get("licenses") or {}), **options.licences}
    models = {}
    base = run.base_model(stage.name)
    if base is not None:
        models[base] = "base model"
    for ancestor in run.lineage(stage.name):
        for name in filter(None, (ancestor.weights_from, ancestor.taught_by)):
            if (root := run.base_model(name)) is not None:
                models.setdefault(root, "teacher")
        if endpoint := getattr(ancestor.section, "teacher", None):
            models.setdefault(endpoint.model, "teacher")
    sources = [
        Source(name, role, given.get(name) or find_model_licence(name, options, hub))
        for name, role in models.items()
    ]
    for item in {d.name: d for d in data}.values():
        licence = given.get(item.name) or item.licence
        if licence is None and item.hub_id:
            licence = hub.find_licence(item.hub_id, "dataset")
        sources.append(Source(item.name, "data", licence))
    return sources


def find_model_licence(name: str, options: Options, hub: Hub) -> str | None:
    """What the card in a base model's folder says, or the card of its repository."""
    card = Path(name).expanduser() / "README.md"
    if card.is_file():
        return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    hub_id = find_hub_id(name, options)
    return hub.find_licence(hub_id, "model") if hub_id else None


def find_hub_id(name: str | None, options: Options) -> str | None:
    """The hub's name of a base model that the recipe names by its hub id or its folder."""
    if name is None or name in options.base_models:
        return options.base_models.get(name)
    return None if Path(name).expanduser().exists() else name


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
        from r1pipe.export_gguf import Description, export_gguf
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


def find_prompt(run: FinishedRun, stage: StageFolder) -> list[dict[str, str]]:
    """A prompt of the kind that the stage, or the nearest before it, was trained on."""
    for ancestor in reversed(run.lineage(stage.name)):
        file = ancestor.folder / "problems.jsonl"
        if file.exists():
            for _, row in read_jsonl(file):
                return row["prompt"]
    return [{"role": "user", "content": "What is 7 + 5?"}]


def find_texts(run: FinishedRun, stage: StageFolder, evaluations: list[Evaluation]) -> list[str]:
    """What the model has read and written when it was measured; else a prompt that it learnt."""
    rows = (
        row
        for evaluation in evaluations
        for _, row in read_jsonl(evaluation.stage.folder / evaluation.entry["samples"])
    )
    texts = (row[key] for row in rows for key in ("prompt", "completion") if key in row)
    if found := list(islice(texts, MAX_TEXTS)):
        return list(dict.fromkeys(found))
    return [message["content"] for message in find_prompt(run, stage)]


def write_rollouts(facts: Facts, folder: Path) -> None:
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


def send(hub: Hub, folder: Path, repo_id: str, repo_type: RepoType, options: Options) -> None:
    """Print what the folder changes on the hub, and unless `dry_run` make the change."""
    say(f"written: {folder}")
    try:
        remote = hub.find_repo(repo_id, repo_type)
    except Unreachable as error:
        if not options.dry_run:
            raise
        say(f"not compared with the hub: {error}")
        return
    if remote is not None and not remote.private and not options.public:
        raise UserError(f"{repo_id}: is public on the hub: add --public if this is to be, too")
    changes = compare(folder, remote)
    print(f"{repo_id}: {describe_repo(remote, options.public)}")
    for change in changes:
        print(change)
        if change.sign == "~":
            print_changed_lines(hub, folder / change.path, repo_id, repo_type, remote)
    if options.dry_run:
        return
    if remote is None:
        remote = hub.create_repo(repo_id, repo_type, private=not options.public)
    url = hub.upload(folder, changes, repo_id, repo_type, remote, f"r1pipe publish {folder.name}")
    if options.public and remote.private:
        hub.make_public(repo_id, repo_type)
    print(f"published: {url}")
    if options.collection:
        url = hub.add_to_collection(options.collection, repo_id, repo_type, not options.public)
        print(f"collection: {url}")


def describe_repo(remote: Remote | None, public: bool) -> str:
    if remote is None:
        return f"new {'public' if public else 'private'} repo"
    return f"{'private' if remote.private else 'public'} repo at {remote.commit[:12]}"


def print_changed_lines(
    hub: Hub, file: Path, repo_id: str, repo_type: RepoType, remote: Remote
) -> None:
    there = remote.files[file.name]
    if (
        file.suffix in BINARY
        or there.lfs is not None
        or max(there.size, file.stat().st_size) > MAX_DIFF_BYTES
    ):
        return
    before = hub.read_text(repo_id, repo_type, file.name, remote).splitlines()
    after = file.read_text(encoding="utf-8").splitlines()
    for line in list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]:
        print(f"    {line}")
