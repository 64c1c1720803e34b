"""Recipe columns: a dataset of the user's own."""

import datetime
import decimal
import json
from pathlib import Path

import pytest
from row_files import QA, read, read_one, write_rows

from r1pipe.config.base import Reward
from r1pipe.data.problems import check_row
from r1pipe.rollout.scoring import Scorer
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import dump_row


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
