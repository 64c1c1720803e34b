"""What a run makes of a stage's judges before they are asked."""

from dataclasses import replace
from pathlib import Path

from grpo_settings import make_grpo

from r1pipe.config.base import Reward, Sampling
from r1pipe.config.traces import Reject
from r1pipe.rollout.judging import bind_judges, count_requests
from r1pipe.rollout.sampling import SamplingJob
from r1pipe.types import Problem

OPTIONS = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "rubric": "r"}
RULE = Reward(function="rewards.math_correct")


def make_judge(**options: object) -> Reward:
    return Reward(function="rewards.judge", options={**OPTIONS, **options})


def test_requests_are_booked_under_run_and_stage(tmp_path: Path) -> None:
    stage = make_grpo(name="rl", rewards=[RULE, make_judge(), make_judge(cache="/x", account="y")])
    rule, judge, own = bind_judges(stage, tmp_path / "run").rewards
    assert rule == RULE
    assert judge.options["cache"] == str(tmp_path / "run" / "judge.sqlite")
    assert judge.options["account"] == "run/rl"
    assert (own.options["cache"], own.options["account"]) == ("/x", "y")
    assert count_requests([rule, judge])["requests"] == 0
    assert count_requests([rule]) is None
    unjudged = make_grpo(name="rl")
    assert bind_judges(unjudged, tmp_path) is unjudged


def test_traces_have_judges_too(tmp_path: Path) -> None:
    traces = {"num_generations": 2, "sampling": {"max_completion_length": 8}}
    stage = Reject.model_validate(
        {
            "kind": "reject",
            "from": "x",
            "data": {"recipe": "arithmetic"},
            "traces": {**traces, "rewards": [make_judge()]},
        }
    )
    (bound,) = bind_judges(stage, tmp_path / "run").rewards_used()
    assert bound.options["account"] == "run/reject"


def test_samples_are_kept_under_another_budget_but_not_under_another_rubric(
    tmp_path: Path,
) -> None:
    job = SamplingJob(
        problems=[Problem("0", "text", [{"role": "user", "content": "Hi"}])],
        num_samples=1,
        sampling=Sampling(max_completion_length=8),
        seed_parts=(0,),
        rewards=[make_judge(max_requests=10)],
        origin="x",
        folder=tmp_path,
        label="reject",
    )
    raised = make_judge(max_requests=20, cache="elsewhere", base_url="http://127.0.0.1:8/v1")
    assert replace(job, rewards=[raised]).digest() == job.digest()
    assert replace(job, rewards=[make_judge(rubric="s")]).digest() != job.digest()
