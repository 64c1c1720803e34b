"""Rows of a table: a local file, the files of a split in a local folder, or a dataset on the hub.

A row that cannot be read does not end the reading: it becomes a `BrokenRow`. Every row knows its
place, for messages: "my/train.csv: row 3 (line 4)".
"""

import bz2
import csv
import difflib
import glob
import gzip
import io
import json
import logging
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
"""What may come after the suffix of a text file. How it is packed, its first bytes say."""

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
SPREAD = re.compile(r"-(\d+)-of-(\d+)\.")
"""In the name of a file that is one of several."""


class Row(dict):
    """A row's values by column."""

    place = ""
    """Where it is from, for a person."""


@dataclass(frozen=True)
class BrokenRow:
    """A row that is not what its dataset promises. `number` counts from 1."""

    number: int
    reason: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place or f'row {self.number}'}: {self.reason}"


def read_table(
    path: str, split: str, config: str | None = None, default_config: str | None = None
) -> Iterator[dict | BrokenRow]:
    """The rows of one split. `config`: the configuration on the hub, or the folder's sub-folder;
    `default_config`: the one on the hub if none is asked for, which a local folder need not have.

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
    """Whether no dataset on the hub can have this name."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    return not is_id or path.startswith(".") or find_format(Path(path)) is not None


def describe_here(path: Path) -> str:
    return "" if path.is_absolute() else f" (looked for in {Path.cwd()})"


def read_hub(path: str, split: str, config: str | None) -> Iterator[Row]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not every try of a request
    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the hub's errors have many classes and long messages
        raise ValueError(
            f"{path}: not a file or folder in {Path.cwd()}, and cannot be had from the hub "
            f"({first_line(error)}); give a local file or folder as options.path"
        ) from error
    yield from number_rows(path, rows)


def read_saved(folder: Path, split: str, config: str | None) -> Iterator[Row]:
    """What `save_to_disk` of the datasets library has written."""
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
    """The files of a split, as hub repositories and their exports name them: train.jsonl,
    train-00000-of-00002.parquet, train/..., also in data/ or in a folder named like the config."""
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
    """Files of one format whose names, but for the suffix, are like the pattern."""
    for suffix in SUFFIXES:
        found = chain.from_iterable(place.glob(f"{pattern}{suffix}{packed}") for packed in PACKED)
        if files := sorted(file for file in found if file.is_file()):
            return files
    return []


def refuse_missing_part(files: list[Path]) -> None:
    """Of files that say how many they are."""
    parts = [part for file in files if (part := SPREAD.search(file.name))]
    if parts and len(parts) == len(files) != int(parts[0][2]):
        raise ValueError(
            f"{files[0]}: one of {int(parts[0][2])} files, of which {len(files)} are here"
        )


def refuse_other_part(path: Path, split: str | None, config: str | None) -> None:
    """Raises ValueError if what is asked for is not what this single file, or saved dataset, can
    be. "train" is what stands in a recipe that says nothing: it is any file."""
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
    """The nearest of what is there, or all of it."""
    words = [str(name) for name in known]
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {list_some(words)}"


def list_some(words: list[str]) -> str:
    return ", ".join([*words[:20], *(["..."] if len(words) > 20 else [])]) or "none"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Files


def find_format(path: Path) -> str | None:
    """The suffix that says what a file holds; None if it is none of SUFFIXES."""
    name = path.name.lower()
    return next((s for s in SUFFIXES for packed in PACKED if name.endswith(s + packed)), None)


def read_file(path: Path) -> Iterator[dict | BrokenRow]:
    readers: dict[str | None, Callable[[Path], Iterator[dict | BrokenRow]]] = {
        ".csv": read_csv,
        ".tsv": read_csv,
        ".parquet": read_parquet,
        None: refuse_format,
    }
    try:
        yield from readers.get(find_format(path), read_json)(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{path}: cannot be read: {what}") from error


def refuse_format(path: Path) -> Iterator[dict]:
    raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}, or one of these packed by gzip")


def number_rows(path: Path | str, rows: Iterable[dict]) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        yield place_row(values, f"{path}: row {number}")


def place_row(values: dict, place: str) -> Row:
    row = Row(values)
    row.place = place
    return row


def describe_place(path: Path, number: int, line: int) -> str:
    return f"{path}: row {number}" + (f" (line {line})" if line != number else "")


def open_zst(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


PACKERS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": open_zst,
}
"""What opens files that begin so."""

POINTER = b"version https://git-lfs"
ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def open_text(path: Path) -> IO[str]:
    """Unpacked, decoded, with its line ends. Bytes that are no UTF-8 become lone surrogates, which
    `refuse_bytes` finds in the row that has them."""
    with path.open("rb") as file:
        head = file.read(len(POINTER))
    unpack = next((opener for magic, opener in PACKERS.items() if head.startswith(magic)), open)
    with unpack(path, "rb") as file:
        head = file.read(len(POINTER))
    if head == POINTER:
        raise ValueError(f"{path}: a pointer of Git LFS, not the data; fetch it with git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        raise ValueError(
            f"{path}: a zip archive, as Excel's files are: unpack it or save it as CSV"
        )
    encoding = next((e for mark, e in ENCODINGS.items() if head.startswith(mark)), "utf-8")
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    return io.TextIOWrapper(unpack(path, "rb"), encoding, errors, newline="")


def refuse_bytes(text: str) -> None:
    """Raises ValueError for what is no UTF-8."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        before = text[max(0, error.start - 10) : error.start]
        raise ValueError(
            f'not UTF-8: byte 0x{byte:02x} behind "{before}"; save the file as UTF-8, for instance '
            "by iconv -f latin1 -t utf-8"
        ) from error


def read_json(path: Path) -> Iterator[dict | BrokenRow]:
    """JSON objects, one a line, or one array of them."""
    with open_text(path) as lines:
        number = 0
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not number and line.lstrip().startswith("["):
                yield from read_array(path, line + lines.read())
                return
            if not number and line.strip() == "{":
                raise ValueError(
                    f"{path}: an object over several lines; rows are objects of one line each, or "
                    "an array of objects"
                )
            number += 1
            place = describe_place(path, number, line_number)
            try:
                yield check_object(parse_json(line), number, place)
            except ValueError as error:
                yield BrokenRow(number, f"not JSON: {error}", place)


def read_array(path: Path, text: str) -> Iterator[dict | BrokenRow]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield check_object(row, number, f"{path}: row {number}")


def parse_json(text: str) -> Any:
    refuse_bytes(text)
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            more = text[error.pos : error.pos + 20].strip()
            raise ValueError(f"more behind the first object: {more}") from error
        raise


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that is there twice, of which json would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" is there twice')
    return values


DECODER = json.JSONDecoder(object_pairs_hook=make_object)


def check_object(row: Any, number: int, place: str) -> Row | BrokenRow:
    if isinstance(row, dict):
        return place_row(row, place)
    return BrokenRow(number, "not a JSON object", place)


def read_csv(path: Path) -> Iterator[dict | BrokenRow]:
    """Cells between commas (.tsv: tabs), or what else the header has between its names."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # traces are longer than its 128 KiB
    with open_text(path) as file:
        blank = 0
        for head in file:
            if head.strip() and not head.startswith("sep="):  # Excel's
                break
            blank += 1
        else:
            return
        usual = "\t" if find_format(path) == ".tsv" else ","
        others = (mark for mark in "\t,;|" if mark in head)
        delimiter = usual if usual in head else next(others, usual)
        cells = csv.reader(
            chain([head], file), delimiter=delimiter, skipinitialspace=f"{delimiter} " in head,
            strict=True,
        )  # fmt: skip
        names: list[str] = []
        number = -1
        while True:
            line = blank + cells.line_num + 1
            try:
                values = next(cells, None)
            except csv.Error as error:
                if not names:
                    raise ValueError(f"{path}: its header is not CSV: {error}") from error
                number += 1
                yield BrokenRow(number, f"not CSV: {error}", describe_place(path, number, line))
                continue
            if values is None:
                return
            if not any(value.strip() for value in values):
                continue
            number += 1
            if not names:
                names = read_header(path, values)
                continue
            place = describe_place(path, number, line)
            yield read_cells(names, values, number, place)


def read_header(path: Path, values: list[str]) -> list[str]:
    names = [value.strip() for value in values]
    try:
        refuse_bytes("".join(names))
    except ValueError as error:
        raise ValueError(f"{path}: its header is {error}") from error
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f'{path}: two columns are called "{name}"')
    return names


def read_cells(names: list[str], values: list[str], number: int, place: str) -> Row | BrokenRow:
    if len(values) != len(names):
        cells, columns = len(values), len(names)
        return BrokenRow(number, f"{cells} cells where the header has {columns} columns", place)
    try:
        refuse_bytes("".join(values))
    except ValueError as error:
        return BrokenRow(number, str(error), place)
    return place_row(dict(zip(names, values)), place)


def read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path}: a pointer of Git LFS, not the data; fetch it: git lfs pull")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            read_header(path, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=1024)
            yield from number_rows(path, chain.from_iterable(map(list_rows, batches)))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not Parquet: {first_line(error)}") from error


def list_rows(batch: Any) -> list[dict]:
    """As `to_pylist` does, but for what Python has no values for, such as nanoseconds and years
    before 1: as text."""
    import pyarrow

    columns = []
    for column in batch.columns:
        try:
            columns.append(column.to_pylist())
        except (ValueError, OverflowError):
            columns.append(column.cast(pyarrow.string()).to_pylist())
    return [dict(zip(batch.schema.names, values)) for values in zip(*columns)]
