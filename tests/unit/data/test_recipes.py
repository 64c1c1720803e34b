"""The recipes in data/: every row mapping, on rows of the datasets' own schemas in small files."""

import bz2
import csv
import datetime
import decimal
import gzip
import json
import lzma
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import rewards
from r1pipe.config.base import ProblemSet, Reward
from r1pipe.data.problems import Loaded, check_row, load_set
from r1pipe.rollout.scoring import Scorer
from r1pipe.types import Problem, Rollout
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import dump_row


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(recipe: str, split: str = "train", on_broken_row: str = "error", **options) -> Loaded:
    return load_set(
        ProblemSet(recipe=recipe, split=split, options=options, on_broken_row=on_broken_row)
    )


def read_one(recipe: str, path: Path, split: str = "train", **options) -> Problem:
    (problem,) = read(recipe, split, path=str(path), **options).problems
    return problem


MATH_ROW = {
    "problem": "What is $1+\\frac{1}{2}$?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": "It is \\boxed{\\frac{3}{2}}.",
}
OPENR1_ROW = {
    "problem": "What is 2+2?",
    "answer": "4",
    "source": "olympiads",
    "uuid": "a",
    "is_reasoning_complete": [False, True, True],
    "generations": ["<think>cut", "<think>5</think>\\boxed{5}", "<think>4</think>\\boxed{4}"],
    "correctness_math_verify": [True, False, True],
}
NUMINA_ROW = {
    "problem": "Find x.",
    "solution": "x is 3.",
    "answer": "3",
    "source": "olympiads",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
}
TALK = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
CONTEST_TESTS = {"input": ["1 2\n"], "output": ["3\n"]}
NO_TESTS = {"input": [], "output": []}

# recipe, row, split, options, expected columns of the problem
MAPPINGS = [
    ("math", MATH_ROW, "train", {}, {"answer": "\\frac{3}{2}"}),
    (
        "math_500",
        {**MATH_ROW, "answer": "\\frac{3}{2}", "level": 3, "unique_id": "test/1.json"},
        "test",
        {},
        {"answer": "\\frac{3}{2}", "id": "math-500-test-0"},
    ),
    ("aime", {"id": 60, "problem": "?", "answer": "025"}, "test", {"year": 2024}, {"answer": "25"}),
    ("aime", {"problem": "?", "answer": 70}, "test", {"year": 2025}, {"answer": "70"}),
    ("openr1_math", OPENR1_ROW, "train", {}, {"solution": "<think>4</think>\\boxed{4}"}),
    (
        "mixture_of_thoughts",
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "<think>\nHm.\n</think>\nSo."},
            ],
            "num_tokens": 9,
            "source": "science",
        },
        "train",
        {"max_tokens": 9},
        {"kind": "text", "answer": None, "solution": "<think>\nHm.\n</think>\nSo."},
    ),
    (
        "smoltalk",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello?"},
                {"role": "assistant", "content": "Hi."},
            ],
            "source": "everyday-conversations",
        },
        "train",
        {},
        {"kind": "text", "answer": None, "solution": "Hi.", "category": "everyday-conversations"},
    ),
    (
        "big_math",
        {"problem": "1+1?", "answer": "2", "source": "orca", "llama8b_solve_rate": 0.5},
        "train",
        {"min_solve_rate": 0.2, "max_solve_rate": 0.8},
        {"answer": "2", "solution": None},
    ),
    (
        "deepscaler",
        {"problem": "1+1?", "answer": "2", "solution": "One more than 1."},
        "train",
        {},
        {"solution": "<think>\nOne more than 1.\n</think>\n\\boxed{2}"},
    ),
    ("numina_math", NUMINA_ROW, "train", {"sources": ["olympiads"]}, {"answer": "3"}),
    (
        "numina_math",
        {"source": "cn_k12", "problem": "Find x.", "solution": "So \\boxed{3}.", "messages": []},
        "train",
        {},
        {"answer": "3"},
    ),
    (
        "countdown",
        {"nums": [3, 4, 5], "target": 17},
        "train",
        {},
        {"kind": "task", "tests": {"numbers": [3, 4, 5], "target": 17}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "row", "split", "options", "expected"), MAPPINGS, ids=lambda x: str(x)[:20]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_row_mapping(
    recipe: str, row: dict, split: str, options: dict, expected: dict, suffix: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [row])
    problem = read_one(recipe, path, split, **options)
    for column, value in expected.items():
        assert getattr(problem, column) == value, column
    question = row.get("problem") or (row["messages"][-2]["content"] if "messages" in row else "17")
    assert question in problem.question
    if problem.kind == "math" and problem.solution:
        assert rewards.math_correct(completions=[problem.solution], answer=[problem.answer]) == [
            1.0
        ]


# recipe, row, options, right program, wrong program
CODE = [
    (
        "humaneval",
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(x):\n    """Twice x."""\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        },
        {},
        "def double(x):\n    return x + x",
        "def double(x):\n    return x",
    ),
    (
        "mbpp",
        {
            "task_id": 1,
            "text": "Write a function to double.",
            "code": "",
            "test_list": ["assert double(3) == 6"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {},
        "def double(x):\n    return x + x",
        "def double(x):\n    return x",
    ),
    (
        "mbpp",
        {
            "task_id": 1,
            "prompt": "Write a function to double.",
            "code": "",
            "test_imports": ["import math"],
            "test_list": ["assert math.isclose(double(3), 6)"],
        },
        {},
        "def double(x):\n    return x + x",
        "def double(x):\n    return x",
    ),
    (
        "code_contests",
        {
            "name": "a",
            "description": "Add two numbers.",
            "public_tests": CONTEST_TESTS,
            "private_tests": {"input": ["5 6"], "output": ["11"]},
            "generated_tests": NO_TESTS,
        },
        {},
        "print(sum(map(int, input().split())))",
        "print(3)",
    ),
    (
        "code_contests",
        {"id": "cc-0", "problem": "Add two numbers.", "inputs": ["1 2\n"], "outputs": ["3\n"]},
        {},
        "print(sum(map(int, input().split())))",
        "print(4)",
    ),
    (
        "verifiable_coding",
        {
            "prompt": "Add two numbers.",
            "gold_standard_solution": "",
            "verification_info": json.dumps(
                {
                    "language": "python",
                    "test_cases": [
                        {"type": "stdin_stdout", "input": "1 2", "output": "3", "fn_name": None}
                    ],
                }
            ),
        },
        {},
        "print(sum(map(int, input().split())))",
        "print(4)",
    ),
]


@pytest.mark.parametrize(
    ("recipe", "row", "options", "right", "wrong"), CODE, ids=lambda x: str(x)[:20]
)
def test_code_row_s_tests_judge_programs(
    recipe: str, row: dict, options: dict, right: str, wrong: str, tmp_path: Path
) -> None:
    problem = read_one(recipe, write_rows(tmp_path / "rows.jsonl", [row]), **options)
    assert problem.kind == "code"
    completions = [f"```python\n{program}\n```" for program in (right, wrong)]
    assert rewards.code_passes(completions=completions, tests=[problem.tests] * 2) == [1.0, 0.0]


# recipe, rows of which the first is kept, options, why the others are not
FILTERS = [
    ("math", [MATH_ROW, {**MATH_ROW, "level": "Level 1"}], {"levels": [3]}, {"other levels"}),
    (
        "openr1_math",
        [
            OPENR1_ROW,
            {**OPENR1_ROW, "correctness_math_verify": [True, False, False]},
            {**OPENR1_ROW, "answer": "proof"},
        ],
        {},
        {"no verified trace", "no final answer"},
    ),
    (
        "numina_math",
        [
            NUMINA_ROW,
            {**NUMINA_ROW, "answer": "notfound"},
            {**NUMINA_ROW, "answer": "proof"},
            {**NUMINA_ROW, "solution_is_valid": "Incomplete"},
            {**NUMINA_ROW, "source": "cn_k12"},
        ],
        {"sources": ["olympiads"]},
        {"no final answer", "not valid", "other sources"},
    ),
    (
        "smoltalk",
        [
            {"messages": TALK, "source": "smol-summarize"},
            {"messages": TALK, "source": "numina-cot-100k"},
        ],
        {},
        {"other sources"},
    ),
    (
        "smoltalk",
        [
            {"messages": TALK, "source": "systemchats-30k"},
            {"messages": TALK, "source": "smol-summarize"},
        ],
        {"sources": ["systemchats-30k"]},
        {"other sources"},
    ),
    (
        "big_math",
        [
            {"problem": "?", "answer": "1", "llama8b_solve_rate": rate}
            for rate in (0.5, 0.0, None, 1.0)
        ],
        {"min_solve_rate": 0.1, "max_solve_rate": 0.9},
        {"solve rate not within 0.1 to 0.9"},
    ),
    (
        "code_contests",
        [
            {"problem": "?", "inputs": ["1"], "outputs": ["1"]},
            {"problem": "?", "inputs": [], "outputs": []},
        ],
        {},
        {"no tests"},
    ),
]


@pytest.mark.parametrize(
    ("recipe", "rows", "options", "reasons"), FILTERS, ids=lambda x: str(x)[:20]
)
def test_filters_are_counted(
    recipe: str, rows: list[dict], options: dict, reasons: set[str], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    loaded = read(recipe, path=str(path), **options)
    assert len(loaded.problems) == 1
    assert loaded.num_rows == len(rows)
    assert sum(loaded.filtered.values()) == len(rows) - 1
    assert set(loaded.filtered) == reasons
    assert list(dict(loaded.steps()).values())[-1] == 1
    assert loaded.describe().startswith(f"{len(rows)} rows, ")


HUB_OPTIONS = {
    "gsm8k": "path, system, size, skip",
    "big_math": "path, system, size, skip, min_solve_rate, max_solve_rate",
    "mbpp": "path, config, system, size, skip",
    "smoltalk": "path, config, size, skip, sources",
}


@pytest.mark.parametrize("recipe", HUB_OPTIONS)
def test_a_hub_recipe_s_options_are_its_own_and_the_shared_ones(recipe: str) -> None:
    with pytest.raises(UserError, match=f'no option "unknown"; there are {HUB_OPTIONS[recipe]}$'):
        read(recipe, unknown=1)


def test_countdown_is_generated_solvable_and_split() -> None:
    train, test = read("countdown", size=200), read("countdown", "test", size=200)
    for problem in train.problems + test.problems:
        assert len(problem.tests["numbers"]) == 4
    keys = [
        {f"{sorted(p.tests['numbers'])} {p.tests['target']}" for p in part.problems}
        for part in (train, test)
    ]
    assert not keys[0] & keys[1]
    right = rewards.countdown_correct(
        completions=[p.solution for p in train.problems], tests=[p.tests for p in train.problems]
    )
    assert right == [1.0] * 200


# answer, numbers, target, reward
EXPRESSIONS = [
    ("(3 + 4) * 5", [5, 4, 3], 35, 1.0),
    ("3 \\times 4 = 12", [3, 4], 12, 1.0),
    ("-3 + 4", [3, 4], 1, 1.0),
    ("7 / 2 * 4", [7, 2, 4], 14, 1.0),
    ("3 + 4", [3, 4, 5], 7, 0.0),  # one is left
    ("3 + 4 + 4", [3, 4], 11, 0.0),  # one is used twice
    ("35", [5, 4, 3], 35, 0.0),
    ("3 + 4", [3, 4], 8, 0.0),
    ("4 / (3 - 3)", [4, 3, 3], 1, 0.0),
    ("3 ** 4", [3, 4], 81, 0.0),
    ("__import__('os').getpid()", [3, 4], 7, 0.0),
    ("True + 3", [1, 3], 4, 0.0),
    ("(" * 290, [3, 4], 7, 0.0),
    ("3 + 4", "34", 7, None),
    ("3 + 4", [3, 4], None, None),
]


@pytest.mark.parametrize(("answer", "numbers", "target", "expected"), EXPRESSIONS)
def test_countdown_reward(answer: str, numbers: object, target: object, expected: object) -> None:
    tests = {"numbers": numbers, "target": target}
    completions = [f"<think>hm</think>\\boxed{{{answer}}}"]
    assert rewards.countdown_correct(completions=completions, tests=[tests]) == [expected]
    assert rewards.countdown_correct(completions=completions, tests=[json.dumps(tests)]) == [
        expected
    ]


# Local files


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


def test_math_reads_a_folder_per_subject(tmp_path: Path) -> None:
    folders = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
               "number_theory", "prealgebra", "precalculus")  # fmt: skip
    for folder in folders:
        write_rows(tmp_path / folder / "train-00000-of-00001.parquet", [MATH_ROW])
    assert len(read("math", path=str(tmp_path)).problems) == 7


def test_size_and_skip_count_problems_not_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(10)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    loaded = read("gsm8k", path=str(path), skip=2, size=3)
    assert [problem.answer for problem in loaded.problems] == ["2", "3", "4"]
    assert loaded.problems[0].id == "gsm8k-train-2"


# Broken rows

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


def test_csv_with_a_cell_too_many_or_too_few(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('question,answer\n1+1?,#### 2\n1+2?\n1+3?,4,5\n"a\nb",#### 6\n')
    loaded = read("gsm8k", path=str(path), on_broken_row="skip")
    assert [problem.answer for problem in loaded.problems] == ["2", "6"]
    assert [row.number for row in loaded.broken] == [2, 3]
    assert "row 3 (line 6)" in read_error("columns", path, QA, "\nq,a\n1,2\n3,4\n\n5")


# Tables as other programs write them

QA = {"prompt": "q", "answer": "a"}
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
    ("a.jsonl.gz", gzip.compress(ROWS * 99)[:-9], ["a.jsonl.gz: cannot be read"]),
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


def read_error(recipe: str, path: Path, columns: dict, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        read(recipe, path=str(path), columns=columns)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_parquet_with_what_python_has_no_values_for(tmp_path: Path) -> None:
    times = pyarrow.array([1, 2], pyarrow.timestamp("ns"))
    table = pyarrow.table({"q": [b"1+1?", b"2+2?"], "a": [2.0, 4.0], "unused": times})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    problems = read("columns", path=str(tmp_path / "a.parquet"), columns=QA).problems
    assert [(p.question, p.answer) for p in problems] == [("1+1?", "2"), ("2+2?", "4")]


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


# Your own


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_own_columns(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"mine{suffix}", [{"q": "1+1?", "final": "so #### 2", "nr": 7}])
    columns = {"prompt": "q", "answer": "final", "id": "nr"}
    problem = read_one(
        "columns", path, columns=columns, answer_pattern="#### (.+)", system="Think."
    )
    assert (problem.id, problem.answer, problem.kind) == ("7", "2", "math")
    assert [m["role"] for m in problem.prompt] == ["system", "user"]


def test_own_columns_of_other_kinds(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = write_rows(
        tmp_path / "mine.jsonl", [{"chat": messages, "reply": "Hello", "t": {"x": 1}}]
    )
    text = read_one("columns", path, columns={"prompt": "chat", "solution": "reply"}, kind="text")
    assert (text.prompt, text.solution) == (messages, "Hello")
    code = read_one("columns", path, columns={"prompt": "chat", "tests": "t"}, kind="code")
    assert code.tests == {"x": 1}


# a value, and the answer that it is; None: none, and the row is broken
ANSWERS = [
    (2, "2"),
    (2.0, "2"),
    (-0.5, "-0.5"),
    (1e-7, "0.0000001"),
    (decimal.Decimal("1.50"), "1.50"),
    (True, "True"),
    (b"2", "2"),
    (" 2 ", "2"),
    ("nano", "nano"),
    (None, None),
    (float("nan"), None),
    (float("inf"), None),
    ("nan", None),
    ("NULL", None),
    ("  ", None),
    (datetime.date(2024, 1, 1), None),
    (datetime.datetime(2024, 1, 1), None),
    (["2"], None),
    ({"x": "2"}, None),
]


@pytest.mark.parametrize(("value", "answer"), ANSWERS, ids=repr)
def test_no_answer_is_made_of_what_is_none(
    value: object, answer: str | None, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"q": "?", "a": value}, {"q": "1+1?", "a": value}])
    if answer is None:
        with pytest.raises(UserError, match=r"a\.parquet: row 1: .*answer"):
            read("columns", path=str(path), columns=QA)
    else:
        assert read("columns", path=str(path), columns=QA).problems[0].answer == answer


ASKED = [{"role": "user", "content": "1+1?"}]
TOLD = [*ASKED, {"role": "assistant", "content": "2"}]

# a row, columns, prompt, answer, solution, category
SHAPES = [
    ({"q": ASKED, "r": {"g": "2"}}, {"prompt": "q", "answer": "r.g"}, "2", None, ""),
    ({"q": "1+1?", "r": '{"g": [1, 2]}'}, {"prompt": "q", "answer": "r.g.-1"}, "2", None, ""),
    ({"q": "1+1?", "r.g": "2"}, {"prompt": "q", "answer": "r.g"}, "2", None, ""),
    ({"m": TOLD}, {"messages": "m"}, None, "2", ""),
    ({"m": json.dumps(TOLD)}, {"messages": "m"}, None, "2", ""),
    ({"m": str(ASKED), "a": "2"}, {"prompt": "m", "answer": "a"}, "2", None, ""),
    ({"m": TOLD, "a": 2, "c": 3}, {"messages": "m", "answer": "a", "category": "c"}, "2", "2", "3"),
    ({"m": ASKED, "a": 2, "c": None}, {"messages": "m", "answer": "a", "category": "c"},
     "2", None, ""),
    (
        {"m": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"messages": "m"}, None, "2", "",
    ),
    (
        {"q": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "s": TOLD[1:]},
        {"prompt": "q", "solution": "s"}, None, "2", "",
    ),
    ({"m": [*ASKED, {**TOLD[1], "reasoning_content": "Add."}]}, {"messages": "m"},
     None, "<think>\nAdd.\n</think>\n\n2", ""),
    ({"q": ASKED, "s": [{**TOLD[1], "thinking": "Add."}]}, {"prompt": "q", "solution": "s"},
     None, "<think>\nAdd.\n</think>\n\n2", ""),
]  # fmt: skip


# a row, columns, words of the error
TOLD_WRONG = [
    ({"m": ASKED}, {"messages": "m"}, "does not end with the assistant"),
    ({"q": ASKED, "s": ASKED}, {"prompt": "q", "solution": "s"}, r"assistant \(got user\)"),
    ({"m": [*ASKED, {**TOLD[1], "tool_calls": [{}]}]}, {"messages": "m"}, "has tool calls"),
    ({"m": [*ASKED, {**TOLD[1], "thinking": ["Add."]}]}, {"messages": "m"}, "thoughts are list"),
]


@pytest.mark.parametrize(("row", "columns", "words"), TOLD_WRONG, ids=repr)
def test_what_an_assistant_has_not_said_is_not_learnt(
    row: dict, columns: dict, words: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=f"row 1: .*{words}"):
        read("columns", path=str(path), columns=columns)


def test_a_developer_says_what_a_system_prompt_would(tmp_path: Path) -> None:
    told = [{"role": "developer", "content": "D"}, *ASKED]
    path = write_rows(tmp_path / "a.jsonl", [{"q": told, "a": "2"}])
    assert read_one("columns", path, columns=QA, system="S").prompt == told


@pytest.mark.parametrize(("row", "columns", "answer", "solution", "category"), SHAPES, ids=repr)
def test_shapes_of_rows(
    row: dict,
    columns: dict,
    answer: str | None,
    solution: str | None,
    category: str,
    tmp_path: Path,
) -> None:
    problem = read_one(
        "columns", write_rows(tmp_path / "a.jsonl", [row]), columns=columns, system="S"
    )
    assert problem.prompt == [{"role": "system", "content": "S"}, *ASKED]
    assert (problem.answer, problem.solution, problem.category) == (answer, solution, category)
    assert problem.kind == ("math" if answer else "text")


def test_other_columns_are_for_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.csv", [{"q": "1+1?", "a": 2, "level": 3}])
    columns = {**QA, "difficulty": "level"}
    problem = read_one("columns", path, columns=columns)
    assert check_row(json.loads(dump_row(problem))) == problem
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_level.py").write_text(
        "def named(completions, difficulty, **columns):\n"
        "    assert 'answer' in columns\n"
        "    return [float(level or 0) for level in difficulty]\n"
    )
    plain = read_one("columns", path, columns=QA)
    assert "extra" not in json.loads(dump_row(plain))
    rollout = Rollout("", 0, [], [], [], "2", "stop")
    scores = Scorer([Reward(function="by_level.named")]).score([problem, plain], [rollout] * 2)
    assert [score.total for score in scores] == [3.0, 0.0]
    for name in ("completions", "two words"):
        with pytest.raises(UserError, match=f'cannot be called "{name}"'):
            read("columns", path=str(path), columns={**QA, name: "level"})


# options, words of the error
COLUMN_ERRORS = [
    ({"columns": {"prompt": "question", "answer": "final.x"}}, 'row 1: in "final": no column "x"'),
    ({"columns": {"prompt": "question", "answer": "fnal.x"}}, 'no column "fnal"; did'),
    ({"columns": {"prompt": "question", "answer": None}}, "such as {prompt: question"),
    ({"columns": {"prompt": "question", "answer": "final"}, "answer_pattern": "("}, "regular"),
    ({"columns": {"prompt": "question", "answer": "final"}, "size": 0}, "options.size: a whole"),
    ({"columns": {"prompt": "qestion", "answer": "final"}}, 'row 1: no column "qestion"; did'),
    ({"columns": {"promt": "question"}}, 'columns: unknown column "promt"; did you mean prompt?'),
    ({"columns": {"answer": "final"}}, '"prompt"'),
    ({"colums": {}}, 'no option "colums"; did you mean columns?'),
    ({}, 'the option "columns" is needed'),
    ({"columns": {"prompt": "question"}}, 'name the column that is the "answer"'),
    ({"columns": {"prompt": "question", "answer": "final"}, "kind": "maths"}, 'kind "maths"'),
    (
        {"columns": {"prompt": "question", "answer": "final"}, "answer_pattern": "boxed"},
        "mine.jsonl: row 1: the answer column has nothing like answer_pattern boxed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), COLUMN_ERRORS)
def test_column_mapping_errors(options: dict, words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [{"question": "1+1?", "final": "2"}])
    with pytest.raises(UserError) as error:
        read("columns", path=str(path), **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
