"""JSON and JSONL files: read with errors that name the line, written whole or not at all."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from r1pipe.utils.errors import UserError


def read_json(path: Path, missing_ok: bool = False) -> Any:
    """The value in a JSON file; None if there is no file and `missing_ok`.

    Raises UserError if it cannot be read or is not JSON.
    """
    with open_to_read(path, missing_ok) as file:
        if file is None:
            return None
        try:
            return json.loads(file.read())
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from error


def read_jsonl(
    path: Path, missing_ok: bool = False, growing: bool = False, begin: int = 0
) -> Iterator[tuple[int, dict]]:
    """Yield (row number from 1, row); nothing if there is no file and `missing_ok`. `growing`: skip
    a last line without its end, of a file that is being written or whose writer was killed.
    `begin`: bytes to skip; rows are counted from there.

    Raises UserError if the file cannot be read or a line is not a JSON object.
    """
    with open_to_read(path, missing_ok) as lines:
        if lines is not None:
            lines.seek(begin)
        for number, line in enumerate(lines or (), 1):
            if growing and not line.endswith(b"\n"):
                return  # not to go on with the rest of it, which may have come by now
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: row {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: not a JSON object")
            yield number, row


@contextmanager
def open_to_read(path: Path, missing_ok: bool) -> Iterator[BinaryIO | None]:
    """As bytes: text that is not UTF-8 then fails in json.loads, where the row is known."""
    try:
        file = path.open("rb")
    except OSError as error:
        if not (missing_ok and isinstance(error, FileNotFoundError)):
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        yield None
        return
    with file:
        yield file


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write records or dicts atomically."""
    write_lines(path, (f"{dump_row(row)}\n" for row in rows))


def dump_row(row: Any) -> str:
    """One record or dict as a JSON line, without the line end. NaN, such as the mean of no rewards,
    and infinity become null."""
    if not isinstance(row, dict):
        row = {k: v for k, v in asdict(row).items() if k != "extra" or v is not None}
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(replace_nan(row), ensure_ascii=False, allow_nan=False)


def replace_nan(value: Any) -> Any:
    """None for every NaN and infinity in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: replace_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: temporary neighbor, fsync, rename. Raises OSError."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """As `write_text`, from an iterable."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
