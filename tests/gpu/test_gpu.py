"""What only a GPU shows. Skipped, with the reason, where there is none."""

from pathlib import Path

import pytest
import torch

from r1pipe.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_runs_unchanged(dtype: str, tmp_path: Path) -> None:
    """A short run of the demo's recipe; the parity gate inside it is the assertion."""
    overrides = [
        f"runs_dir={tmp_path}",
        f"dtype={dtype}",
        "device=cuda",
        "stages.sft.train.max_steps=20",
        "stages.grpo.max_steps=2",
        f"stages.grpo.max_logprob_diff={1e-3 if dtype == 'float32' else 0.05}",
    ]
    options = [part for override in overrides for part in ("--set", override)]
    assert main(["init", str(DEMO), *options]) == 0
    assert main(["sft", str(DEMO), *options]) == 0
    assert main(["grpo", str(DEMO), *options]) == 0
