"""A student that learns on its own samples, through the command line: it comes nearer to its
teacher, a run that was killed ends with the same weights, and another vocabulary is refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import read_lines, run, run_and_kill
from test_resume import assert_equal

from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.rollout.store import read_rollouts

STAGE = "on_policy_distill"
STEPS, PROMPTS = 6, 16


@pytest.fixture(scope="module")
def recipe(finished: tuple, tiny_recipe: Path) -> Path:
    """From the finished run's policy and its student, which is dense, to a student in a run of its
    own; no rewards."""
    run_dir, _ = finished
    values = yaml.safe_load(tiny_recipe.read_text())
    values["name"] = "taught"
    values["stages"] = [
        {
            "kind": STAGE,
            "from": str(run_dir / "sft"),
            "student": str(run_dir / "distill"),
            "data": {"recipe": "arithmetic", "options": {"size": 60, "seed": 4}},
            "max_steps": STEPS,
            "prompts_per_step": PROMPTS,
            "num_generations": 2,
            "max_completion_length": 16,
            "steps_per_generation": 2,
            "learning_rate": 3e-3,
            "verify_sync": True,
        }
    ]
    path = tiny_recipe.with_name("taught.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def taught(recipe: Path) -> Path:
    """The folder of the run."""
    result = run(STAGE, recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    return recipe.parent / "runs" / "taught"


def test_the_student_comes_nearer_to_its_teacher(taught: Path) -> None:
    rows = read_lines(taught / STAGE / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert rows[-1]["divergence"] < 0.85 * rows[0]["divergence"]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert not [name for row in rows for name in row if "reward" in name]


def test_sampler_and_trainer_agree(taught: Path) -> None:
    for row in read_lines(taught / STAGE / "metrics.jsonl"):
        assert row["sampler/logprob_diff_mean"] <= 1e-4
        assert row["sync/logprob_diff_mean"] <= 1e-4
    record = json.loads((taught / STAGE / "stage.json").read_text())
    assert record["last_sync/logprob_diff_mean"] <= 1e-4
    assert record["optimizer_steps"] == STEPS


def test_what_the_run_shows(taught: Path) -> None:
    """Rollouts, cost, lineage, report: as of grpo."""
    rollouts = list(read_rollouts(taught / STAGE))
    assert len(rollouts) == STEPS * PROMPTS * 2
    assert rollouts[0]["rewards"] == {}
    shown = run("rollouts", taught, "--step", 2)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("completion:") == PROMPTS * 2
    cost = json.loads((taught / STAGE / "ledger.json").read_text())
    metrics = read_lines(taught / STAGE / "metrics.jsonl")
    assert cost["tokens_sampled"] == sum(row["tokens_sampled"] for row in metrics) > 0
    assert cost["tokens_trained"] == sum(row["tokens_trained"] for row in metrics) > 0
    assert run("verify", taught).stdout == f"ok  {STAGE}\n"
    lineage = json.loads((taught / STAGE / "lineage.json").read_text())
    names = [Path(entry["name"]).name for entry in lineage["inputs"]["checkpoints"]]
    assert names == ["sft", "distill"]
    result = run("report", taught, "--out", taught.with_suffix(".html"))
    assert result.returncode == 0, result.stderr
    assert '"divergence"' in taught.with_suffix(".html").read_text()


def kill_and_resume(made: Path, recipe: Path, step: int) -> None:
    """The stage once more, killed in the update after `step`: it ends as in the run `made`."""
    killed = made.with_name(f"{made.name}-killed")
    more = ("--set", f"name={killed.name}", "--set", f"stages.{STAGE}.save_steps=1")
    run_and_kill("updating", step, 0.01, killed / f".{STAGE}.partial", STAGE, recipe, *more)
    result = run(STAGE, recipe, *more)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"resumes after step {step}" in result.stderr
    assert_equal(made / STAGE, killed / STAGE)


@pytest.mark.slow
def test_a_killed_stage_resumes_bit_equal(taught: Path, recipe: Path) -> None:
    kill_and_resume(taught, recipe, 2)


@pytest.mark.slow
def test_replayed_rollouts_give_the_same_losses_and_weights(taught: Path, recipe: Path) -> None:
    """Bit by bit, without a sampler."""
    result = run(STAGE, recipe, "--replay", f"1:{STEPS}")
    assert result.returncode == 0, result.stderr[-3000:]
    both = [taught / name for name in (STAGE, f"{STAGE}-replay")]
    original, replayed = (
        [row["divergence"] for row in read_lines(folder / "metrics.jsonl")] for folder in both
    )
    assert replayed == original
    weights = [(folder / "model.safetensors").read_bytes() for folder in both]
    assert weights[0] == weights[1]
    shutil.rmtree(both[1])


@pytest.mark.parametrize("options", [[], ["--skip-doctor"]])
def test_another_vocabulary_is_refused(
    options: list[str], finished: tuple, recipe: Path, tmp_path: Path
) -> None:
    """In one line, before vLLM is started, by the doctor and by the stage."""
    run_dir, _ = finished
    student = shutil.copytree(run_dir / "distill", tmp_path / "student")
    build_tokenizer(["What else is there? 1 + 1 = 2"], 330).save_pretrained(student)
    change = ("--set", "name=other", "--set", f"stages.{STAGE}.student={student}")
    result = run(STAGE, recipe, *change, *options)
    assert result.returncode == 2, result.stderr[-3000:]
    line = result.stderr.splitlines()[-1]
    assert line.startswith("r1pipe: ")
    assert "have not the same vocabulary" in line
    assert "by a distill stage" in line
    assert "Traceback" not in result.stderr
    assert not list((recipe.parent / "runs" / "other").glob(f"*{STAGE}*"))


@pytest.fixture(scope="module")
def merging(finished: tuple, recipe: Path) -> Path:
    """The same stage with two teachers of the finished run, by the problems' category."""
    run_dir, _ = finished
    values = yaml.safe_load(recipe.read_text())
    values["name"] = "merged"
    [stage] = values["stages"]
    del stage["from"]
    teachers = {"2 steps": "sft", "3 steps": "grpo", "4 steps": "sft"}
    stage["teachers"] = {value: str(run_dir / name) for value, name in teachers.items()}
    stage |= {"teacher_field": "category", "max_steps": 2}
    path = recipe.with_name("merged.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.slow
def test_two_teachers_of_one_student(merging: Path) -> None:
    """Each step's divergence is that of all tokens and of each value's; a killed run resumes, and
    rollouts are replayed, bit by bit. All teachers are in the lineage."""
    result = run(STAGE, merging)
    assert result.returncode == 0, result.stderr[-3000:]
    merged = merging.parent / "runs" / "merged"
    rows = read_lines(merged / STAGE / "metrics.jsonl")
    for row in rows:
        parts = [value for name, value in row.items() if name.startswith("divergence/")]
        assert len(parts) >= 2
        assert min(parts) < row["divergence"] < max(parts)
    lineage = json.loads((merged / STAGE / "lineage.json").read_text())
    names = [Path(entry["name"]).name for entry in lineage["inputs"]["checkpoints"]]
    assert names == ["sft", "grpo", "distill"]
    assert run("verify", merged).stdout == f"ok  {STAGE}\n"

    kill_and_resume(merged, merging, 1)

    result = run(STAGE, merging, "--replay", "1:2")
    assert result.returncode == 0, result.stderr[-3000:]
    replay = merged / f"{STAGE}-replay"
    again = read_lines(replay / "metrics.jsonl")
    assert [row["divergence"] for row in again] == [row["divergence"] for row in rows]
    weights = [(merged / name / "model.safetensors").read_bytes() for name in (STAGE, replay.name)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [[], ["--skip-doctor"]])
def test_a_row_that_nobody_teaches_is_refused(options: list[str], merging: Path) -> None:
    """In one line, before vLLM is started, by the doctor and by the stage."""
    teacher = yaml.safe_load(merging.read_text())["stages"][0]["teachers"]["2 steps"]
    only = f"stages.{STAGE}.teachers={{2 steps: {teacher}}}"
    result = run(STAGE, merging, "--set", "name=other", "--set", only, *options)
    assert result.returncode == 2, result.stderr[-3000:]
    line = result.stderr.splitlines()[-1]
    assert "no teacher for category" in line
    assert "teachers has 2 steps:" in line
    assert "Traceback" not in result.stderr
    assert not list((merging.parent / "runs" / "other").glob(f"*{STAGE}*"))
