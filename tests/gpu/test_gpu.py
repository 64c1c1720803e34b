"""What only a GPU shows. Skipped, with the reason, where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1pipe.cli.main import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_runs_unchanged(dtype: str, tmp_path: Path) -> None:
    """A short run of the demo's recipe; the parity gate inside it is the assertion."""
    overrides = [
        f"runs_dir={tmp_path}",
        f"dtype={dtype}",
        "device=cuda",
        "stages.sft.train.max_steps=20",
        "stages.grpo.max_steps=2",
        f"stages.grpo.breaker.logprob_diff.limit={1e-3 if dtype == 'float32' else 0.05}",
    ]
    options = [part for override in overrides for part in ("--set", override)]
    assert main(["init", str(DEMO), *options]) == 0
    assert main(["sft", str(DEMO), *options]) == 0
    assert main(["grpo", str(DEMO), *options]) == 0


def test_replay_with_the_routes_that_vllm_returns() -> None:
    """The benchmark's table: no route differs under replay, and bfloat16 comes closer."""
    pytest.importorskip("vllm")
    command = [sys.executable, "benchmarks/routing_replay.py", "--device", "cuda"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if "|" in line]
    rows = {tuple(row[:4]): row[4:] for row in lines[2:]}
    for model in ("DeepSeek-V3", "Qwen3-MoE"):
        for layers in ("autocast", "bf16"):
            off, on = (rows[model, "bfloat16", layers, replay] for replay in ("off", "on"))
            assert on[0] == "0.00%"
            # The KL divergence, to which the few tokens that are far apart contribute nearly all:
            # on a CPU a 25th to a 65th is left.
            assert float(on[-1]) < 0.5 * float(off[-1])
