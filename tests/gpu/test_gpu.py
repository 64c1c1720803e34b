"""What only a GPU shows. Skipped, with the reason, where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROOT = Path(__file__).parents[2]


def test_every_check_of_gpu_check_ends_and_sampler_equals_trainer(tmp_path: Path) -> None:
    """Other goals are of speed: no assertion."""
    pytest.importorskip("vllm")
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", tmp_path, "--limit", "900"]
    subprocess.run(command, cwd=ROOT, check=False)
    checks = json.loads((tmp_path / "gpu-check.json").read_text())["checks"]
    assert [check["number"] for check in checks if check["state"] != "done"] == []
    missed = [row for check in checks for row in check["rows"] if row["met"] is False]
    assert [row["figure"] for row in missed if "dlogp" in row["figure"]] == []
