"""GRPO with a rule and a judge: a budget that ends the run, and the run that goes on from there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from commands import run
from judge_server import COMPLETION_TOKENS, PROMPT_TOKENS, grade_by
from teacher_server import TeacherServer, teacher_server
from test_resume import assert_equal, begin_beside

from r1pipe.report.costs import describe_costs
from r1pipe.rollout.store import list_steps


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with teacher_server() as server:
        grade_by(server, lambda answer: len(answer) % 11)
        yield server


def take_asked(server: TeacherServer) -> list[str]:
    asked = [json.dumps(request["messages"]) for request in server.requests]
    server.requests.clear()
    return asked


@pytest.mark.slow
def test_a_run_that_its_budget_ends_resumes_with_equal_rewards(
    finished: tuple, tiny_recipe: Path, server: TeacherServer, tmp_path: Path
) -> None:
    """Saved without save_steps, bit-equal to a run of a larger budget, and nothing asked twice."""
    folder, _ = finished
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"prompt": "p", "completion": "x" * n, "score": n} for n in range(1, 7)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "base_url": f"http://127.0.0.1:{server.server_port}/v1",
        "model": "judge",
        "rubric": "Longer is better.",
        "labelled": str(labelled),
        "min_agreement": 0.9,
        "price_per_million": {"input": 1.0, "output": 4.0},
    }

    def train(name: str, **more: object) -> tuple[int, str, Path]:
        judge = {"function": "rewards.judge", "options": {**options, **more}}
        rewards = yaml.safe_dump(
            [{"function": "rewards.math_correct"}, judge], default_flow_style=True, width=10**6
        )
        sets = [f"--set=name={name}", f"--set=stages.grpo.rewards={rewards.strip()}"]
        result = run("grpo", tiny_recipe, *sets)
        return result.returncode, result.stderr, folder.parent / name

    begin_beside(folder, "grpo", "judged")
    code, said, whole = train("judged")
    assert code == 0, said[-3000:]
    assert "6 of 6 labelled rows judged: Spearman 1.00" in said
    asked = take_asked(server)
    assert len(set(asked)) == len(asked)
    for step in (1, 2):
        table = pq.read_table(list_steps(whole / "grpo")[step])
        grades = [rewards["rewards.judge"] for rewards in table["rewards"].to_pylist()]
        assert len(set(grades)) > 1

    begin_beside(folder, "grpo", "budgeted")
    code, said, other = train("budgeted", max_requests=len(asked) - 1)
    assert code == 2
    assert "Traceback" not in said
    assert f"(max_requests {len(asked) - 1})" in said.splitlines()[-1]
    assert "step 1 is saved" in said
    first = take_asked(server)
    assert len(first) == len(asked) - 1
    code, said, _ = train("budgeted", max_requests=len(asked))
    assert code == 0, said[-3000:]
    assert "resumes after step 1" in said
    assert_equal(whole / "grpo", other / "grpo")
    assert sorted(first + take_asked(server)) == sorted(asked)

    spent = json.loads((other / "grpo" / "ledger.json").read_text())["judge"]
    assert spent["requests"] == len(asked)
    tokens = (spent["prompt_tokens"], spent["completion_tokens"])
    assert tokens == (PROMPT_TOKENS * len(asked), COMPLETION_TOKENS * len(asked))
    assert spent["cost"] == pytest.approx((tokens[0] * 1.0 + tokens[1] * 4.0) / 1e6)
    assert f"judge of grpo, not in the table: {len(asked)} requests" in describe_costs(other)

    begin_beside(folder, "grpo", "refused")
    grade_by(server, lambda answer: 10 - len(answer) % 11)
    code, said, _ = train("refused")
    assert code == 2
    assert "Spearman -1.00 with 6 labelled rows is less than min_agreement 0.9" in said
    assert len(server.requests) == 6
