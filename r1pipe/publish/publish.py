"""Publishing: a finished stage's checkpoint as a model on the Hugging Face hub. Run it with:

    r1pipe publish runs/demo/distill --repo user/name --dry-run

Reads the run's folder and writes RUN/publish/STAGE/, which is what the hub gets: the weights, the
tokenizer, a generation config with the protocol that the model was measured under, the licence, and
a card filled by the run (card.py).
"""

import difflib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from r1pipe.data.problems import read_constants
from r1pipe.publish.artifacts import (
    BINARY,
    check_no_token,
    count_parameters,
    whole_folder,
    write_configs,
    write_gguf,
    write_rollouts,
    write_terms,
    write_weights,
)
from r1pipe.publish.card import CardFacts, TrainingData, write_model_card
from r1pipe.publish.hub import (
    MAX_DIFF_BYTES,
    Hub,
    Remote,
    RepoType,
    Unreachable,
    check_repo_id,
    list_changes,
)
from r1pipe.publish.licenses import LicenseSource, settle_licence
from r1pipe.publish.options import Options
from r1pipe.runs.hashes import hash_file
from r1pipe.runs.reader import Evaluation, FinishedRun, StageFolder, find_finished
from r1pipe.runs.verify import verify_stage
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json, read_jsonl, write_text
from r1pipe.utils.progress import log_line

if TYPE_CHECKING:
    pass


MAX_TEXTS = 2_000
"""That llama.cpp's splitting of text is tried on, where it has not the tokenizer's own."""

MAX_TOLD = 3
"""Objections in an error's one line."""


def publish(options: Options) -> None:
    """Write the folder, say what it changes on the hub, and unless `dry_run` send it there.

    Raises UserError, before anything is written, for a stage that should not be published.
    """
    check_repo_id(options.repo_id)
    run, stage = find_finished(options.target)
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
        facts = CardFacts(
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
) -> list[LicenseSource]:
    """What the model was made from, each with its licence as far as it can be found: from the
    command line, the recipe, or what the source says of itself."""
    given = {**(stage.config.get("licenses") or {}), **options.licences}
    models = {}
    base = run.base_model(stage.name)
    if base is not None:
        models[base] = "base model"
    for ancestor in run.lineage(stage.name):
        for name in ancestor.section.models():
            if (root := run.base_model(name)) is not None:
                models.setdefault(root, "teacher")
        if endpoint := getattr(ancestor.section, "teacher", None):
            models.setdefault(endpoint.model, "teacher")
    sources = [
        LicenseSource(name, role, given.get(name) or find_model_licence(name, options, hub))
        for name, role in models.items()
    ]
    for item in {d.name: d for d in data}.values():
        licence = given.get(item.name) or item.licence
        if licence is None and item.hub_id:
            licence = hub.find_licence(item.hub_id, "dataset")
        sources.append(LicenseSource(item.name, "data", licence))
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


def send(hub: Hub, folder: Path, repo_id: str, repo_type: RepoType, options: Options) -> None:
    """Print what the folder changes on the hub, and unless `dry_run` make the change."""
    log_line(f"written: {folder}")
    try:
        remote = hub.find_repo(repo_id, repo_type)
    except Unreachable as error:
        if not options.dry_run:
            raise
        log_line(f"not compared with the hub: {error}")
        return
    if remote is not None and not remote.private and not options.public:
        raise UserError(f"{repo_id}: is public on the hub: add --public if this is to be, too")
    changes = list_changes(folder, remote)
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
