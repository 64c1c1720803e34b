"""Trackers: TensorBoard's own event files, the others where their packages are; their failures."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.doctor.recipe import examine_tracking
from r1pipe.runs.tracking import Tracking, check_tracking, describe_settings
from r1pipe.utils.errors import UserError

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
ROWS = [
    {"step": 5, "reward": 0.25, "rewards/rewards.math_correct/mean": 0.5, "loss": float("nan")},
    {"step": 10, "reward": 0.75, "rewards/rewards.math_correct/mean": 1.0, "loss": 0.125},
]


def make_recipe(runs: Path, *trackers: str) -> Recipe:
    return load_recipe(DEMO, [f"runs_dir={runs}", f"tracking=[{', '.join(trackers)}]"])


def track(recipe: Recipe, rows: list[dict]) -> None:
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    with Tracking(recipe, recipe.stage("grpo")) as tracking:
        for row in rows:
            tracking.log(row)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = make_recipe(tmp_path, "tensorboard")
    track(recipe, ROWS)
    events = read_events(recipe.run_dir / "tensorboard" / "grpo")
    assert events == {
        "reward": [(5, 0.25), (10, 0.75)],
        "rewards/rewards.math_correct/mean": [(5, 0.5), (10, 1.0)],
        "loss": [(10, 0.125)],
    }
    (settings,) = (recipe.run_dir / "tensorboard").rglob("hparams.yml")
    assert "stage.learning_rate: 0.00015" in settings.read_text()


def test_tensorboard_after_a_resume(tmp_path: Path) -> None:
    """Steps that are made again take the place of the old ones."""
    pytest.importorskip("tensorboard")
    recipe = make_recipe(tmp_path, "tensorboard")
    track(recipe, [{"step": step, "reward": 0.0} for step in range(1, 6)])
    track(recipe, [{"step": step, "reward": 1.0} for step in range(4, 7)])
    events = read_events(recipe.run_dir / "tensorboard" / "grpo")
    assert events["reward"] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def run_tracked(recipe_runs: Path, tracker: str, **environment: str) -> str:
    """In a process of its own: these packages start threads and servers that outlive a test."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from test_tracking import *; track(make_recipe(Path(sys.argv[2]), sys.argv[3]), ROWS)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(recipe_runs), tracker],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "continues without" not in result.stderr, result.stderr[-3000:]
    return result.stderr


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_tracked(tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = tmp_path.rglob("run-*.wandb")
    content = file.read_bytes()
    for word in (b"demo-grpo", b"r1pipe", b"rewards/rewards.math_correct/mean", b"0.75"):
        assert word in content


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    run_tracked(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    (file,) = (tmp_path / "trackio").glob("r1pipe*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)["reward"]) for step, metrics in rows] == [
        (5, 0.25),
        (10, 0.75),
    ]


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_tracked(tmp_path, "mlflow", MLFLOW_TRACKING_URI=uri)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        query = "select step, value from metrics where key = 'reward' order by step"
        assert database.execute(query).fetchall() == [(5, 0.25), (10, 0.75)]
        names = [name for (name,) in database.execute("select name from runs")]
        keys = {key for (key,) in database.execute("select key from params")}
    assert names == ["demo-grpo"]
    assert {"seed", "engine.max_num_seqs", "stage.learning_rate"} < keys


def test_a_missing_package_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'trackio is not installed: pip install "r1pipe\[trackio\]"'
    ):
        check_tracking(make_recipe(tmp_path, "trackio"))
    assert examine_tracking(make_recipe(tmp_path, "trackio")).status == "FAIL"


def test_a_tracker_that_fails_is_dropped_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class FallsSilent(LOGGER_TYPE_TO_CLASS["tensorboard"]):
        """At its second row, as when the network goes."""

        def __init__(self, project: str, **options: object):
            super().__init__("other", tmp_path)

        def log(self, values: dict, step: int | None = None, **options: object) -> None:
            if step == 10:
                raise ConnectionError("no route to host\nand a long story")
            super().log(values, step, **options)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", FallsSilent)
    recipe = make_recipe(tmp_path, "wandb", "tensorboard")
    track(recipe, [*ROWS, {"step": 15, "reward": 1.0}])
    assert read_events(tmp_path / "other")["reward"] == [(5, 0.25)]
    events = read_events(recipe.run_dir / "tensorboard" / "grpo")
    assert events["reward"] == [(5, 0.25), (10, 0.75), (15, 1.0)]
    told = capsys.readouterr().err
    assert told.count("continues without wandb: no route to host") == 1
    assert "long story" not in told


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    track(recipe, ROWS)
    assert list(recipe.run_dir.iterdir()) == []


def test_settings_are_flat(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    settings = describe_settings(recipe, recipe.stage("sft"))
    assert settings["stage.train.learning_rate"] == 3e-3
    assert settings["engine.max_num_seqs"] == 512
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())
