"""CI runs a third of the slow tests at a time."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_is_in_one_third(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(7))\n"
        "def test_n(n): assert n != 3\n"
        "def test_fast(): raise AssertionError\n"
    )
    told = []
    for third in "012":
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-v",
                "-p",
                "conftest",
                "--third",
                third,
                "-k",
                "test_n",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
        )
        told.append(done.stdout)
        assert done.returncode == (third == "0")
    assert [text.count("PASSED") for text in told] == [2, 2, 2]
    assert "test_it.py::test_n[3] FAILED" in told[0]
