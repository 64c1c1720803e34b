"""A kind of stage that this file alone adds: its settings, its `run`, and what the others ask."""

import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from r1pipe.cli.main import main
from r1pipe.config.base import STAGE_TYPES, ProblemSet, Stage
from r1pipe.context import StageContext
from r1pipe.runs.reader import find_stages

RECIPE = """
name: new
device: cpu
stages:
  - {kind: count, data: {recipe: arithmetic, options: {size: 20}}, least: 3}
"""


@pytest.fixture(scope="module")
def kind() -> Any:
    class Count(Stage):
        """Counts the problems whose answer is not below `least`."""

        kind: Literal["count"]
        data: ProblemSet
        least: int = 0

        module = __name__
        makes_checkpoint = False

        def problem_sets(self) -> list[ProblemSet]:
            return [self.data]

    yield Count
    del STAGE_TYPES["count"]


def run(stage: Any, context: StageContext) -> dict[str, int]:
    problems = context.load_problems(stage.data)
    return {"counted": sum(int(problem.answer) >= stage.least for problem in problems)}


def test_it_runs(kind: type[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r1pipe"])
    Path("new.yaml").write_text(RECIPE)
    assert main(["doctor", "new.yaml"]) == 0
    assert main(["run", "new.yaml"]) == 0
    (stage,) = find_stages(Path("runs/new"))
    assert 0 < stage.record["counted"] <= 20
    assert (stage.section, stage.parents) == (kind(kind="count", **stage_values()), [])
    assert main(["run", "new.yaml"]) == 0, "finished before"
    assert main(["verify", "runs/new"]) == 0
    assert main(["run", "new.yaml", "--set", "stages.count.leats=4"]) == 2


def stage_values() -> dict[str, Any]:
    data = {"recipe": "arithmetic", "options": {"size": 20}}
    return {"name": "count", "data": data, "least": 3}
