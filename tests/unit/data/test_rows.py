"""Rows that are counted, skipped, filtered or broken."""

from pathlib import Path

import pytest
from row_files import read, write_rows

from r1pipe.utils.errors import UserError


def test_size_and_skip_count_problems_not_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(10)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    loaded = read("gsm8k", path=str(path), skip=2, size=3)
    assert [problem.answer for problem in loaded.problems] == ["2", "3", "4"]
    assert loaded.problems[0].id == "gsm8k-train-2"


LINES = [
    '{"question": "1+1?", "answer": "#### 2"}',
    '{"question": "1+2?", "answer": "#### 3"',
    '{"qestion": "1+3?", "answer": "#### 4"}',
    "[1, 2]",
    '{"question": null, "answer": "#### 5"}',
    '{"question": "1+5?", "answer": "six"}',
    '{"question": "1+6?", "answer": "#### 7"}',
]
REASONS = {
    2: "not JSON",
    3: 'no column "question"; did you mean qestion',
    4: "not a JSON object",
    5: "the question is NoneType, not text",
    6: 'no "answer"',
}


def test_broken_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(LINES))
    loaded = read("gsm8k", path=str(path), on_broken_row="skip")
    assert [problem.answer for problem in loaded.problems] == ["2", "7"]
    assert loaded.steps() == [("rows", 7), ("broken rows", 2)]
    assert [row.number for row in loaded.broken] == list(REASONS)
    for row in loaded.broken:
        assert REASONS[row.number] in row.reason


@pytest.mark.parametrize("number", REASONS)
def test_broken_row_is_fatal_by_default(number: int, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{LINES[0]}\n{LINES[number - 1]}\n")
    with pytest.raises(UserError) as error:
        read("gsm8k", path=str(path))
    assert "row 2" in str(error.value)
    assert REASONS[number] in str(error.value)
    assert "on_broken_row" in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_but_broken_rows_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"text": "1+1?"}])
    with pytest.raises(
        UserError, match=r'no rows in order; .*train.jsonl: row 1: no column "answer"'
    ):
        read("gsm8k", path=str(path), on_broken_row="skip")
