"""The recipe end to end through the command line, with real vLLM; then what can go wrong."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import read_lines, run, start, wait_for
from transformers import AutoModelForCausalLM

from r1pipe.rollout.store import read_rollouts

SUMMARY_KEYS = {
    "stage", "checkpoint", "dataset", "num_problems", "num_samples", "temperature", "pass_at_1",
    "ci_low", "ci_high", "pass_at_k", "pass_at", "maj_at_k", "format_rate", "mean_tokens",
    "truncated", "unjudged", "by_category", "by_length", "compared_with", "wall_s",
}  # fmt: skip
KEPT = ("grpo/rollouts/step_000001.parquet", "grpo/rollouts/step_000002.parquet")


def test_summary(finished: tuple) -> None:
    folder, result = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["stage"] for entry in summary] == ["random", "sft", "grpo", "distill"]
    for entry in summary:
        assert set(entry) >= SUMMARY_KEYS
        assert (entry["num_problems"], entry["num_samples"], entry["overlap"]) == (10, 2, 0.0)
        assert entry["ci_low"] <= entry["pass_at_1"] <= entry["ci_high"]
        assert entry["pass_at_1"] <= entry["pass_at_k"]
        assert entry["wall_s"] > 0
        assert Path(entry["checkpoint"]).is_dir()
        assert f"| {entry['stage']}" in result.stdout
        assert sum(row["num_problems"] for row in entry["by_category"]) == 10
        assert sum(row["samples"] for row in entry["by_length"]) == 20
    assert "10 problems x 2 samples, T = 0.6" in result.stdout
    pairs = [entry["compared_with"] for entry in summary]
    assert [pair and pair["stage"] for pair in pairs] == [None, "random", "sft", "grpo"]
    assert pairs[1]["difference"] == pytest.approx(
        summary[1]["pass_at_1"] - summary[0]["pass_at_1"], abs=2e-4
    )
    report = (folder / "summary.md").read_text()
    assert "## pass@1 by category" in report
    table, costs = result.stdout.split("\n| stage ")
    assert table.strip() in report
    assert "\n| grpo " in costs
    assert "147K H800 GPU-hours" in costs
    assert len(read_lines(folder / "eval" / "results.jsonl")) == 4 * 10
    assert not (folder / "eval" / "journal").exists()
    samples = read_lines(folder / "eval" / "samples_1.jsonl")
    rate = sum(s["rewards"]["rewards.math_correct"] for s in samples) / len(samples)
    assert rate == pytest.approx(summary[0]["pass_at_1"], abs=1e-4)


def test_any_checkpoint_is_evaluated_as_the_recipe_says(
    finished: tuple, tiny_recipe: Path, tmp_path: Path
) -> None:
    """A copy of a stage's checkpoint, elsewhere: the same samples, so no difference at all."""
    folder, _ = finished
    summary = (folder / "summary.json").read_bytes()
    copy = shutil.copytree(folder / "sft", tmp_path / "a model")
    for again in (False, True):
        result = run("eval", tiny_recipe, "--compare", "sft", copy)
        assert result.returncode == 0, result.stderr[-3000:]
        rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
        assert [row[0].strip("| ") for row in rows] == ["checkpoint", "sft", str(copy)]
        assert rows[1][1:3] == rows[2][1:3]
        assert rows[2][3].startswith("+0.0 (")
        assert ("20/20" in result.stderr) is not again
    (single,) = folder.glob("eval-a-model-*")
    samples = read_lines(single / "samples_1.jsonl")
    assert samples == read_lines(folder / "eval" / "samples_2.jsonl")
    assert (folder / "summary.json").read_bytes() == summary
    shutil.rmtree(single)


def test_curves_are_pictures(finished: tuple) -> None:
    folder, _ = finished
    for name in ("curves.png", "experts.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_expert_load_is_logged_where_experts_are_trained(finished: tuple) -> None:
    folder, _ = finished
    for stage in ("sft", "grpo"):
        for row in read_lines(folder / stage / "metrics.jsonl"):
            assert 0 < row["experts/entropy"] <= 1
            assert row["experts/layer_1/max_violation"] >= 0
    assert "experts/entropy" not in read_lines(folder / "distill" / "metrics.jsonl")[0]


def test_sampler_and_trainer_agree_at_each_step_and_after_the_last_sync(finished: tuple) -> None:
    folder, _ = finished
    metrics = read_lines(folder / "grpo" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["sampler/logprob_diff_mean"] <= 1e-4 for row in metrics)
    assert all(row["sync/logprob_diff_mean"] <= 1e-4 for row in metrics)
    record = json.loads((folder / "grpo" / "stage.json").read_text())
    assert record["last_sync/logprob_diff_mean"] <= 1e-4
    # The optimizer moved: otherwise the sync would have nothing to show.
    assert all(row["grad_norm"] > 0 for row in metrics)


def test_rollouts_are_kept(finished: tuple) -> None:
    folder, _ = finished
    shown = run("rollouts", folder, "--step", 2, "--best", 1)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("step 2, arithmetic-") == shown.stdout.count("completion:") == 1
    rollouts = list(read_rollouts(folder / "grpo"))
    assert len(rollouts) == 2 * 8 * 4
    for group in (rollouts[i : i + 4] for i in range(0, len(rollouts), 4)):
        assert len({row["problem_id"] for row in group}) == 1
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-2)


@pytest.mark.slow
def test_replayed_rollouts_give_the_same_losses_and_weights(
    finished: tuple, tiny_recipe: Path
) -> None:
    """Bit by bit, without vLLM; the stage itself stays as it is."""
    folder, _ = finished
    before = (folder / "grpo" / "stage.json").read_bytes()
    code = (
        "import sys; from r1pipe.cli.main import main; assert not main() + ('vllm' in sys.modules)"
    )
    process = start("grpo", tiny_recipe, "--replay", "1:2", program=("-c", code))
    result = process.communicate(timeout=1800)
    assert process.returncode == 0, result[1][-3000:]
    both = [read_lines(folder / name / "metrics.jsonl") for name in ("grpo", "grpo-replay")]
    keys = ("step", "loss", "grad_norm", "reward", "entropy", "learning_rate", "tokens_trained")
    keys = (*keys, "sampler/logprob_diff_mean", "sampler/logprob_diff_max", "experts/entropy")
    original, replayed = ([[row[key] for key in keys] for row in rows] for rows in both)
    assert replayed == original
    weights = [
        (folder / name / "model.safetensors").read_bytes() for name in ("grpo", "grpo-replay")
    ]
    assert weights[0] == weights[1]
    assert (folder / "grpo" / "stage.json").read_bytes() == before
    shutil.rmtree(folder / "grpo-replay")  # other tests look at the run's own stages


def test_training_never_sees_a_held_out_problem(finished: tuple) -> None:
    folder, result = finished
    heldout = {row["prompt"] for row in read_lines(folder / "eval" / "samples_1.jsonl")}
    for stage in ("sft", "grpo", "distill"):
        trained = {r["prompt"][0]["content"] for r in read_lines(folder / stage / "problems.jsonl")}
        assert not trained & heldout
        assert f"{stage}: " in result.stderr
    assert "dropped for overlap with 10 held-out ones" in result.stderr


def test_every_stage_leaves_a_whole_folder(finished: tuple) -> None:
    folder, _ = finished
    assert not list(folder.glob(".*.partial"))
    for stage in ("random", "sft", "grpo", "distill"):
        assert (folder / stage / "model.safetensors").exists()
        assert json.loads((folder / stage / "stage.json").read_text())["peak_memory_gib"] < 8


def test_lineage_of_every_stage_verifies(finished: tuple) -> None:
    folder, _ = finished
    result = run("verify", folder)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines() == [
        f"ok  {s}" for s in ("random", "sft", "grpo", "distill", "eval")
    ]
    heldout = json.loads((folder / "grpo" / "lineage.json").read_text())["inputs"]["data"][1]
    assert heldout["source"]["split"] == "test"


@pytest.mark.parametrize("stage", ["grpo", "distill"])
def test_a_stage_can_be_published(stage: str, finished: tuple) -> None:
    """It was evaluated, its lineage verifies, and what is written loads as it is."""
    folder, _ = finished
    result = run("publish", folder / stage, "--repo", "user/tiny", "--dry-run")
    assert result.returncode == 0, result.stderr[-3000:]
    published = folder / "publish" / stage
    model, loading = AutoModelForCausalLM.from_pretrained(
        published, dtype="float32", output_loading_info=True
    )
    assert not loading["missing_keys"]
    # transformers loads no prediction layer.
    layer = f"model.layers.{model.config.num_hidden_layers}."
    assert all(key.startswith(layer) for key in loading["unexpected_keys"])
    assert model.config.architectures[0] in ("DeepseekV3ForCausalLM", "Qwen3ForCausalLM")
    generation = json.loads((published / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.6, 0.95)
    card = (published / "README.md").read_text()
    assert f"| {stage} " in card
    assert "10 problems x 2 samples, T = 0.6" in card
    assert "- hours: core-hours, all attempts" in card


def test_doctor_of_a_finished_run(finished: tuple, tiny_recipe: Path, tmp_path: Path) -> None:
    """Everything can be looked at, the parity gate too; then a model that vLLM does not have."""
    folder, _ = finished
    result = run("doctor", tiny_recipe, "--parity")
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert not [line for line in lines if not line.startswith(("ok", "skipped  hub"))]
    parity = next(line for line in lines if "grpo: parity" in line)
    assert float(parity.rpartition(" ")[2]) < 1e-5
    model = tmp_path / "model"
    shutil.copytree(folder / "distill", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    result = run("doctor", tiny_recipe, "--set", f"stages.eval.checkpoints=[grpo, {model}]")
    assert result.returncode == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "vLLM cannot run the architecture Unheard" in failed[0]


def test_finished_stages_are_not_run_again(finished: tuple, tiny_recipe: Path) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    result = run("run", tiny_recipe)
    assert result.returncode == 0
    assert result.stderr.count("finished before") == 5
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    before.pop(folder / ".lock"), after.pop(folder / ".lock")
    assert after == before


@pytest.mark.slow
def test_same_seed_gives_the_same_weights(finished: tuple, tiny_recipe: Path) -> None:
    """A second run, one command per stage: bit-equal checkpoints and rollouts."""
    folder, _ = finished
    for command in ("init", "sft", "grpo"):
        result = run(command, tiny_recipe, "--set", "name=again")
        assert result.returncode == 0, result.stderr[-3000:]
    other = folder.parent / "again"
    assert len(KEPT) == len(list(folder.glob("grpo/rollouts/*")))
    for file in ("sft/model.safetensors", "grpo/model.safetensors", *KEPT):
        assert (other / file).read_bytes() == (folder / file).read_bytes(), file


@pytest.mark.slow
def test_interrupted_run_saves_its_step_and_goes_on(tiny_recipe: Path) -> None:
    name = ("--set", "name=interrupted", "--set", "stages.sft.train.max_steps=2000")
    folder = tiny_recipe.parent / "runs" / "interrupted"
    process = start("run", tiny_recipe, *name)
    metrics = folder / ".sft.partial" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_lines(metrics)) > 1)
    busy = run("sft", tiny_recipe, *name)
    assert busy.returncode == 2
    assert f"busy, process {process.pid}" in busy.stderr
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "interrupted; the same command resumes" in err
    assert "Traceback" not in err
    assert (folder / "random" / "stage.json").exists()
    assert not (folder / "sft").exists()
    saved = re.search(r"sft: step (\d+) is saved", err)
    assert saved
    assert int(saved[1]) > 1
    # Other settings must not go on from what these have learnt.
    result = run("sft", tiny_recipe, "--set", "name=interrupted")
    assert result.returncode == 2
    assert "interrupted with other settings (train." in result.stderr
    result = run("sft", tiny_recipe, "--set", "name=interrupted", "--redo")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "sft" / "model.safetensors").exists()


def rewrite(recipe: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    values = yaml.safe_load(recipe.read_text())
    change({s.get("name", s["kind"]): s for s in values["stages"]})
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


# (command, --set, words of the one line). The run is the finished one, or a new one by name.
USER_ERRORS = {
    "unknown key": (["run"], ["stages.grpo.beat=0.1"], ["stages.grpo.beat", "did you mean beta"]),
    "missing file": (["run"], ["name=new", "stages.grpo.data.recipe=none.py"], ["none.py"]),
    "missing reward": (
        ["run"],
        ["name=new", "stages.distill.traces.rewards=[{function: rewards.maths}]"],
        ["rewards.maths"],
    ),
    "predecessor": (["grpo"], ["name=new"], ['"sft", which has not run', "r1pipe sft"]),
    "other settings": (["run"], ["seed=5"], ["other settings (seed: 0, now 5)", "--redo random"]),
    "no such stage": (["run", "--redo", "rl"], [], ["--redo rl", "grpo"]),
    "replay of a step that is not kept": (
        ["grpo", "--replay", "9"],
        [],
        ["no rollouts of step 9", "1 to 2"],
    ),
    "replay of no step": (["grpo", "--replay", "2:1"], [], ["--replay 2:1", "such as 1:16"]),
    "no such kind": (["reject"], [], ["no reject stage"]),
    "prompt too long": (
        ["grpo", "--redo"],
        ["engine.max_model_len=64"],
        ["arithmetic-train", "do not fit the context of 64"],
    ),
    "parity gate": (
        ["grpo", "--redo"],
        ["stages.grpo.breaker.logprob_diff.limit=1e-12"],
        ["grpo, step 1: sampler and trainer disagree", "breaker.logprob_diff"],
    ),
    "divergence": (
        ["sft", "--redo"],
        ["stages.sft.train.learning_rate=1e30", "stages.sft.train.warmup_steps=0"],
        ["sft, step 2: loss, gradient", "NaN", "breaker.nonfinite"],
    ),
    "rewards that cannot judge": (
        ["grpo", "--redo"],
        ["stages.grpo.rewards=[{function: reward_of_tests.never_judges}]"],
        ["grpo, step 1", "could not judge 100%"],
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_user_errors_are_one_line_and_change_nothing(
    case: str, finished: tuple, tiny_recipe: Path
) -> None:
    folder, _ = finished
    command, overrides, words = USER_ERRORS[case]
    kept = (folder / "grpo" / "model.safetensors").read_bytes()
    options = [part for override in overrides for part in ("--set", override)]
    result = run(*command[:1], tiny_recipe, *command[1:], *options)
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("r1pipe: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in line
    assert (folder / "grpo" / "model.safetensors").read_bytes() == kept
    left = folder / f".{command[0]}.partial"
    assert list(folder.glob(".*.partial")) == ([left] if "breaker." in line else [])
    if "breaker." in line:  # to be looked at
        assert read_lines(left / "events.jsonl")[-1]["action"] == "stop"
        if command[0] == "grpo":
            assert line.endswith(f"r1pipe rollouts {left} --step 1")
            assert len(list(read_rollouts(left, [1]))) == 8 * 4
        shutil.rmtree(left)
    assert not (folder.parent / "new" / "random").exists()


def test_row_without_answer_is_named(tiny_recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"question": "1+1?", "solution": "1+1=2 #### 2", "answer": "2"}, {"question": "2+2?"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = rewrite(
        tiny_recipe,
        tmp_path,
        lambda stages: stages["sft"].update(
            data={"recipe": "gsm8k", "options": {"path": str(data)}}
        ),
    )
    result = run("check", changed)  # the older name of doctor --quick
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if "sft: data" in line]
    assert f"{data}: row 2" in line
    assert "answer" in line
