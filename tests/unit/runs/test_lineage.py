"""Lineage: each thing that a stage was made from is named when it changes, and nothing else is."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from r1pipe.cli.main import main
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.context import StageContext
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.runs.folder import RunFolder
from r1pipe.runs.verify import verify_run, verify_stage

ROOT = Path(__file__).parents[3]
REWARD = "def mine(completions, answer, **columns):\n    return [1.0 for _ in completions]\n"
RECIPE = """
def load(split="train", *, rows="rows.txt"):
    for number, answer in enumerate(open(rows).read().split()):
        prompt = [{"role": "user", "content": f"What is {answer}?"}]
        yield {"id": f"{split}-{number}", "kind": "math", "prompt": prompt, "answer": answer}
"""
LOSS = "from r1pipe.rl.losses import LossType, clip_tokens\nLOSS = LossType(clip_tokens)\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of a user's own: data, a reward, a student from elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("myreward.py").write_text(REWARD)
    Path("mydata.py").write_text(RECIPE)
    Path("rows.txt").write_text("1 2 3")
    Path("student").mkdir()
    Path("student/config.json").write_text("{}")
    Path("student/model.safetensors").write_bytes(b"student")
    values = {
        "name": "mine",
        "stages": [
            {
                "kind": "init",
                "model": {"model_type": "qwen3"},
                "tokenizer": {"data": {"recipe": "mydata.py"}},
            },
            {
                "kind": "grpo",
                "from": "init",
                "data": {"recipe": "mydata.py"},
                "rewards": [{"function": "myreward.mine"}],
                "max_steps": 1,
                "prompts_per_step": 1,
                "num_generations": 2,
                "max_completion_length": 8,
            },
            {
                "kind": "distill",
                "from": "grpo",
                "student": str(tmp_path / "student"),
                "data": {"recipe": "mydata.py", "options": {"rows": str(tmp_path / "rows.txt")}},
                "traces": {"num_generations": 1, "sampling": {"max_completion_length": 8}},
                "train": {"max_steps": 1},
            },
        ],
    }
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    yield tmp_path
    for name in ("myreward", "myloss"):
        sys.modules.pop(name, None)


def make_run(*overrides: str) -> tuple[Recipe, Path]:
    """Every stage begun, given its data and finished, its weights written by hand: what training
    makes of them is not the lineage's matter."""
    recipe = load_recipe("mine.yaml", list(overrides))
    with RunFolder(recipe) as run:
        for stage in recipe.stages:
            folder = run.begin(stage)
            context = StageContext(
                recipe, run, stage.name, folder, None, None, {}, None, (), ProblemSets(run.path)
            )
            if stage.training_sets():
                context.load_training_problems(stage)
            else:
                context.load_problems(*stage.tokenizer.data)
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(b"weights of " + stage.name.encode())
            run.finish(stage, folder, {}, 1.0)
    return recipe, run.path


def list_findings(run: Path) -> list[str]:
    return [f"{stage}: {f.what}" for stage, findings in verify_run(run) for f in findings]


def read(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "lineage.json").read_text())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_nothing_has_changed(project: Path, capsys: pytest.CaptureFixture) -> None:
    _, run = make_run()
    assert list_findings(run) == []
    assert main(["verify", "mine"]) == 0
    assert capsys.readouterr().out == "ok  init\nok  grpo\nok  distill\n"


CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a checkpoint": (
        lambda run: flip(run / "distill/model.safetensors"),
        ["distill: model.safetensors changed"],
    ),
    "a file more": (
        lambda run: (run / "distill/notes.txt").write_text("x"),
        ["distill: notes.txt added"],
    ),
    "a file less": (
        lambda run: (run / "distill/config.json").unlink(),
        ["distill: config.json missing"],
    ),
    "the kept rows": (
        lambda run: flip(run / "distill/problems.jsonl"),
        ["distill: problems.jsonl changed"],
    ),
    "a parent's weights": (
        lambda run: flip(run / "grpo/model.safetensors"),
        [
            "grpo: model.safetensors changed",
            "distill: its parent grpo: model.safetensors changed since it was used",
        ],
    ),
    "a parent's lineage": (
        lambda run: flip(run / "grpo/lineage.json"),
        [
            "grpo: no lineage.json that can be read: what it was made from is unknown",
            "distill: its parent grpo: lineage.json changed since it was used",
        ],
    ),
    "a parent from elsewhere": (
        lambda run: flip(Path("student/model.safetensors")),
        ["distill: its parent .../student: model.safetensors changed since it was used"],
    ),
    "a parent from elsewhere that is gone": (
        lambda run: shutil.rmtree("student"),
        ["distill: its parent .../student: gone, so not compared"],
    ),
    "the reward's code": (
        lambda run: Path("myreward.py").write_text(REWARD.replace("1.0", "2.0")),
        ["grpo: code of its rewards: myreward.py changed since it was used"],
    ),
    "the data's recipe": (
        lambda run: Path("mydata.py").write_text(RECIPE.replace("What is", "How much is")),
        [
            f"{stage}: data recipe mydata.py: changed since it was used"
            for stage in ("init", "grpo", "distill")
        ],
    ),
    "the data behind the recipe": (
        lambda run: Path("rows.txt").write_text("1 2 4"),
        [
            f"{stage}: data recipe mydata.py: gives other rows than were used"
            for stage in ("init", "grpo", "distill")
        ],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_only_changes_are_named(case: str, project: Path, capsys: pytest.CaptureFixture) -> None:
    change, expected = CHANGES[case]
    _, run = make_run()
    change(run)
    found = list_findings(run)
    if case == "a parent's lineage":  # a byte flipped in JSON may leave it readable
        assert found[-1] == expected[-1]
    else:
        assert found == expected
    assert main(["verify", str(run)]) == (0 if case.endswith("gone") else 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines if line.startswith(("FAIL", "skip"))] == found


def test_parent_made_again_is_another_parent(project: Path) -> None:
    recipe, run = make_run()
    flip(run / "grpo/model.safetensors")
    with RunFolder(recipe) as folder:
        stage = recipe.stage("grpo")
        partial = folder.begin(stage)
        (partial / "model.safetensors").write_bytes(b"other weights")
        folder.finish(stage, partial, {}, 1.0)
    assert verify_stage(run / "grpo") == []
    assert [finding.what for finding in verify_stage(run / "distill")] == [
        "its parent grpo: config.json missing since it was used",
        "its parent grpo: model.safetensors changed since it was used",
    ]


def test_a_parent_is_not_read_again_unless_it_is_newer_than_its_lineage(project: Path) -> None:
    recipe, run = make_run()
    then = (run / "grpo/lineage.json").stat().st_mtime_ns
    weights = run / "grpo/model.safetensors"
    recorded = read(run, "grpo")["outputs"]["model.safetensors"]

    def start_again() -> str:
        with RunFolder(recipe) as folder:
            stage = recipe.stage("distill")
            folder.finish(stage, folder.begin(stage), {}, 1.0)
        return read(run, "distill")["inputs"]["checkpoints"][0]["files"]["model.safetensors"]

    flip(weights)
    os.utime(weights, ns=(then - 1, then - 1))  # as if it had not been touched
    assert start_again() == recorded
    os.utime(weights, ns=(then + 1, then + 1))
    assert start_again() != recorded


def test_processes_that_were_interrupted_are_kept(project: Path) -> None:
    """A stage that two processes made, the second with other reward code."""
    recipe = load_recipe("mine.yaml")
    stage = recipe.stage("grpo")
    for code in (REWARD, REWARD + "\n", REWARD):
        Path("myreward.py").write_text(code)
        with RunFolder(recipe) as run:
            folder = run.begin(stage)
            (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    with RunFolder(recipe) as run:
        run.begin(stage)
        run.finish(stage, folder, {}, 1.0)
    begun = [process["started"] for process in read(run.path, "grpo")["interrupted"]]
    assert len(begun) == 3
    assert find_problems(run.path / "grpo") == [
        f"code of its rewards: its part begun {begun[1]} had another myreward"
    ]
    with RunFolder(recipe) as run:
        run.finish(stage, run.begin(stage, redo=True), {}, 1.0)
    assert read(run.path, "grpo")["interrupted"] == []
    assert find_problems(run.path / "grpo") == []


def test_moved_reward_code_is_not_changed_code(project: Path) -> None:
    """Lineages from before `rewards/` was split into packages name modules that are gone."""
    _, run = make_run("stages.grpo.rewards=[{function: rewards.format}]")
    record = read(run, "grpo")
    record["inputs"]["code"] = {
        "rewards": {"rewards/__init__.py": "0", "rewards/mathematics.py": "1"}
    }
    record["git"] = {"commit": "7ca6fba8d0ca6d2a", "dirty": False}
    (run / "grpo/lineage.json").write_text(json.dumps(record))
    (finding,) = verify_stage(run / "grpo")
    assert not finding.is_problem
    assert re.fullmatch(
        r"code of its rewards not compared: the modules of rewards have moved since r1pipe "
        r"[\d.]+ \(7ca6fba8d0ca\)",
        finding.what,
    )
    del record["inputs"]["code"]["rewards"]["rewards/mathematics.py"]
    (run / "grpo/lineage.json").write_text(json.dumps(record))
    assert "code of its rewards: rewards/__init__.py changed since it was used" in find_problems(
        run / "grpo"
    )


def find_problems(folder: Path) -> list[str]:
    return [finding.what for finding in verify_stage(folder) if finding.is_problem]


def test_equal_runs_have_equal_inputs(project: Path) -> None:
    _, first = make_run()
    _, second = make_run("name=again")
    for stage in ("init", "grpo", "distill"):
        assert read(first, stage)["inputs"] == read(second, stage)["inputs"]
    _, third = make_run("name=other", "stages.distill.data.options={rows: rows.txt}")
    theirs = read(third, "distill")["inputs"]["data"][0]
    ours = read(first, "distill")["inputs"]["data"][0]
    assert theirs["sha256"] == ours["sha256"]  # the same rows by another way


def test_it_says_what_a_stage_was_made_from_and_not_where(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Path("myloss.py").write_text(LOSS)
    _, run = make_run("seed=7", "stages.grpo.beta=0.1", "stages.grpo.loss_type=myloss.LOSS")
    record = read(run, "grpo")
    assert record["seed"] == 7
    assert record["config"]["stage"]["beta"] == 0.1
    assert record["config"]["engine"]["max_num_seqs"] == 256
    names = ("myloss", "myreward")
    code = {name: {f"{name}.py": hash_of(f"{name}.py")} for name in names}
    assert record["inputs"]["code"] == code
    assert record["inputs"]["data"][0]["rows"] == 3
    assert record["parents"] == {"init": hash_of(run / "init/lineage.json")}
    assert record["packages"]["torch"].startswith("2.")
    assert record["machine"]["cores"] >= 1
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert (record["git"] or {"commit": ""})["commit"] == commit
    for stage in ("init", "grpo", "distill"):
        text = (run / stage / "lineage.json").read_text()
        assert str(project) not in text
        assert str(ROOT) not in text
        assert "hf_secret" not in text
        assert os.uname().nodename not in text


def hash_of(path: str | Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]


def test_a_run_that_is_not_there(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", "nothing"]) == 2
    assert "nothing: no such run" in capsys.readouterr().err
