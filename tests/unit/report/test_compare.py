"""Two runs beside each other, in the terminal and on a page."""

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_run import write_run

from r1pipe.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        str(write_run(folder / "plain")),
        str(write_run(folder / "anchored", num_steps=4, beta=0.04)),
    ]


def test_differences_are_listed(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["grpo", "beta", "0.0", "0.04"] in lines
    assert ["grpo", "step", "6", "4"] in lines
    last_steps = lines[lines.index(["stage", "metric", "plain", "anchored"]) + 2 :]
    assert list(dict.fromkeys(line[0] for line in last_steps)) == ["sft", "grpo"]
    (grpo,) = [line for line in lines if line[:2] == ["grpo", "arithmetic/test"]]
    assert grpo[2:4] == ["100.0%", "100.0%"]
    assert grpo[4].startswith("+0.0 (-")
    assert grpo[4].endswith("4 problems")
    assert not any(line[:2] == ["grpo", "from"] for line in lines)


def test_a_run_that_is_not_there_is_one_line(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", runs[0], "runs/none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package)")
def test_the_curves_of_both_lie_over_each_other(runs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    assert main(["compare", *runs, "--out", str(page)]) == 0
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.as_uri(), "document.body?.dataset.ready")
        line = "p.getAttribute('stroke') + (p.hasAttribute('stroke-dasharray') ? ' dashed' : '')"
        lines = f"[...figure.querySelectorAll('path')].map(p => {line})"
        figures = "[...document.querySelectorAll('#charts figure')]"
        drawn = browser.evaluate(f"{figures}.map(figure => {lines})")
        assert drawn
        for lines in drawn:
            first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
            assert second == [f"{line} dashed" for line in first]
        rows = "document.querySelectorAll('#differences-table tbody tr').length"
        assert browser.evaluate(rows) == 1
        assert browser.errors == []
