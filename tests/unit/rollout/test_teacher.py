"""A teacher behind an endpoint, against a server of our own that speaks the protocol."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import sample_all
from teacher_server import Answer, TeacherServer, answer_right, make_answer, teacher_server

from r1pipe.config.base import Reward, Sampling
from r1pipe.config.traces import TeacherEndpoint
from r1pipe.rollout.sampling import SamplingJob
from r1pipe.rollout.teacher import TeacherClient
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

KEY = "sk-very-secret"


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with teacher_server() as server:
        yield server


@pytest.fixture
def job(tmp_path: Path) -> SamplingJob:
    prompts = [[{"role": "user", "content": f"{n}?"}] for n in range(4)]
    return SamplingJob(
        problems=[
            Problem(str(n), "math", prompt, answer=str(n)) for n, prompt in enumerate(prompts)
        ],
        num_samples=3,
        sampling=Sampling(temperature=0.7, top_p=0.9, max_completion_length=50),
        seed_parts=(0, "reject"),
        rewards=[Reward(function="rewards.math_correct"), Reward(function="rewards.format")],
        origin="teacher",
        folder=tmp_path,
        label="reject",
    )


@pytest.fixture
def teacher(server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> TeacherClient:
    return make_teacher(server, monkeypatch)


def make_teacher(
    server: TeacherServer, monkeypatch: pytest.MonkeyPatch, **changes: object
) -> TeacherClient:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    given = {"base_url": url, "model": "big", "api_key_env": "TEACHER_KEY", **changes}
    return TeacherClient(TeacherEndpoint(**given))


def test_samples_are_judged_like_our_own(
    server: TeacherServer, teacher: TeacherClient, job: SamplingJob
) -> None:
    rollouts, scores = sample_all(job, lambda: teacher)
    assert [(r.problem_id, r.sample) for r in rollouts] == [
        (str(p), n) for p in range(4) for n in range(3)
    ]
    assert all(score.total == 2.0 for score in scores)
    assert rollouts[0].completion.startswith("<think>\nseed ")
    assert rollouts[0].completion.endswith("\n</think>\n\\boxed{0}")
    assert len({request["seed"] for request in server.requests}) == 12
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["top_p"]) == ("big", 0.7, 0.9)
    assert request["max_completion_tokens"] == 50
    assert server.keys == {f"Bearer {KEY}"}


def test_busy_and_broken_servers_are_asked_again(
    server: TeacherServer, teacher: TeacherClient, job: SamplingJob
) -> None:
    server.answer = lambda number, request: (
        ((429, 500, 503)[number % 3], {"error": "busy"}) if number < 3 else answer_right(request)
    )
    rollouts, _ = sample_all(job, lambda: teacher)
    assert len(rollouts) == 12
    assert len(server.requests) == 12 + 3


def test_resumes_after_an_error_with_what_it_has(
    server: TeacherServer, job: SamplingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the message has no key in it, although the server repeats it."""
    refusal = {"error": {"message": f"Incorrect API key provided: {KEY}\nsee the docs"}}
    server.answer = lambda number, request: (401, refusal) if number == 7 else answer_right(request)
    one_by_one = make_teacher(server, monkeypatch, max_concurrency=1)
    with pytest.raises(UserError, match="Incorrect API key provided") as error:
        sample_all(job, lambda: one_by_one)
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
    assert 'problem "2"' in str(error.value)
    server.requests.clear()
    rollouts, scores = sample_all(job, lambda: one_by_one)
    assert len(server.requests) == 12 - 7
    assert all(score.total == 2.0 for score in scores)
    assert len({rollout.completion for rollout in rollouts}) == 12


def test_requests_run_beside_each_other_up_to_the_limit(
    server: TeacherServer, job: SamplingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody is answered before three are under way; a fourth has time to come, too.
    barrier = threading.Barrier(3, timeout=60)

    def answer(number: int, request: dict) -> Answer:
        barrier.wait()
        time.sleep(0.1)
        return answer_right(request)

    server.answer = answer
    sample_all(job, lambda: make_teacher(server, monkeypatch, max_concurrency=3))
    assert server.most_under_way == 3


def test_unreachable_teacher_is_one_line(
    server: TeacherServer, job: SamplingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = make_teacher(server, monkeypatch, base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9") as error:
        sample_all(job, lambda: nowhere)
    assert "\n" not in str(error.value)


def test_missing_key_is_named(server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        make_teacher(server, monkeypatch, api_key_env="NO_SUCH_KEY")


# (the message's text and fields, the completion)
MESSAGES = [
    (("<think>\na\n</think>\nb", {}), "<think>\na\n</think>\nb"),
    (("b", {"reasoning_content": "a"}), "<think>\na\n</think>\nb"),
    (("\n\nb", {"reasoning": "a\n"}), "<think>\na\n</think>\nb"),
    (("\na\n</think>\nb", {}), "<think>\na\n</think>\nb"),
    (("b", {}), "b"),
]


@pytest.mark.parametrize(("given", "completion"), MESSAGES)
def test_thinking_is_put_into_our_format(
    given: tuple, completion: str, server: TeacherServer, teacher: TeacherClient, job: SamplingJob
) -> None:
    text, fields = given
    server.answer = lambda number, request: make_answer(text, **fields)
    rollouts, _ = sample_all(job, lambda: teacher)
    assert {rollout.completion for rollout in rollouts} == {completion}


def test_cut_answers_count_as_truncated(
    server: TeacherServer, teacher: TeacherClient, job: SamplingJob
) -> None:
    server.answer = lambda number, request: make_answer("half", finish_reason="length")
    rollouts, _ = sample_all(job, lambda: teacher)
    assert all(rollout.truncated for rollout in rollouts)
