"""Every benchmark runs: one step of it, tiny. What it prints is not looked at but for its table."""

import json
from pathlib import Path

import pytest
from browser import CHROMIUM
from commands import ROOT, run, run_script

FOLDER = ROOT / "benchmarks"
STEPS = [
    *("--blocks", "1", "--steps", "2", "--prompts", "2", "--generations", "2"),
    *("--trl-batch", "4", "--max-completion-length", "16"),
]
BENCHMARKS = {
    "balance": ["--steps", "2", "--prompts", "2", "--longest", "32"],
    "cpu_training": ["--rounds", "1"],
    "decontamination": ["--rows", "100"],
    "grpo_vs_trl": ["--update-only", *STEPS],
    "gpu_check": ["--cpu", "--quick", "--only", "1,8", "--limit", "1500"],
    "lm_eval_check": ["configs/demo.yaml", "runs/demo/sft"],
    "memory": ["--only", "0", "--layers", "1"],
    "report_page": ["--steps", "1"],
    "sparse_attention": ["--longest", "2048", "--topk", "64", "--learn", "1"],
    "routing_replay": ["--models", "Qwen3-MoE", "--dtypes", "float32"],
}
SLOW = {
    "distillation": ["--seeds", "0", "--smoke"],
    "fleet": ["--rounds", "1", "--sides", "1 thread", "processes"],
    "grpo_vs_trl": [*STEPS, "--max-staleness", "1"],
    "gpu_check": ["--cpu", "--quick", "--limit", "1500"],
    "memory": ["--only", "0", "3", "--layers", "1"],
    "precision": ["--seeds", "0", "--steps", "1", "--smoke"],
    "speculation": [
        *("--seeds", "0", "--steps", "2", "--sizes", "2", "--rounds", "1", "--smoke"),
    ],
}
"""What takes longer than 20 s: all of a benchmark of which `make test` runs a part, or any."""


def test_every_benchmark_has_a_smoke_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*BENCHMARKS, *SLOW}


RUNS = [
    *(pytest.param(*run, id=run[0]) for run in BENCHMARKS.items()),
    *(pytest.param(*run, id=f"{run[0]}-all", marks=pytest.mark.slow) for run in SLOW.items()),
]


@pytest.mark.parametrize(("name", "options"), RUNS)
def test_benchmark_runs(
    name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "lm_eval_check":
        pytest.importorskip("lm_eval", reason="lm-eval is no dependency of r1pipe")
    if name == "report_page" and CHROMIUM is None:
        pytest.skip("no chromium")
    options = [*options]
    if name in ("distillation", "precision", "speculation"):
        options += ["--runs-dir", str(tmp_path)]
    if name == "gpu_check":
        options += ["--out", str(tmp_path)]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = run(FOLDER / f"{name}.py", *options, program=run_script)
    assert result.returncode == 0, result.stderr[-3000:]
    if name == "gpu_check":
        for check in json.loads((tmp_path / "gpu-check.json").read_text())["checks"]:
            assert check["state"] == "done", check
            assert check["rows"], check
            assert all(row["met"] is not False for row in check["rows"]), check
        return
    assert "|" in result.stdout or "rollouts: written" in result.stdout
