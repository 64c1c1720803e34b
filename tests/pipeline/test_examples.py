"""Examples do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_minimal_grpo_learns() -> None:
    """Reward and length rise, and sampler and trainer agree at every step, so weights arrive."""
    result = subprocess.run(
        [sys.executable, "examples/minimal_grpo.py"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = re.findall(r"^step=\d+ reward=(\S+) length=(\S+) diff=(\S+)$", result.stdout, re.M)
    rewards, lengths, diffs = ([float(value) for value in column] for column in zip(*rows))
    assert len(rows) == 15
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.1
    assert fmean(lengths[-3:]) > fmean(lengths[:3]) + 2
    assert max(diffs) < 1e-5
