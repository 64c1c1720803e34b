"""Files of rows as other programs write them."""

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from row_files import QA, read, read_error


def test_csv_with_a_cell_too_many_or_too_few(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('question,answer\n1+1?,#### 2\n1+2?\n1+3?,4,5\n"a\nb",#### 6\n')
    loaded = read("gsm8k", path=str(path), on_broken_row="skip")
    assert [problem.answer for problem in loaded.problems] == ["2", "6"]
    assert [row.number for row in loaded.broken] == [2, 3]
    assert "row 3 (line 6)" in read_error("columns", path, QA, "\nq,a\n1,2\n3,4\n\n5")


ROWS = b'{"q": "1+1?", "a": "2"}\n{"q": "2+2?", "a": "4"}\n'
# name of a file, what it holds: rows of 1+1 and 2+2
TABLES = [
    ("bom.jsonl", b"\xef\xbb\xbf" + ROWS),
    ("ends.jsonl", b"\n" + ROWS.replace(b"\n", b"\r\n\r\n")),
    ("old.ndjson", ROWS.replace(b"\n", b"\r")),
    ("wide.jsonl", ROWS.decode().encode("utf-16")),
    ("array.json", b"\xef\xbb\xbf\n [" + ROWS.strip().replace(b"\n", b",\n") + b"]\n"),
    ("UPPER.JSONL", ROWS),
    ("packed.jsonl.gz", gzip.compress(ROWS)),
    ("packed.jsonl", gzip.compress(ROWS)),
    ("unpacked.jsonl.gz", ROWS),
    ("packed.csv.bz2", bz2.compress(b"q,a\n1+1?,2\n2+2?,4\n")),
    ("packed.tsv.xz", lzma.compress(b"q\ta\n1+1?\t2\n2+2?\t4\n")),
    ("packed.jsonl.zst", pyarrow.compress(ROWS, "zstd", asbytes=True)),
    ("tabs.tsv", b"q\ta\r\n1+1?\t2\r\n2+2?\t4\r\n"),
    ("tabs.csv", b"q\ta\n1+1?\t2\n2+2?\t4\n"),
    ("semicolons.csv", b"\xef\xbb\xbfq;a\n1+1?;2\n2+2?;4\n"),
    ("excel.csv", b"\xef\xbb\xbfsep=;\r\nq;a\r\n1+1?;2\r\n2+2?;4\r\n"),
    ("spaces.csv", b'q, a\n1+1?, 2\n"2+2?", "4"\n'),
    ("blank.csv", b"\nq,a\n\n1+1?,2\n,\n2+2?,4\n"),
    ("one.csv", b"a,q,,\n2,1+1?,,\n4,2+2?,,\n"),
]


@pytest.mark.parametrize(("name", "content"), TABLES, ids=[name for name, _ in TABLES])
def test_tables_as_other_programs_write_them(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    problems = read("columns", path=str(tmp_path / name), columns=QA).problems
    assert [(p.question, p.answer) for p in problems] == [("1+1?", "2"), ("2+2?", "4")]


# name of a file, what it holds, words of the error
BAD_TABLES = [
    ("a.csv", "q,a\n1+1?,2\nEn été?,4\n".encode("latin-1"), ["row 2 (line 3)", "byte 0xe9"]),
    ("a.jsonl", ROWS + '{"q": "été"}'.encode("latin-1"), ["row 3", "not UTF-8"]),
    ("a.csv", "été,a\n".encode("latin-1"), ["header is not UTF-8"]),
    ("a.csv", b"q,a,a\n1+1?,2,3\n", ['two columns are called "a"']),
    ("a.jsonl", b'{"q": "?", "a": "1", "a": "2"}', ["row 1", 'the key "a" is there twice']),
    ("a.csv", b'q,a\n1+1?,"2\n2+2?,4\n', ["row 1 (line 2): not CSV"]),
    ("a.jsonl", ROWS.replace(b"\n", b""), ["row 1", "more behind the first object: {"]),
    ("a.json", b'{\n "q": "?"\n}\n', ["an object over several lines"]),
    ("a.json", b'[{"q": "?",]', ["a.json: not JSON"]),
    ("a.jsonl", b"", ["a.jsonl", "no rows"]),
    ("a.jsonl", b"[" * 100_000, ["nested too deeply"]),
    ("a.jsonl", b'{"q": "\\ud83d", "a": "1"}', ["row 1", "half of a character"]),
    ("a.jsonl.gz", gzip.compress(ROWS * 99, mtime=0)[:-9], ["a.jsonl.gz: cannot be read"]),
    ("a.parquet", b"no", ["a.parquet: not Parquet"]),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", ["git lfs pull"]),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", ["git lfs pull"]),
    ("a.csv", b"PK\x03\x04\x14", ["a zip archive"]),
    ("a.txt", b"1+1? 2", ["not one of .jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BAD_TABLES, ids=lambda x: str(x)[:30])
def test_tables_that_cannot_be_read(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    line = read_error("columns", tmp_path / name, QA, content)
    for word in words:
        assert word in line
    assert "columns.py" not in line


def test_parquet_with_what_python_has_no_values_for(tmp_path: Path) -> None:
    times = pyarrow.array([1, 2], pyarrow.timestamp("ns"))
    table = pyarrow.table({"q": [b"1+1?", b"2+2?"], "a": [2.0, 4.0], "unused": times})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    problems = read("columns", path=str(tmp_path / "a.parquet"), columns=QA).problems
    assert [(p.question, p.answer) for p in problems] == [("1+1?", "2"), ("2+2?", "4")]
