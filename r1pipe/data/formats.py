"""Rows of one file: JSON lines, JSON, CSV, TSV or Parquet, the text formats compressed or not.

A row that cannot be read becomes a `BrokenRow`; reading continues. Every row has its place, for
messages: "my/train.csv: row 3 (line 4)".
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from r1pipe.utils.errors import first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
"""May follow the suffix of a text file. Compression is told by the first bytes, not by this."""


class Row(dict):
    """A row's values by column."""

    place = ""
    """File and row, for messages."""


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be read or mapped. `number` counts from 1."""

    number: int
    reason: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place or f'row {self.number}'}: {self.reason}"


def find_format(path: Path) -> str | None:
    """Which of SUFFIXES a file has, compression aside; None if none."""
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
"""Openers by a file's first bytes."""

POINTER = b"version https://git-lfs"
ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def open_text(path: Path) -> IO[str]:
    """Decompressed and decoded, line ends kept. Bytes that are not UTF-8 become lone surrogates,
    which `refuse_bytes` then finds in their row."""
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
    """Raises ValueError for lone surrogates: what `open_text` makes of bytes that are not UTF-8."""
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
    """JSON objects, one per line, or one array of them."""
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
    """Raises ValueError for a repeated key; json would take the last."""
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
    """The delimiter is a comma (.tsv: a tab), or whichever one the header has."""
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
    """Like `to_pylist`, with values that Python cannot hold, such as nanoseconds and years before
    1, as text."""
    import pyarrow

    columns = []
    for column in batch.columns:
        try:
            columns.append(column.to_pylist())
        except (ValueError, OverflowError):
            columns.append(column.cast(pyarrow.string()).to_pylist())
    return [dict(zip(batch.schema.names, values)) for values in zip(*columns)]
