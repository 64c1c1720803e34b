"""A finished stage behind vLLM's OpenAI-compatible server, and in a conversation."""

import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from commands import run

ROOT = Path(__file__).parents[2]
QUESTION = "Tom has 14 books. Monday brings 5. Tuesday drops 5. How many books now?"
COMMAND = [sys.executable, "-m", "r1pipe"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch.compile would leave what it compiles for the server."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def client(finished: tuple, compiled: Path) -> Iterator[openai.OpenAI]:
    """Of a server for the cold start of the tiny recipe, which writes <think> ... </think>."""
    folder, _ = finished
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, "serve", str(folder / "sft"), "--port", str(port)]
    command += ["--", "--api-key", "sesame"]  # vLLM's own flags
    variables = environment() | {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    server = subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until_ready(server, port)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame")
    finally:
        server.terminate()
        server.communicate(timeout=300)


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    until = time.monotonic() + 900
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server has ended: {server.stderr.read()[-2000:]}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError("the server does not become ready")


@pytest.mark.slow
def test_flags_behind_two_dashes_are_vllms(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="none").models.list()


@pytest.mark.slow
def test_thinking_is_returned_separately(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny/sft"
    messages = [{"role": "user", "content": QUESTION}]
    done = client.chat.completions.create(
        model=model.id, messages=messages, max_tokens=60, temperature=0, n=1
    )
    (choice,) = done.choices
    assert choice.finish_reason == "stop"
    assert choice.message.model_extra["reasoning"]
    assert "\\boxed" in choice.message.content
    assert "think>" not in choice.message.content + choice.message.model_extra["reasoning"]


@pytest.mark.slow
def test_a_stream_gives_the_same_answer(client: openai.OpenAI) -> None:
    arguments = {
        "model": "tiny/sft",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**arguments).choices[0].message
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**arguments, stream=True)
    ]
    assert "".join(d.content or "" for d in deltas) == whole.content
    thinking = "".join((d.model_extra or {}).get("reasoning") or "" for d in deltas)
    assert thinking == whole.model_extra["reasoning"]


@pytest.mark.slow
def test_a_temperature_holds_where_tokens_are_drafted(client: openai.OpenAI) -> None:
    """The cold start has a prediction layer. vLLM makes 0.01 of less; there, a token whose log-prob
    is 0.2 below the likeliest one's is drawn once in e^20 times."""
    arguments = {"model": "tiny/sft", "prompt": "7 + 3", "max_tokens": 30, "logprobs": 1}
    for temperature, number in ((0, 1), (0.01, 8)):
        asked = {**arguments, "temperature": temperature, "n": number}
        choices = client.completions.create(**asked).choices
        for told in (choice.logprobs for choice in choices):
            likeliest = [max(top.values()) for top in told.top_logprobs]
            behind = [top - own for top, own in zip(likeliest, told.token_logprobs, strict=True)]
            assert max(behind) <= 20 * temperature
    metrics = httpx.get(str(client.base_url.join("/metrics"))).text
    counts = re.findall(r"^vllm:spec_decode_num_(\S+)_tokens_total\S* (\S+)$", metrics, re.M)
    assert all(float(dict(counts)[name]) > 0 for name in ("draft", "accepted")), counts


@pytest.mark.slow
def test_the_server_compiles_nothing(client: openai.OpenAI, compiled: Path) -> None:
    client.completions.create(model="tiny/sft", prompt="7 + 3", max_tokens=4, logprobs=1)
    assert not [path for path in compiled.rglob("*") if path.is_file()]


def test_a_question_through_a_pipe_gets_the_answer_alone(finished: tuple) -> None:
    done = run("chat", finished[0] / "sft", "--temperature", "0", said=QUESTION)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("\\boxed{")
    assert "think" not in done.stdout


@pytest.mark.slow
def test_a_terminal_shows_the_thinking_dimmed(finished: tuple) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "chat", str(finished[0] / "sft"), "--temperature", "0"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
        env={**environment(), "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(theirs)
        os.write(ours, f"{QUESTION}\n\n".encode())
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            shown += part
        assert process.wait(timeout=300) == 0
    dim, answer = shown.find(b"\x1b[2m"), shown.find(b"\\boxed{")
    assert 0 <= dim < answer


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_stage_that_is_not_there_is_one_line(command: str, finished: tuple) -> None:
    done = run(command, finished[0] / "grppo")
    assert done.returncode == 2
    assert "did you mean grpo?" in done.stderr
    assert done.stderr.count("\n") == 1
