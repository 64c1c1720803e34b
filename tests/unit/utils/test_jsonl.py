"""JSON and JSONL files: what is missing or broken is one line that names the file and the row."""

import io
from pathlib import Path

import pytest

from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json, read_jsonl


def test_a_missing_file_is_an_error_unless_it_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "none"
    for read in (read_json, lambda path: list(read_jsonl(path))):
        with pytest.raises(UserError, match=r"none: cannot be read: No such file"):
            read(path)
    assert read_json(path, missing_ok=True) is None
    assert list(read_jsonl(path, missing_ok=True)) == []
    # A folder is there, and is no file.
    for read in (read_json, lambda path, missing_ok: list(read_jsonl(path, missing_ok))):
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            read(tmp_path, missing_ok=True)


@pytest.mark.parametrize("content", [b"", b'{"cut', b'{"a": "\xff"}', b"\x00\x00"])
def test_what_is_not_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: not JSON"):
        read_json(path, missing_ok=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "row 3: not JSON"),
        (b'{"a": "\xff"}', "row 3: not JSON"),
        (b"[1]", "row 3: not a JSON object"),
    ],
)
def test_a_broken_row_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl: {message}"):
        list(read_jsonl(path, growing=True))


def test_of_a_growing_file_only_whole_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    assert [row for _, row in read_jsonl(path, growing=True)] == [{"a": 1}, {"a": 2}]
    assert [row for _, row in read_jsonl(path, growing=True, begin=9)] == [{"a": 2}]
    with pytest.raises(UserError, match="row 3: not JSON"):
        list(read_jsonl(path))


def test_a_line_whose_end_comes_while_it_is_read_is_not_read_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(io.BytesIO):
        """A file whose last line is at first half written."""

        def __next__(self) -> bytes:
            line = super().__next__()
            if line == b'{"a": \n':  # where the file ended a moment ago
                return line[:-1]
            return line

    file = Growing(b'{"a": 1}\n{"a": \n2}\n')
    monkeypatch.setattr(Path, "open", lambda path, mode: file)
    assert [row for _, row in read_jsonl(tmp_path / "a", growing=True)] == [{"a": 1}]
