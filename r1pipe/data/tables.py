"""Tables: a local file, the files of a split in a local folder, or a dataset on the hub."""

import difflib
import glob
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from r1pipe.data.formats import (
    PACKED,
    SUFFIXES,
    BrokenRow,
    Row,
    find_format,
    number_rows,
    read_file,
)
from r1pipe.utils.errors import first_line

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
SPREAD = re.compile(r"-(\d+)-of-(\d+)\.")
"""In the name of one of several files."""


def read_table(
    path: str, split: str, config: str | None = None, default_config: str | None = None
) -> Iterator[dict | BrokenRow]:
    """The rows of one split. `config`: the configuration on the hub, or a sub-folder of the folder;
    `default_config`: used on the hub if there is no `config`; a local folder need not have it.

    Raises OSError or ValueError, in one line, if there is no such file, split or dataset.
    """
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"options.path: a file, a folder or a hub id (got {path!r})")
    local = Path(path).expanduser()
    if local.is_file():
        refuse_other_part(local, split, config)
        yield from read_file(local)
    elif (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        yield from read_saved(local, split, config)
    elif local.is_dir():
        for file in find_split_files(local, split, config, default_config):
            yield from read_file(file)
    elif looks_local(path):
        raise ValueError(f"{path}: no such file or folder{describe_here(local)}")
    else:
        yield from read_hub(path, split, config or default_config)


def looks_local(path: str) -> bool:
    """Whether it cannot be the id of a dataset on the hub."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    return not is_id or path.startswith(".") or find_format(Path(path)) is not None


def describe_here(path: Path) -> str:
    return "" if path.is_absolute() else f" (looked for in {Path.cwd()})"


def read_hub(path: str, split: str, config: str | None) -> Iterator[Row]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the hub's errors have many classes and long messages
        raise ValueError(
            f"{path}: not a file or folder in {Path.cwd()}, and cannot be had from the hub "
            f"({first_line(error)}); give a local file or folder as options.path"
        ) from error
    yield from number_rows(path, rows)


def read_saved(folder: Path, split: str, config: str | None) -> Iterator[Row]:
    """A folder written by `save_to_disk` of the datasets library."""
    from datasets import DatasetDict, load_from_disk

    refuse_other_part(folder, None, config)
    rows = load_from_disk(str(folder))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f'{folder}: no split "{split}"; {hint_at(split, rows)}')
        rows = rows[split]
    yield from number_rows(folder, rows)


def find_split_files(
    folder: Path, split: str, config: str | None = None, default_config: str | None = None
) -> list[Path]:
    """The files of a split, named as in hub repositories and exports: train.jsonl,
    train-00000-of-00002.parquet, train/..., also in data/ or in a folder with the config's name."""
    if not split.strip() or "/" in split:
        raise ValueError(f'split "{split}": a name, such as train')
    named = config or default_config
    own = [folder / named, folder / "data" / named] if named else []
    own = [place for place in own if place.is_dir()]
    if config and not own:
        folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(
            f'{folder}: no folder of the config "{config}"; {hint_at(config, folders)}'
        )
    places = own if config else [*own, folder, folder / "data"]
    for place in places:
        for pattern in ("", "-*", "/*"):
            if files := list_tables(place, glob.escape(split) + pattern):
                refuse_missing_part(files)
                return files
    found = sorted({f.name for place in places for f in place.glob("*") if find_format(f)})
    configs = sorted(path.parent.name for path in folder.glob(f"*/{glob.escape(split)}[-.]*"))
    elsewhere = f"; options.config may be {', '.join(dict.fromkeys(configs))}" if configs else ""
    raise ValueError(
        f'{folder}: no file of split "{split}" ({split}.jsonl, {split}-*.parquet, ...); '
        f"there are {list_some(found)}{elsewhere}"
    )


def list_tables(place: Path, pattern: str) -> list[Path]:
    """Files of one format whose names without the suffix match the pattern."""
    for suffix in SUFFIXES:
        found = chain.from_iterable(place.glob(f"{pattern}{suffix}{packed}") for packed in PACKED)
        if files := sorted(file for file in found if file.is_file()):
            return files
    return []


def refuse_missing_part(files: list[Path]) -> None:
    """Raises ValueError if files named 00000-of-00002 and so on are not all here."""
    parts = [part for file in files if (part := SPREAD.search(file.name))]
    if parts and len(parts) == len(files) != int(parts[0][2]):
        raise ValueError(
            f"{files[0]}: one of {int(parts[0][2])} files, of which {len(files)} are here"
        )


def refuse_other_part(path: Path, split: str | None, config: str | None) -> None:
    """Raises ValueError if this single file, or saved dataset, cannot be the split or config asked
    for. "train" is the default, so any file can be it."""
    if config:
        raise ValueError(f'{path}: has no configs: leave out options.config "{config}"')
    if split in (None, "train") or split in path.name:
        return
    if split not in SPLIT_NAMES:
        near = difflib.get_close_matches(split, SPLIT_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave split out"
        raise ValueError(f'{path}: one file, which has no split "{split}"; {hint}')
    word = re.split(r"[-_.]", path.name.lower())[0]
    if word in SPLIT_NAMES and {word, split} & {"train", "test"}:
        raise ValueError(f'{path}: by its name not the split "{split}": leave split out to read it')


def hint_at(word: str, known: Iterable[object]) -> str:
    """The nearest known name, or all of them."""
    words = [str(name) for name in known]
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {list_some(words)}"


def list_some(words: list[str]) -> str:
    return ", ".join([*words[:20], *(["..."] if len(words) > 20 else [])]) or "none"
