"""benchmarks/common/checks.py: checks that fail, take too long or hang do not end the others."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from common.checks import Check, Runner, format_number  # noqa: E402


def run(folder: Path, *functions: Callable, limit_s: float = 60, each_s: float = 60) -> list[dict]:
    """The records of checks of these functions, read back from the file."""
    checks = [Check(n, f"check {n}", each_s, function) for n, function in enumerate(functions, 1)]
    Runner("test", checks, folder, limit_s=limit_s, began=time.time()).run()
    return json.loads((folder / "test.json").read_text())["checks"]


def succeed(check: Check) -> None:
    check.add("speed", 2.0, "tokens/s", at_least=3.0)


def sleep(check: Check) -> None:
    check.add("began", "yes")
    try:
        time.sleep(60)
    except Exception:  # a library that catches whatever it can
        pytest.fail("the time limit was caught")


def test_an_exception_is_a_row_and_the_next_check_runs(tmp_path: Path) -> None:
    def fail(check: Check) -> None:
        check.add("before", 1)
        raise ValueError("no such kernel")

    failed, fine = run(tmp_path, fail, succeed)
    assert (failed["state"], fine["state"]) == ("failed", "done")
    assert "ValueError: no such kernel (test_gpu_checks.py:" in failed["error"]
    assert [row["figure"] for row in failed["rows"]] == ["before"]
    table = (tmp_path / "test.md").read_text()
    assert "| speed | 2 tokens/s | ≥ 3 tokens/s | **no** |" in table
    assert "failed: ValueError" in table
    assert "goals met: 0 of 1. not met: 2 speed. failed: 1" in table


def test_a_check_ends_at_its_limit(tmp_path: Path) -> None:
    slow, fine = run(tmp_path, sleep, succeed, each_s=0.2)
    assert (slow["state"], fine["state"]) == ("stopped", "done")
    assert "its limit" in slow["error"]
    assert slow["rows"]


def test_checks_that_the_limit_leaves_no_time_for_are_not_reached(tmp_path: Path) -> None:
    slow, other = run(tmp_path, sleep, succeed, limit_s=5.2)
    assert (slow["state"], other["state"]) == ("stopped", "not reached")
    assert "the limit of 5 s" in slow["error"]


def test_rows_are_on_the_disk_before_the_check_ends(tmp_path: Path) -> None:
    def look(check: Check) -> None:
        check.add("one", 1)
        record = json.loads((tmp_path / "test.json").read_text())["checks"]
        assert [c["state"] for c in record] == ["running", "not reached"]
        assert record[0]["rows"][0]["figure"] == "one"

    assert run(tmp_path, look, succeed)[0]["state"] == "done"


def test_a_hung_check_is_left_by_a_new_process(tmp_path: Path) -> None:
    """A blocked signal is as good as a C call: no handler runs."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import signal, sys, time
            sys.path.insert(0, {str(BENCHMARKS)!r})
            from pathlib import Path
            from common import checks

            checks.GRACE_S = 0.5

            def hang(check):
                check.add("began", "yes")
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
                time.sleep(60)

            resume = [a for a in sys.argv if a.startswith("--resume-from=")]
            began = float(resume[0].split("=")[1]) if resume else time.time()
            both = [checks.Check(1, "hangs", 0.3, hang)]
            both.append(checks.Check(2, "runs", 9, lambda check: check.add("two", 2)))
            folder = Path({str(tmp_path)!r})
            checks.Runner(
                "test", both, folder, limit_s=50, began=began, resume=bool(resume)
            ).run()
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50)
    hung, fine = json.loads((tmp_path / "test.json").read_text())["checks"]
    assert (hung["state"], fine["state"]) == ("stopped", "done"), done.stderr
    assert "hung" in hung["error"]
    assert hung["rows"]
    assert "in hang" in done.stderr  # its stack


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_completions_of_a_deep_random_model_end_at_random(model_type: str) -> None:
    from common.card import DENSE, MIXTURE
    from common.workload import end_at_random

    from r1pipe.models.model import make_model

    shape = {"qwen3": DENSE, "qwen3_moe": {**MIXTURE, "num_experts": 8, "num_experts_per_tok": 2}}
    small = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 32, "vocab_size": 4000}
    model = make_model({**shape[model_type], **small, "num_hidden_layers": 28}, seed=0)
    end_at_random(model, 1, mean_length=50)
    with torch.no_grad():
        probs = model(torch.randint(2, 4000, (2, 64))).logits.softmax(-1)[..., 1]
    assert float(probs.mean()) == pytest.approx(1 / 50, rel=0.2)
    assert probs.std() < 0.3 / 50


def test_numbers_are_short() -> None:
    numbers = (3.4e-7, 0.0312, 16450, 98765.4, float("nan"))
    assert [format_number(n) for n in numbers] == ["3.4e-07", "0.0312", "16,450", "98,765.4", "nan"]
