"""The files of a split in a folder, and saved datasets."""

import re
from pathlib import Path

import datasets
import pytest
from row_files import QA, read, read_one, write_rows

from r1pipe.utils.errors import UserError


def test_folder_layouts(tmp_path: Path) -> None:
    row = {"question": "1+1?", "answer": "#### 2"}
    for name in (
        "a/train.jsonl",
        "b/train-00000-of-00001.parquet",
        "c/data/train-00000-of-00001.parquet",
        "d/main/train.csv",
        "e/train/0.jsonl",
    ):
        write_rows(tmp_path / name, [row])
        assert read_one("gsm8k", tmp_path / name.partition("/")[0]).answer == "2"
    with pytest.raises(UserError, match=r'no file of split "test".*there are train.jsonl'):
        read("gsm8k", "test", path=str(tmp_path / "a"))
    with pytest.raises(UserError, match="no such file or folder"):
        read("gsm8k", path=str(tmp_path / "z.jsonl"))


def test_a_dataset_that_the_datasets_library_saved(tmp_path: Path) -> None:
    datasets.DatasetDict(
        {split: datasets.Dataset.from_list([{"q": f"{split}?", "a": "1"}]) for split in ("a", "b")}
    ).save_to_disk(str(tmp_path / "both"))
    assert (
        read("columns", "b", path=str(tmp_path / "both"), columns=QA).problems[0].question == "b?"
    )
    path = str(tmp_path / "both" / "a")
    assert read("columns", path=path, columns=QA).problems[0].question == "a?"
    with pytest.raises(UserError, match=r'both: no split "c"; there are a, b'):
        read("columns", "c", path=str(tmp_path / "both"), columns=QA)


# what a recipe's YAML asks of local files (train.jsonl, main/train.jsonl, part-00000-of-00002.csv)
ELSEWHERE = [
    ("", {"config": "mian"}, 'no folder of the config "mian"; did you mean main?'),
    ("", {"split": "tset"}, 'no file of split "tset"'),
    ("", {"split": "tr*"}, 'no file of split "tr\\*"'),
    ("", {"split": "../x"}, 'split "../x"'),
    ("", {"split": "part"}, "one of 2 files, of which 1 are here"),
    ("train.jsonl", {"split": "tset"}, 'no split "tset"; did you mean test?'),
    ("train.jsonl", {"split": "test"}, 'by its name not the split "test"'),
    ("train.jsonl", {"config": "main"}, "has no configs"),
    ("trian.jsonl", {}, "no such file or folder"),
]


@pytest.mark.parametrize(("place", "asked", "words"), ELSEWHERE, ids=str)
def test_no_other_rows_are_read_than_asked_for(
    place: str, asked: dict, words: str, tmp_path: Path
) -> None:
    for name in ("train.jsonl", "main/train.jsonl", "part-00000-of-00002.csv"):
        write_rows(tmp_path / name, [{"q": name, "a": "1"}])
    (problem,) = read("columns", path=str(tmp_path), columns=QA, config="main").problems
    assert problem.question == "main/train.jsonl"
    with pytest.raises(UserError, match=words):
        read("columns", path=str(tmp_path / place), columns=QA, **asked)


def test_a_relative_path_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"looked for in {tmp_path}")):
        read("columns", path="my/train.jsonl", columns=QA)
