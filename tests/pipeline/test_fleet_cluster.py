"""Runs with a fleet from outside: joining a Ray cluster that others have started, and SIGTERM."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import finish, read_lines, start, wait_for
from test_fleet import PLACES, list_descendants, wait_for_end

pytestmark = pytest.mark.slow


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray of two cores, whose token is in the environment. What joins it must not
    be forked: Ray reads how to show a token when vLLM imports it."""
    pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-this-test-" * 4)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    port = find_port()
    options = ("--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block")
    ray = start(
        "start", *options, "--include-dashboard=false", program=("-m", "ray.scripts.scripts")
    )
    answers = lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0  # noqa: E731
    wait_for(lambda: answers() or ray.poll() is not None, timeout_s=120)
    below = list_descendants(ray.pid)
    yield f"127.0.0.1:{port}"
    ray.terminate()
    ray.communicate(timeout=60)
    for process in below:
        wait_for_end(process)


def write_recipe(tiny_recipe: Path, folder: Path, name: str, sampler: dict, steps: int) -> Path:
    """Random weights, then GRPO."""
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    stages["grpo"] |= {"from": "random", "max_completion_length": 16, "max_steps": steps}
    values |= {"name": name, "runs_dir": str(folder), "sampler": sampler}
    values["stages"] = [stages[stage] for stage in ("random", "grpo")]
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    return recipe


def test_a_cluster_is_joined_by_its_address_and_outlives_the_run(
    cluster: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Its cores are free again after a run, whose rewards were judged there."""
    place = {"kind": "fleet", "engines": 2, "ray": cluster, "reward_workers": 2}
    recipe = write_recipe(tiny_recipe, tmp_path, "joined", place, steps=2)
    result = finish(start("run", recipe))
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_lines(tmp_path / "joined" / "grpo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sync/logprob_diff_mean"] < 1e-5 for row in rows)
    result = finish(start("doctor", recipe, "--quick"))
    assert f"2 engines on 2 cores of {cluster}, by Ray" in result.stdout + result.stderr


def test_a_wrong_token_is_one_line(
    cluster: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"kind": "fleet", "engines": 2, "ray": cluster}
    recipe = write_recipe(tiny_recipe, tmp_path, "refused", place, steps=2)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-" * 4)
    result = finish(start("run", recipe, "--skip-doctor"), timeout_s=300)
    assert result.returncode == 2, result.stderr[-3000:]
    line = result.stderr.splitlines()[-1]
    assert f"sampler.ray: the cluster at {cluster}" in line
    assert "is its token in RAY_AUTH_TOKEN?" in line


@pytest.mark.parametrize("kind", PLACES)
def test_sigterm_ends_the_step_saves_it_and_ends_every_engine(
    kind: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ray":
        pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = write_recipe(tiny_recipe, tmp_path, kind, PLACES[kind].model_dump(), steps=200)
    process = start("run", recipe)
    folder = tmp_path / kind / ".grpo.partial"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and read_lines(folder / "metrics.jsonl"))
    below = list_descendants(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors[-3000:]
    assert "the same command resumes" in errors
    last = read_lines(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / "checkpoints" / f"step-{last}").is_dir()
    assert len(below) >= 2
    for descendant in below:
        wait_for_end(descendant)
