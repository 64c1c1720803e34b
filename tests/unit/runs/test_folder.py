"""The run folder: one writer, stages whole or not at all, changed settings noticed."""

import json
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.evals.plots import plot_curves
from r1pipe.evals.tables import describe_lengths, format_report
from r1pipe.runs.folder import RunFolder, find_steps
from r1pipe.runs.logs import MetricsLog, read_metrics
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_jsonl, write_jsonl

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"


def make_recipe(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(DEMO, [f"runs_dir={tmp_path}", *overrides])


def finish(run: RunFolder, name: str) -> None:
    stage = run.recipe.stage(name)
    partial = run.begin(stage)
    (partial / "weights").write_text("x")
    (partial / "adapter").mkdir()
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        (partial / name).touch(0o600)  # as safetensors does it
    run.finish(stage, partial, {"train_rows": 3}, 1.0)


def hold(recipe: Recipe, ready: object, done: object) -> None:
    with RunFolder(recipe):
        ready.set()
        done.wait(30)


def test_busy_folder_names_the_holder(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(recipe, ready, done))
    other.start()
    try:
        assert ready.wait(10)
        with pytest.raises(UserError, match=f"busy, process {other.pid}"), RunFolder(recipe):
            pass
    finally:
        done.set()
        other.join()
    with RunFolder(recipe):
        pass


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"), RunFolder(make_recipe(tmp_path)):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"), RunFolder(make_recipe(tmp_path)):
        pass


def test_folder_that_even_root_cannot_write() -> None:
    with (
        pytest.raises(UserError, match=r"/proc/demo: cannot be written"),
        RunFolder(make_recipe(Path("/proc"))),
    ):
        pass


def test_stage_appears_when_it_is_finished(tmp_path: Path) -> None:
    with RunFolder(make_recipe(tmp_path)) as run:
        stage = run.recipe.stage("random")
        partial = run.begin(stage)
        (partial / "weights").write_text("half")
        assert not run.stage_dir("random").exists()
        assert not run.is_finished(stage)
        # What an interrupted stage left is thrown away if there is no checkpoint in it.
        left = sorted(path.name for path in run.begin(stage).iterdir())
        assert left == ["lineage.json", "stage.json"]
        finish(run, "random")
        assert run.is_finished(stage)
        assert not partial.exists()
        finish(run, "random")
        assert run.read_record("random")["train_rows"] == 3


def test_changed_settings_are_noticed_down_the_line(tmp_path: Path) -> None:
    with RunFolder(make_recipe(tmp_path)) as run:
        finish(run, "random")
        finish(run, "sft")
        sft = run.recipe.stage("sft")
        assert run.is_finished(sft)
    with RunFolder(make_recipe(tmp_path, "stages.grpo.max_steps=1")) as run:
        assert run.is_finished(run.recipe.stage("sft"))
    with (
        RunFolder(make_recipe(tmp_path, "stages.sft.train.max_steps=1")) as run,
        pytest.raises(
            UserError,
            match=rf"other settings \(train.max_steps: {sft.train.max_steps}, now 1\).*--redo sft",
        ),
    ):
        run.is_finished(run.recipe.stage("sft"))
    with (
        RunFolder(make_recipe(tmp_path, "stages.random.tokenizer.vocab_size=500")) as run,
        pytest.raises(UserError, match="another parent"),
    ):
        run.is_finished(run.recipe.stage("sft"))


@pytest.mark.parametrize("then", ["sdpa", "flash_attention_2"])
def test_attention_left_to_the_machine_is_no_other_setting(tmp_path: Path, then: str) -> None:
    """sdpa was the default before auto."""
    with RunFolder(make_recipe(tmp_path, f"attn_implementation={then}")) as run:
        finish(run, "random")
        finish(run, "sft")
        interrupt(run, "grpo")
    with RunFolder(make_recipe(tmp_path)) as run:
        assert run.is_finished(run.recipe.stage("sft"))
        assert (run.begin(run.recipe.stage("grpo")) / "checkpoints" / "step-5").exists()
    with (
        RunFolder(make_recipe(tmp_path, "attn_implementation=varlen")) as run,
        pytest.raises(UserError, match=f"attn_implementation: .{then}., now .varlen"),
    ):
        run.is_finished(run.recipe.stage("sft"))


def interrupt(run: RunFolder, name: str) -> Path:
    """A stage that was ended when it had a checkpoint."""
    partial = run.begin(run.recipe.stage(name))
    (partial / "checkpoints" / "step-5").mkdir(parents=True)
    (partial / "problems.jsonl").write_text("{}")
    assert run.abandon(partial) == 5
    return partial


def test_an_interrupted_stage_is_kept_for_the_same_settings_only(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with RunFolder(recipe) as run:
        finish(run, "random")
        partial = interrupt(run, "sft")
        assert run.begin(recipe.stage("sft")) == partial
        assert find_steps(partial / "checkpoints") == [5]
    with RunFolder(make_recipe(tmp_path, "stages.sft.train.save_steps=3")) as run:
        run.begin(run.recipe.stage("sft"))  # when it saves changes nothing of what it makes
        assert find_steps(partial / "checkpoints") == [5]
    with RunFolder(make_recipe(tmp_path, "stages.sft.train.max_steps=3")) as run:
        with pytest.raises(
            UserError, match=r"interrupted with other settings \(train.max_steps: .*--redo"
        ):
            run.begin(run.recipe.stage("sft"))
        (partial / "stage.json").unlink()
        with pytest.raises(UserError, match=r"stage.json is gone, .*put it back"):
            run.begin(run.recipe.stage("sft"))
        assert find_steps(partial / "checkpoints") == [5]
        run.begin(run.recipe.stage("sft"), redo=True)
        assert {path.name for path in partial.iterdir()} == {"lineage.json", "stage.json"}


def test_a_parent_that_was_made_again_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(make_recipe(tmp_path)) as run:
        finish(run, "random")
        finish(run, "sft")
        interrupt(run, "grpo")
        monkeypatch.setattr("time.gmtime", lambda: (2100, 1, 1, 0, 0, 0, 0, 0, 0))
        finish(run, "random")
        with pytest.raises(UserError, match="finished with another parent"):
            run.is_finished(run.recipe.stage("sft"))
        finish(run, "sft")
        with pytest.raises(UserError, match="interrupted with another parent"):
            run.begin(run.recipe.stage("grpo"))


def test_weights_are_for_those_who_may_read_the_run(tmp_path: Path) -> None:
    with RunFolder(make_recipe(tmp_path)) as run:
        finish(run, "random")
    files = (path for path in (tmp_path / "demo" / "random").rglob("*") if path.is_file())
    modes = {path.stat().st_mode for path in files}
    assert len(modes) == 1


def test_a_stage_that_is_being_made_again_is_not_finished(tmp_path: Path) -> None:
    with RunFolder(make_recipe(tmp_path)) as run:
        finish(run, "random")
        finish(run, "sft")
        assert run.is_finished(run.recipe.stage("sft"))
        interrupt(run, "sft")
        assert not run.is_finished(run.recipe.stage("sft"))
        finish(run, "sft")
        assert run.is_finished(run.recipe.stage("sft"))
        assert not (run.stage_dir("sft") / "checkpoints").exists()


def test_predecessor_must_have_run(tmp_path: Path) -> None:
    with RunFolder(make_recipe(tmp_path)) as run:
        with pytest.raises(UserError, match='"sft" starts from "random", which has not run'):
            run.resolve_checkpoint("random", "sft")
        with pytest.raises(UserError, match="neither a stage nor a checkpoint folder"):
            run.resolve_checkpoint("./nowhere", "sft")
        assert run.resolve_checkpoint("Qwen/Qwen3-0.6B", "sft") == "Qwen/Qwen3-0.6B"
        finish(run, "random")
        assert run.resolve_checkpoint("random", "sft") == str(tmp_path / "demo" / "random")


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}, {"b": "ü"}])
    assert [row for _, row in read_jsonl(path)] == [{"a": 1}, {"b": "ü"}]
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": object()}])
    assert len(list(read_jsonl(path))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_figures_that_there_are_not_are_null_and_can_be_plotted(tmp_path: Path) -> None:
    """Such as the reward of a step that nothing could judge."""
    heard = []
    with RunFolder(make_recipe(tmp_path)) as run:
        folder = run.stage_dir("grpo")
        folder.mkdir()
        log = MetricsLog(folder, [heard.append])
        for step, reward in ((1, 0.5), (2, float("nan")), (3, float("inf"))):
            rewards = {"rewards/r.x/mean": reward, "reward": reward}
            log.write({"step": step, "completions/mean_length": 7.0, "nested": [reward], **rewards})
        for line in log.path.read_text().splitlines():
            json.loads(line, parse_constant=refuse_constant)
        assert [row["reward"] for row in read_metrics(folder)] == [0.5, None, None]
        assert [row["nested"] for row in read_metrics(folder)] == [[0.5], [None], [None]]
        assert [row["step"] for row in heard] == [1, 2, 3]
        entry = {"stage": "grpo", "dataset": "x", "pass_at_1": 0.5, "ci_low": 0.4, "ci_high": 0.6}
        entry |= {"num_problems": 1, "num_samples": 1, "temperature": 1.0}
        plot_curves(run, [entry], tmp_path / "curves.png")
        metrics = run.stage_dir("grpo") / "metrics.jsonl"
        rows = metrics.read_text()
        metrics.write_text(rows[: rows.index("\n") + 1])
        with warnings.catch_warnings(action="error"):
            plot_curves(run, [entry], tmp_path / "one_step.png")
        metrics.write_text(rows)
        (line,) = describe_lengths(run)
        assert line.startswith("grpo: response length 7.0 -> 7.0 tokens in 3 steps")
        assert line.endswith(", x 0.50 -> -")
    assert (tmp_path / "curves.png").exists()


def test_response_length_at_start_and_end(tmp_path: Path) -> None:
    """Means of the first and last tenth of the steps, each reward's too, and the longest step."""
    with RunFolder(make_recipe(tmp_path)) as run:
        assert describe_lengths(run) == []
        folder = run.stage_dir("grpo")
        folder.mkdir()
        log = MetricsLog(folder)
        for step in range(1, 21):
            rewards = {"rewards/a.right/mean": step / 25, "rewards/a.right/unjudged": 0.0}
            length = 99.0 if step == 12 else 10.0 + step
            log.write({"step": step, "completions/mean_length": length, "reward": 0.0, **rewards})
        lines = describe_lengths(run)
    assert lines == [
        "grpo: response length 11.5 -> 29.5 tokens in 20 steps (longest 99.0, step 12), "
        "right 0.06 -> 0.78"
    ]
    assert f"# Response length\n\n- {lines[0]}\n" in format_report([], lines)


def test_a_key_that_is_younger_than_a_stage_is_no_change(tmp_path: Path) -> None:
    """As long as it has its default: runs of an earlier version still resume."""
    recipe = make_recipe(tmp_path)
    with RunFolder(recipe) as run:
        finish(run, "random")
        finish(run, "sft")
        path = run.stage_dir("sft") / "stage.json"
        record = json.loads(path.read_text())
        del record["settings"]["train"]["micro_batch_tokens"]
        path.write_text(json.dumps(record))
        assert run.is_finished(recipe.stage("sft"))
    with (
        RunFolder(make_recipe(tmp_path, "stages.sft.train.micro_batch_tokens=64")) as run,
        pytest.raises(UserError, match="micro_batch_tokens: not set, now 64"),
    ):
        run.is_finished(run.recipe.stage("sft"))
