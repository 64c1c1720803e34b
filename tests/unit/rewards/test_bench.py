"""The bench: its figures, its formats, and the errors that a user can cause."""

import json

import pytest

from rewards import bench

ROWS = [
    {"gold": "1/2", "pred": "0.5", "label": True},
    {"gold": "1/2", "pred": "0.6", "label": False, "kind": "answer"},
    {"gold": "4", "pred": "The answer is 4.", "label": True, "kind": "completion"},
    {"gold": "4", "pred": "4", "label": False},  # a false positive, by its label
    {"gold": "4", "pred": "five", "label": True},  # a false negative
    {"gold": "", "pred": "4", "label": False},  # no verdict
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return path


def test_figures(pairs, capsys):
    assert bench.main([str(pairs), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["n"] == 6
    assert figures["false_negatives"] == 1
    assert figures["false_positives"] == 1
    assert figures["none"] == 1
    assert figures["timeouts"] == 0
    assert figures["pairs_per_s"] > 0
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= 1000 * figures["max_s"] + 1


def test_table_and_the_wrong_verdicts(pairs, capsys):
    assert bench.main([str(pairs), "--show", "5"]) == 0
    out = capsys.readouterr().out
    assert "false_negatives" in out
    assert "labelled right: gold '4', pred 'five'" in out


def test_programs(tmp_path, capsys):
    tests = {"inputs": ["4\n"], "outputs": ["16\n"]}
    programs = [("print(int(input()) ** 2)", True), ("print(16", False), ("print(4)", True)]
    path = tmp_path / "programs.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"completion": code, "tests": tests, "label": label, "kind": "code"})
            for code, label in programs
        )
    )
    assert bench.main([str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["n"], figures["false_negatives"], figures["false_positives"]) == (3, 1, 0)
    assert (figures["unparseable"], figures["none"]) == (1, 0)
    assert bench.main([str(path), "--show", "3"]) == 0
    assert "wrong, labelled right" in capsys.readouterr().out
    assert bench.main([str(path), "--compare"]) == 2


def test_math_verify_beside(pairs, capsys):
    assert bench.main([str(pairs), "--json", "--compare"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"rewards", "math-verify"}
    assert figures["math-verify"]["n"] == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"gold": "1", "pred": 1, "label": true}', "line 2: 'pred' must be a string"),
        ('{"gold": "1", "pred": "1"}', "line 2: 'label' must be true or false"),
        ('{"gold": "1", "pred": "1", "label": true, "kind": "x"}', "line 2: kind is 'x'"),
        ('{"completion": "1", "label": true, "kind": "code"}', "line 2: a row of kind 'code'"),
    ],
)
def test_errors_name_the_line(tmp_path, capsys, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line)
    assert bench.main([str(path)]) == 2
    assert message in capsys.readouterr().err
