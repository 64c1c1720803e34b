"""r1pipe's commands in processes of their own, for tests of runs from outside."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import huggingface_hub
import killed

from r1pipe.cli.main import main
from r1pipe.utils.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "vllm.entrypoints.llm",
        "r1pipe.doctor.preflight",
        "r1pipe.stages.distill",
        "r1pipe.stages.grpo",
    ]
)
"""Imports take longer than most commands: a server does them once, and forks."""


def start(
    *arguments: object,
    program: tuple[str, ...] = ("-m", "r1pipe"),
    environment: Mapping[str, str] = os.environ,
    **options: object,
) -> subprocess.Popen:
    """A process of its own from the beginning."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'pipeline'}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def finish(process: subprocess.Popen, timeout_s: float = 1800) -> subprocess.CompletedProcess:
    """Of `start`, to the end."""
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(
    *arguments: object,
    program: Callable = main,
    said: str = "",
    environment: Mapping[str, str] = os.environ,
    timeout_s: float = 1800,
) -> subprocess.CompletedProcess:
    """In a fork of the server, to the end. `said`: on stdin."""
    arguments = tuple(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("in", "out", "err")]
        files[0].write_text(said)
        process = FORKS.Process(target=execute, args=(program, arguments, files, dict(environment)))
        process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        out, err = (file.read_text() for file in files[1:])
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def execute(
    program: Callable, arguments: tuple[str, ...], files: list[Path], environment: dict
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)  # which it has read from another environment
    os.chdir(ROOT)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["r1pipe", *arguments]
    sys.exit(program(list(arguments)))


def run_and_kill(
    phase: str, steps: int, delay_s: float, folder: Path, *command: object
) -> subprocess.CompletedProcess:
    """As killed.py says."""
    result = run(phase, steps, delay_s, folder, *command, program=killed.run_and_kill)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    return result


def run_shipped(name: str, settings: Iterable[str], runs: Path) -> tuple[Path, str]:
    """A recipe of configs/ with these settings: the run's folder, and what the command said."""
    sets = [part for setting in (f"runs_dir={runs}", *settings) for part in ("--set", setting)]
    result = run("run", ROOT / "configs" / f"{name}.yaml", *sets)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs / name, result.stderr


def read_lines(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)]


def wait_for(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
