"""The report: what is packed into it, and the page in a real browser."""

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from report_run import write_episode, write_run

from r1pipe.cli.main import main
from r1pipe.report import html as report
from r1pipe.runs.ledger import SUMMARY
from r1pipe.runs.reader import find_stages
from r1pipe.utils.jsonl import write_jsonl, write_text

READY = "document.body?.dataset.ready"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def read_data(page: Path) -> dict[str, Any]:
    match = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(match.group(1))


def test_the_report_is_one_file_without_links(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("command", ["report", "compare", "cost"])
@pytest.mark.parametrize("name", ["summary.json", "grpo/stage.json"])
def test_a_broken_file_is_one_line(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "run")
    write_jsonl(
        run / "ledger.jsonl",
        [
            {"event": "begin", "stage": "grpo", "time": 0.0, "unit": "core", "devices": 1}
            | {"price_per_device_hour": None, "currency": "USD"},
            {"event": "end", "outcome": "finished", "wall_s": 1.0}
            | dict.fromkeys(("tokens_sampled", "tokens_trained"), 0),
        ],
    )
    (run / name).write_text('{"cut')
    assert main([command, str(run), *([str(run)] if command == "compare" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run / name}: not JSON" in line


def test_stages_come_in_the_order_of_the_recipe(run: Path, tmp_path: Path) -> None:
    data = read_data(report.write_report(run, tmp_path / "r.html"))
    assert [stage["name"] for stage in data["stages"]] == ["sft", "grpo", "eval"]
    assert data["stages"][1]["parents"] == ["sft"]
    assert not data["running"]


def test_rollouts_are_packed_whole(run: Path) -> None:
    rollouts = report.Rollouts()
    for stage in find_stages(run):
        for row in report.find_rollouts(stage):
            rollouts.add(**row)
    packed = rollouts.pack()
    texts = [
        text
        for chunk in packed["chunks"]
        for text in json.loads(gzip.decompress(base64.b64decode(chunk)))
    ]
    assert packed["total"] == packed["kept"] == len(texts) == 6 * 16 + 8
    assert packed["sources"] == ["grpo", "eval: sft", "eval: grpo"]
    assert texts[0][0] == "<think>I count 0 & more.</think>\\boxed{0}"
    assert texts[0][1] == [[0, 1.0], [1, 1.0]]


def test_too_many_rollouts_are_thinned_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_ROLLOUTS", 30)
    data = report.collect(run, find_stages(run))
    assert data["rollouts"]["total"] == 104
    assert 15 <= data["rollouts"]["kept"] <= 30


def test_a_stage_being_made_is_shown_with_its_whole_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "grpo").rename(run / ".grpo.partial")
    with (run / ".grpo.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    data = report.collect(run, find_stages(run))
    assert data["running"]
    assert {s["name"]: s["state"] for s in data["stages"]}["grpo"] == "running"
    curves = {curve["stage"]: curve for curve in data["curves"]}["grpo"]
    assert curves["steps"] == [1, 2, 3, 4, 5, 6]


def test_a_stage_before_its_first_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "grpo").rename(run / ".grpo.partial")
    (run / ".grpo.partial" / "metrics.jsonl").unlink()
    shutil.rmtree(run / ".grpo.partial" / "rollouts")
    data = report.collect(run, find_stages(run))
    assert [stage["name"] for stage in data["stages"]] == ["sft", "eval", "grpo"]
    assert data["rollouts"]["sources"] == ["eval: sft", "eval: grpo"]


def test_a_folder_without_stages_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(run: Path, browser: Browser, tmp_path: Path) -> Browser:
    """The report from a disk, on a wide screen."""
    browser.errors.clear()
    browser.resize(1300, 900)
    out = report.write_report(run, tmp_path / "report.html")
    browser.open(out.as_uri(), READY)
    return browser


def count_shown(page: Browser) -> int:
    return page.evaluate("document.querySelectorAll('#list li').length")


def set_filter(page: Browser, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const field = document.getElementById('filters').elements[{name!r}];"
        f"field.value = {value!r};"
        "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


@needs_browser
def test_the_page_shows_every_section_without_an_error(page: Browser) -> None:
    hidden = "[...document.querySelectorAll('main > section')].filter(s => s.hidden).map(s => s.id)"
    assert page.evaluate(hidden) == ["differences", "cost"]
    assert page.evaluate("document.querySelectorAll('#flow li').length") == 3
    assert page.evaluate("document.querySelectorAll('#charts svg path').length") >= 3
    assert page.evaluate("document.querySelectorAll('.charts svg[aria-label^=MFU]').length") == 1
    assert page.evaluate("document.querySelectorAll('#heatmaps canvas').length") == 1
    assert page.errors == []


@needs_browser
def test_a_steps_timeline_is_drawn_to_scale(page: Browser) -> None:
    """A row for each lane, and a span where it worked."""
    spans = page.evaluate(
        "[...document.querySelectorAll('svg.timeline rect:has(title)')].map("
        "s => [s.querySelector('title').textContent, Number(s.getAttribute('x')), "
        "Number(s.getAttribute('width'))])"
    )
    assert [title for title, *_ in spans] == [
        "engine 0: sampling, 0 to 3 s",
        "judges: scoring, 2 to 3 s",
        "trainer: update, 3 to 3.8 s",
        "trainer: sync, 3.8 to 4 s",
    ]
    begin, width = spans[0][1:]
    assert spans[2][1] == pytest.approx(begin + width, abs=0.2)
    assert spans[2][2] / width == pytest.approx(0.8 / 3, abs=0.01)
    label = page.evaluate("document.querySelector('svg.timeline').getAttribute('aria-label')")
    assert label == "engine_0 idle 25.0%, judges idle 75.0%, trainer idle 75.0%"
    page.evaluate(
        "(() => { const step = document.querySelector('#timelines input'); step.value = 0;"
        "step.dispatchEvent(new Event('input')); })()"
    )
    caption = page.evaluate("document.querySelector('#timelines figcaption').textContent")
    assert caption == "grpo, step 1: 4 s"
    behind = page.evaluate(
        "[...document.querySelectorAll('svg.timeline')][1].getAttribute('aria-label')"
    )
    assert behind == "tokens by steps behind the trainer: 0 behind: 75.0%, 1 behind: 25.0%"


@needs_browser
def test_an_error_on_the_page_would_be_seen(page: Browser) -> None:
    page.evaluate("void setTimeout(() => { throw new Error('seen') })")
    page.evaluate("new Promise(resolve => setTimeout(resolve, 50))")
    assert "seen" in page.errors[0]


@needs_browser
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, 100),
        ({"source": "eval: grpo"}, 4),
        ({"outcome": "wrong", "source": "eval: sft"}, 4),
        ({"step_from": "2", "step_to": "3"}, 32),
        ({"reward_from": "1", "step_from": "6"}, 16),
        ({"reward_to": "0.5", "source": "eval: grpo"}, 0),
        ({"search": "3 apples", "source": "grpo"}, 24),
    ],
)
def test_filters_leave_what_they_say(page: Browser, filters: dict, expected: int) -> None:
    for name, value in filters.items():
        set_filter(page, name, value)
    assert count_shown(page) == expected


@needs_browser
def test_turns_and_tool_calls_are_folded(browser: Browser, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    write_episode(run / "grpo", 7)
    assert main(["report", str(run), "--out", str(out)]) == 0
    browser.errors.clear()
    browser.open(out.as_uri(), READY)
    set_filter(browser, "search", "An episode?")
    browser.wait_for("document.querySelector('#detail .answer')?.textContent === 'none'")
    folded = browser.evaluate(
        "[...document.querySelectorAll('#detail details')].map("
        "d => [d.open, d.querySelector('summary').textContent, d.querySelector('pre').textContent])"
    )
    assert folded == [
        [False, "assistant calls calculator, 24 characters", "<tool_call>0</tool_call>"],
        [False, "tool calculator, 16 characters", "0, said the tool"],
        [False, "thinking, 11 characters", "As it says."],
    ]
    note = browser.evaluate("document.querySelector('#detail .rollout .note').textContent")
    assert "2 turns, ended: done" in note
    assert browser.errors == []


@needs_browser
def test_thinking_is_folded_and_text_stays_text(page: Browser) -> None:
    set_filter(page, "outcome", "wrong")
    page.wait_for("document.querySelector('#detail .answer')?.textContent.includes('a guess')")
    answer = page.evaluate("document.querySelector('#detail .answer').textContent")
    assert answer == "a guess </script><b>"
    assert page.evaluate("document.querySelector('details.thinking').open") is False
    page.evaluate("document.getElementById('list').focus()")
    page.press("t")
    assert page.evaluate("document.querySelector('details.thinking').open") is True


@needs_browser
def test_right_and_wrong_samples_stand_side_by_side(page: Browser) -> None:
    set_filter(page, "source", "grpo")
    page.wait_for("document.querySelector('.others button')")
    page.evaluate("document.querySelector('.others button').click()")
    page.wait_for("document.querySelectorAll('#detail .rollout').length === 2")
    heads = "[...document.querySelectorAll('#detail h4 span')].map(s => s.textContent)"
    assert page.evaluate(heads) == ["right", "wrong"]


@needs_browser
def test_the_same_problem_before_and_after(page: Browser) -> None:
    set_filter(page, "source", "eval: sft")
    page.wait_for("document.querySelectorAll('.others button').length > 1")
    click = "[...document.querySelectorAll('.others button')].find(b => b.textContent === {!r})"
    page.evaluate(click.format("first beside last") + ".click()")
    page.wait_for("document.querySelectorAll('#detail .rollout').length === 2")
    heads = page.evaluate("[...document.querySelectorAll('#detail h4')].map(h => h.textContent)")
    assert "grpo, step 1" in heads[0]
    assert "eval: grpo" in heads[1]


@needs_browser
def test_the_keyboard_is_enough(page: Browser) -> None:
    page.press("/")
    assert page.evaluate("document.activeElement.name") == "search"
    page.evaluate("document.getElementById('list').focus()")
    page.press("ArrowDown")
    selected = "document.querySelector('#list [aria-selected=true]').id"
    page.wait_for(f"{selected} === 'rollout-1'")
    page.press("ArrowUp")
    page.wait_for(f"{selected} === 'rollout-0'")


@needs_browser
def test_filters_outlive_a_reload(page: Browser) -> None:
    set_filter(page, "source", "eval: grpo")
    page.evaluate("delete document.body.dataset.ready")
    page.call("Page.reload")
    page.wait_for(READY)
    assert count_shown(page) == 4


def count_lines(browser: Browser, tmp_path: Path, rows: list[dict], label: str) -> int:
    """In the chart of these steps whose label is like that."""
    run = write_run(tmp_path / "run")
    write_jsonl(run / "grpo" / "metrics.jsonl", rows)
    browser.open(report.write_report(run, tmp_path / "report.html").as_uri(), READY)
    chart = f".charts svg[aria-label{label}]"
    return browser.evaluate(f"document.querySelectorAll('{chart} path').length")


@needs_browser
def test_teachers_share_a_chart(browser: Browser, tmp_path: Path) -> None:
    rows = [
        {"step": step, "divergence": 2 / step, "divergence/math": 1 / step, "divergence/zh": 3}
        for step in (1, 2, 3)
    ]
    assert count_lines(browser, tmp_path, rows, "^=divergence") == 3


@needs_browser
def test_limits_of_episodes_share_a_chart(browser: Browser, tmp_path: Path) -> None:
    ends = [f"episodes/ended_by_{why}" for why in ("turns", "tokens", "tool_time", "error")]
    rows = [{"step": step, **dict.fromkeys(ends, 1 / step)} for step in (1, 2, 3)]
    assert count_lines(browser, tmp_path, rows, '*="a limit"') == 4


@needs_browser
def test_what_judges_cost_has_a_column(browser: Browser, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    spent = {"requests": 1200, "prompt_tokens": 7000, "completion_tokens": 90, "cost": 3.5}
    plain = {"stage": "sft", "wall_s": 1.0, "unit": "GPU", "currency": "USD"}
    costs = [plain, {**plain, "stage": "grpo", "judge": spent}]
    write_text(run / SUMMARY, json.dumps(costs))
    browser.errors.clear()
    browser.open(report.write_report(run, out).as_uri(), READY)
    table = browser.evaluate(
        "[...document.querySelectorAll('#cost-table tr')].map("
        "row => [...row.children].map(cell => cell.textContent))"
    )
    place = table[0].index("judge")
    cells = {row[0]: row[place] for row in table[1:]}
    assert cells == {"sft": "–", "grpo": "1,200 requests, 3.5 USD"}
    assert browser.errors == []


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    page.resize(390, 844, phone=True)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.prefer("light")


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_place_that_cannot_be_written_is_one_line(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = [str(run)] * (1 if command == "report" else 2)
    for out, words in {
        tmp_path / "none" / "x.html": "No such file or directory",
        Path("/proc/x.html"): "cannot be written",
        tmp_path: "a folder",
    }.items():
        assert main([command, *runs, "--out", str(out)]) == 2
        line = capsys.readouterr().err
        assert f"{out}: " in line
        assert words in line
        assert len(line.splitlines()) == 1
