"""Runs that are killed (SIGKILL) and started again, against the run that was not."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import ROOT, read_lines, run

TIMES = ("seconds/", "tokens_per_s/")


def run_and_kill(
    phase: str, steps: int, delay_s: float, folder: Path, *command: object
) -> subprocess.CompletedProcess:
    """As killed.py says."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, here / "killed.py", *map(str, (phase, steps, delay_s, folder, *command))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{here}"},
        text=True,
        capture_output=True,
        timeout=400,
    )


def read_metrics(folder: Path) -> list[dict]:
    rows = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_equal(folder: Path, other: Path) -> None:
    """Losses, rewards, sampled tokens, weights: bit by bit."""
    names = {path.name for path in folder.iterdir()} - {"stage.json", "lineage.json"}
    assert {path.name for path in other.iterdir()} - {"stage.json", "lineage.json"} == names
    assert {"metrics.jsonl", "model.safetensors"} < names
    assert read_metrics(other) == read_metrics(folder)
    for name in names - {"metrics.jsonl"}:
        assert (other / name).read_bytes() == (folder / name).read_bytes(), name


# stage: (phase in which it is killed, steps behind it; how often it saves: not when it logs)
KILLS = {
    "sft": ("supervised", 15, "stages.sft.train.save_steps=7"),
    "grpo": ("updating", 1, "stages.grpo.save_steps=1"),
    "distill": ("supervised", 3, "stages.distill.train.save_steps=3"),
}


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_stage_goes_on_bit_equal(stage: str, finished: tuple, tiny_recipe: Path) -> None:
    folder, _ = finished
    phase, steps, saving = KILLS[stage]
    other = folder.parent / f"killed-{stage}"
    for parent in ("random", "sft", "grpo"):
        if parent != stage:
            shutil.copytree(folder / parent, other / parent)
    command = (stage, tiny_recipe, "--set", f"name={other.name}", "--set", saving)
    partial = other / f".{stage}.partial"
    killed = run_and_kill(phase, steps, 0.01, partial, *command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert list((partial / "checkpoints").glob("step-*"))
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "goes on after step" in result.stderr
    if stage == "distill":
        assert "40 of 40 samples are there from before" in result.stderr
    assert_equal(folder / stage, other / stage)
