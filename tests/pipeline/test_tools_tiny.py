"""configs/tools_tiny.yaml, a policy that may call a calculator, with few steps; real vLLM."""

import json
from pathlib import Path

import pytest
from commands import read_lines, run_shipped
from test_engine import LIMIT

from r1pipe.envs.calculator import calculator
from r1pipe.rollout.store import read_rollouts

pytestmark = pytest.mark.slow

SMALL = (
    "stages.random.tokenizer.data.options.size=300",
    "stages.sft.data.options={size: 2560, guess_share: 0.3}",
    "stages.sft.train.max_steps=80",
    "stages.grpo.max_steps=2",
    "stages.grpo.prompts_per_step=8",
    "stages.grpo.data.options.size=100",
    "stages.eval.data.options.size=10",
    "stages.eval.num_samples=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_shipped("tools_tiny", SMALL, tmp_path_factory.mktemp("runs"))[0]


def test_episodes_call_and_read_the_result(folder: Path) -> None:
    """Whatever so young a policy calls it with."""
    rows = list(read_rollouts(folder / "grpo", [1, 2]))
    calling = [row["episode"] for row in rows if row["episode"]["num_tool_calls"]]
    assert len(calling) > len(rows) / 4
    computed = 0
    for episode in calling:
        for message, answer in zip(episode["messages"], episode["messages"][1:]):
            for call in message.get("tool_calls", ()):
                assert answer["role"] == "tool"
                try:
                    expected = calculator(**json.loads(call["function"]["arguments"]))
                except (TypeError, ValueError):
                    assert answer["content"].startswith("error: ")
                    continue
                assert answer["content"] == expected
                computed += 1
    assert computed


def test_calls_are_in_metrics_and_in_the_summary(folder: Path) -> None:
    metrics = read_lines(folder / "grpo" / "metrics.jsonl")
    assert len(metrics) == 2
    for row in metrics:
        assert row["sampler/logprob_diff_mean"] < LIMIT
        assert 0 < row["episodes/calling"] <= row["episodes/tool_calls"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["stage"] for entry in summary] == ["random", "sft", "grpo"]
    random, cold, _ = (entry["calling"] for entry in summary)
    assert random < cold
    assert "| calling |" in (folder / "summary.md").read_text()
