"""Publishing: a finished stage's checkpoint as a model on the Hugging Face hub. Run it with:

    r1pipe publish runs/demo/distill --repo user/name --dry-run

Reads the run's folder and writes RUN/publish/STAGE/, which is what the hub gets: weights,
tokenizer, a generation config with the sampling that the model was evaluated with, the base model's
license files, and a card written from the run's records (card.py).
"""

import difflib
from pathlib import Path

from r1pipe.publish.artifacts import (
    BINARY,
    check_no_token,
    replace_folder,
    write_artifacts,
    write_rollouts,
)
from r1pipe.publish.candidate import Candidate
from r1pipe.publish.card import Card, write_dataset_card, write_model_card
from r1pipe.publish.hub import (
    MAX_DIFF_BYTES,
    Hub,
    Remote,
    RepoType,
    Unreachable,
    check_repo_id,
    list_changes,
)
from r1pipe.publish.options import Options
from r1pipe.publish.origin import Origin
from r1pipe.runs.reader import find_finished
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_text
from r1pipe.utils.progress import log_line

MAX_TOLD = 3
"""Objections in an error's one line."""


def publish(options: Options) -> None:
    """Write the folder, print what it changes on the hub, and unless `dry_run` upload it.

    Raises UserError, before anything is written, for a stage that should not be published.
    """
    check_repo_id(options.repo_id)
    if options.adapter and options.gguf:
        raise UserError("--adapter: llama.cpp's file is of a merged model: leave out --gguf")
    candidate = Candidate(*find_finished(options.target))
    objections = candidate.find_objections(options.max_overlap)
    if objections and not options.force:
        told = objections[:MAX_TOLD]
        if len(objections) > MAX_TOLD:
            told.append(f"and {len(objections) - MAX_TOLD} more")
        raise UserError(f"{'; '.join(told)} (--force publishes all the same and says so)")
    hub = Hub()
    if not options.dry_run:
        hub.check_login()
    origin = Origin.find(candidate, options, hub)
    config = candidate.read_config()
    place = candidate.run.path / "publish" / candidate.stage.name
    with replace_folder(place) as folder:
        artifacts = write_artifacts(candidate, config, origin, options, hub, folder)
        card = Card(options.repo_id, candidate, origin, artifacts, objections)
        write_text(folder / "README.md", write_model_card(card))
        check_no_token(folder)
    send(hub, place, options.repo_id, "model", options)
    if options.rollouts:
        place = place.with_name(f"{place.name}-rollouts")
        with replace_folder(place) as folder:
            num_rows = write_rollouts(candidate, folder)
            write_text(folder / "README.md", write_dataset_card(card, num_rows))
            check_no_token(folder)
        send(hub, place, f"{options.repo_id}-rollouts", "dataset", options)


def send(hub: Hub, folder: Path, repo_id: str, repo_type: RepoType, options: Options) -> None:
    """Print what the folder changes on the hub, and unless `dry_run` upload it."""
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
