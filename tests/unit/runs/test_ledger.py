"""What a run costs: attempts that were killed, steps done twice, money per point."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from grpo_settings import make_grpo

from r1pipe.config.base import Stage
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.config.sft import Sft
from r1pipe.config.traces import Distill
from r1pipe.report.costs import describe_costs, find_gains
from r1pipe.runs import ledger
from r1pipe.runs.ledger import Hardware, Ledger, find_idle_seconds, summarize_run
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_jsonl

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
STEP = 1.0


class Clock:
    """The ledger's own: it stands still but for `work` and `rest`, in forked processes too, so a
    busy machine changes no figure."""

    def __init__(self):
        self.now = multiprocessing.get_context("fork").Value("d", 1e9)

    def time(self) -> float:
        return self.now.value

    monotonic = time

    def rest(self, seconds: float) -> None:
        self.now.value += seconds

    def work(self, seconds: float, journal: Path) -> None:
        """Until the run has given a sign of life."""
        self.rest(seconds)
        deadline = time.monotonic() + 60
        while journal.stat().st_mtime != self.now.value:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.001)


clock = Clock()


@pytest.fixture(autouse=True)
def clock_and_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times = os.utime

    def touch(path: Path, times: None = None, *, ns: tuple[int, int] | None = None) -> None:
        set_times(path, **({"ns": ns} if ns else {"times": (clock.time(), clock.time())}))

    monkeypatch.setattr(ledger, "SECONDS_BETWEEN_TOUCHES", 0.01)
    monkeypatch.setattr(ledger, "time", clock)
    monkeypatch.setattr(os, "utime", touch)


def make_recipe(*overrides: str) -> Recipe:
    return load_recipe(DEMO, ["price_per_device_hour=2.0", *overrides])


def test_a_fleet_has_gpus_beside_the_trainers() -> None:
    for overrides, count in ((("sampler.engines=3",), 4), ((), 2)):
        fleet = make_recipe("sampler.kind=fleet", *overrides)
        assert Hardware.here(fleet, "cuda") == Hardware("GPU", count)
    assert Hardware.here(make_recipe(), "cuda") == Hardware("GPU", 1)


def spend(run_dir: Path, steps: range, finish: bool = True, recipe: Recipe | None = None) -> None:
    """An attempt at the grpo stage; without `finish` the process dies in the middle of a step."""
    account = Ledger(run_dir, recipe or make_recipe(), Hardware("GPU", 4))
    with account.stage("grpo"):
        for step in steps:
            clock.work(STEP, run_dir / "ledger.jsonl")
            account.note_step({"step": step, "tokens_sampled": 10, "tokens_trained": 30})
        if not finish:
            clock.work(3 * STEP, run_dir / "ledger.jsonl")
            os._exit(9)
        folder = run_dir / "grpo"
        folder.mkdir(exist_ok=True)
        account.finish({}, folder)


def kill(run_dir: Path, steps: range) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=spend, args=(run_dir, steps, False)
    )
    process.start()
    process.join()
    assert process.exitcode == 9


def test_killed_attempts_count_and_steps_done_twice_are_lost(tmp_path: Path) -> None:
    kill(tmp_path, range(1, 7))
    (running,) = summarize_run(tmp_path)
    assert running["outcome"] == "running"
    # Six steps, and the three that the seventh took before the end.
    assert running["wall_s"] == 9 * STEP
    clock.rest(4 * STEP)  # which nobody pays for
    spend(tmp_path, range(3, 9))
    (cost,) = summarize_run(tmp_path)
    assert (cost["attempts"], cost["outcome"], cost["steps"]) == (2, "finished", 8)
    assert cost["wall_s"] == 15 * STEP
    # Steps 3 to 6 of the first attempt, and its unfinished one.
    assert cost["lost_s"] == 7 * STEP
    assert cost["device_hours"] == pytest.approx(4 * cost["wall_s"] / 3600, abs=1e-4)
    assert cost["cost"] == pytest.approx(2 * cost["device_hours"], abs=1e-4)
    assert (cost["tokens_sampled"], cost["tokens_trained"]) == (120, 360)
    kept = [row["step"] for _, row in read_jsonl(tmp_path / "grpo" / "ledger.jsonl")]
    assert kept == list(range(1, 9))
    assert json.loads((tmp_path / "grpo" / "ledger.json").read_text()) == cost
    assert json.loads((tmp_path / "ledger.json").read_text()) == [cost]


def test_a_stage_made_again_has_lost_all_of_the_first_time(tmp_path: Path) -> None:
    spend(tmp_path, range(1, 5))
    first = summarize_run(tmp_path)[0]
    assert first["lost_s"] == 0
    spend(tmp_path, range(1, 3))
    cost = summarize_run(tmp_path)[0]
    assert (cost["attempts"], cost["steps"]) == (2, 2)
    assert cost["lost_s"] == first["wall_s"]


def test_what_judges_cost_is_that_of_all_attempts(tmp_path: Path) -> None:
    """They count it themselves, also for killed attempts: the last figure is the sum."""
    spent = {"requests": 5, "prompt_tokens": 7000, "completion_tokens": 90, "cost": 0.25}
    for count in (5, 1200):
        account = Ledger(tmp_path, make_recipe(), Hardware("GPU", 4))
        with account.stage("grpo", lambda count=count: {**spent, "requests": count}):
            pass
    (cost,) = summarize_run(tmp_path)
    assert cost["judge"] == {**spent, "requests": 1200}
    assert (
        "judge of grpo, not in the table: 1,200 requests, 7,000 tokens read and 90 written, "
        "0.25 USD"
    ) in describe_costs(tmp_path)


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    spend(tmp_path, range(1, 3))
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')
    spend(tmp_path, range(1, 3))
    assert summarize_run(tmp_path)[0]["attempts"] == 2


def test_without_a_price_there_is_no_cost(tmp_path: Path) -> None:
    spend(tmp_path, range(1, 3), recipe=make_recipe("price_per_device_hour=null"))
    assert summarize_run(tmp_path)[0]["cost"] is None
    assert "no price_per_device_hour" in describe_costs(tmp_path)


def test_progress_names_the_whole_of_the_cost(tmp_path: Path) -> None:
    kill(tmp_path, range(1, 3))
    account = Ledger(tmp_path, make_recipe(), Hardware("GPU", 4))
    with account.stage("grpo"):
        assert account.project(3600 - 5 * STEP).startswith("0.00556 of")
        assert account.project(3600 - 5 * STEP).endswith("of about 4 GPU-hours (8.00 USD)")


# (phases of a step of 10 s, seconds in which the device does nothing)
PHASES = {
    "colocated": ({"wait": 6, "sample": 5.5, "score": 0.25}, 0.5),
    "sampled beside the training": ({"wait": 3, "sample": 9, "score": 0.25, "late": 1}, 0.25),
    "all of it waited for": ({"wait": 0.1, "sample": 9, "score": 0.25, "late": 1}, 0.1),
    "not measured": ({}, None),
}


@pytest.mark.parametrize("case", PHASES)
def test_idle_time(case: str) -> None:
    phases, expected = PHASES[case]
    metrics = {f"seconds/{name}": value for name, value in phases.items()}
    assert find_idle_seconds({**metrics, "staleness/max": phases.get("late", 0)}) == expected
    if "late" in phases:  # nor where weights have changed while it was sampled
        assert (
            find_idle_seconds({**metrics, "staleness/max": 0, "staleness/tokens": [8]}) == expected
        )


def test_idle_shares_are_averaged_over_time(tmp_path: Path) -> None:
    account = Ledger(tmp_path, make_recipe(), Hardware("core", 2))
    with account.stage("grpo"):
        account.note_step({"step": 1, "seconds/step": 1.0, "idle/trainer": 0.5, "idle/engine_0": 0})
        clock.rest(3)
        account.note_step({"step": 2, "idle/trainer": 0.1, "idle/engine_0": 0.4})
    assert summarize_run(tmp_path)[0]["idle"] == {"engine_0": 0.3, "trainer": 0.2}


def test_staleness_is_averaged_over_the_steps_that_have_one(tmp_path: Path) -> None:
    account = Ledger(tmp_path, make_recipe(), Hardware("core", 2))
    with account.stage("grpo"):
        for step, behind in enumerate((0, 1.5), 1):
            account.note_step({"step": step, "staleness/mean": behind})
    with account.stage("sft"):
        account.note_step({"step": 1})
    assert [stage["staleness"] for stage in summarize_run(tmp_path)] == [0.75, None]


def test_tokens_that_no_step_has_logged_are_the_record_s(tmp_path: Path) -> None:
    account = Ledger(tmp_path, make_recipe(), Hardware("core", 2))
    with account.stage("distill"):
        account.note_step({"step": 5, "tokens_trained": 70})
        account.note_step({"step": 10, "tokens_trained": 60})
        (tmp_path / "distill").mkdir()
        account.finish({"tokens_sampled": 900}, tmp_path / "distill")
    cost = summarize_run(tmp_path)[0]
    assert (cost["tokens_sampled"], cost["tokens_trained"]) == (900, 130)


def write_stage(run_dir: Path, stage: Stage) -> None:
    (run_dir / stage.kind).mkdir(exist_ok=True)
    record = {"kind": stage.kind, "settings": stage.model_dump(mode="json", by_alias=True)}
    (run_dir / stage.kind / "stage.json").write_text(json.dumps(record))


def make_sft(source: str) -> Sft:
    train = {"max_steps": 1}
    return Sft(kind="sft", from_=source, data=[{"recipe": "arithmetic"}], train=train)


def test_points_are_over_the_checkpoint_that_a_stage_starts_from(tmp_path: Path) -> None:
    write_stage(tmp_path, make_sft("hub/base"))
    write_stage(tmp_path, make_grpo(**{"from": "sft"}))
    traces = {"num_generations": 1, "sampling": {"max_completion_length": 8}}
    student = {"model_type": "x"}
    data, train = [{"recipe": "arithmetic"}], {"max_steps": 1}
    write_stage(
        tmp_path,
        Distill(
            kind="distill", from_="grpo", data=data, traces=traces, train=train, student=student
        ),
    )
    accuracy = {"hub/base": 0.1, "sft": 0.5, "grpo": 0.45, "distill": 0.9}
    entries = [
        {"stage": name, "dataset": label, "pass_at_1": value - other}
        for label, other in (("first", 0.0), ("second", 0.1))
        for name, value in accuracy.items()
    ]
    (tmp_path / "summary.json").write_text(json.dumps(entries))
    gains = find_gains(tmp_path, ["sft", "grpo", "distill"])
    # Of a student from random weights there is no accuracy before.
    assert gains == pytest.approx({"sft": 40.0, "grpo": -5.0, "": 80.0})


def test_table(tmp_path: Path) -> None:
    spend(tmp_path, range(1, 3))
    write_stage(tmp_path, make_grpo(**{"from": "sft"}))
    entries = [
        {"stage": name, "dataset": "arithmetic/test", "pass_at_1": accuracy}
        for name, accuracy in (("sft", 0.5), ("grpo", 0.75))
    ]
    (tmp_path / "summary.json").write_text(json.dumps(entries))
    cost = summarize_run(tmp_path)[0]
    text = describe_costs(tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| grpo"))
    assert "| +25.0" in row
    assert f"{cost['cost'] / 25:.2g} USD |" in row
    assert "147K H800 GPU-hours, USD 294K at 2 an hour" in text
    assert "not measured here" in text


def test_cost_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        describe_costs(tmp_path)


def test_ledgers_with_energy_still_open(tmp_path: Path) -> None:
    """Older runs noted joules, or null."""
    rows = [
        {"event": "begin", "time": 0, "stage": "sft", "unit": "core", "devices": 2}
        | {"price_per_device_hour": 1.0, "currency": "USD"},
        {"event": "step", "step": 1, "wall_s": 1.0, "idle_s": None, "energy_j": None}
        | {"tokens_sampled": 0, "tokens_trained": 70},
        {"event": "end", "outcome": "finished", "wall_s": 2.0, "energy_j": 5.0}
        | {"tokens_sampled": 0, "tokens_trained": 0},
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| sft   | 2 s" in describe_costs(tmp_path)
