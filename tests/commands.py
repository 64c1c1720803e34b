"""r1pipe's commands in processes of their own, for tests of runs from outside."""

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import wait
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
    with tempfile.TemporaryDirectory() as folder:
        fork = Fork(Path(folder), program, arguments, environment, said)
        fork.process.join(timeout_s)
        return fork.finish()


def run_ranks(
    number: int, *arguments: object, program: Callable = main, timeout_s: float = 900
) -> subprocess.CompletedProcess:
    """In as many forks, with what torchrun would tell them, until all have ended or one has failed;
    its result, else the first one's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1]}
    shared |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    with tempfile.TemporaryDirectory() as folder:
        forks = []
        for rank in range(number):
            own = {name: str(v) for name, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            place = Path(folder, str(rank))
            place.mkdir()
            forks.append(Fork(place, program, arguments, {**os.environ, **own}))
        deadline = time.monotonic() + timeout_s
        running, failed = [*forks], []
        while running and not failed and time.monotonic() < deadline:
            wait([fork.process.sentinel for fork in running], timeout=1)
            running = [fork for fork in running if fork.process.exitcode is None]
            failed = [fork for fork in forks if fork.process.exitcode]
        results = {fork: fork.finish() for fork in [*failed, *forks]}
        return next(iter(results.values()))


class Fork:
    """Of the server; its stdin, stdout and stderr are files."""

    def __init__(
        self,
        folder: Path,
        program: Callable,
        arguments: tuple[object, ...],
        environment: Mapping[str, str],
        said: str = "",
    ):
        self.arguments = list(map(str, arguments))
        self.files = [folder / name for name in ("in", "out", "err")]
        self.files[0].write_text(said)
        given = program, self.arguments, self.files, dict(environment)
        self.process = FORKS.Process(target=execute, args=given)
        self.process.start()

    def finish(self) -> subprocess.CompletedProcess:
        """Killed if it has not ended."""
        self.process.kill()
        self.process.join()
        out, err = (file.read_text() for file in self.files[1:])
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, out, err)


def execute(program: Callable, arguments: list[str], files: list[Path], environment: dict) -> None:
    gc.freeze()  # what the server has imported
    # Python starts another server for what a fork starts, such as a fleet's engines.
    forkserver._forkserver.ensure_running = lambda: None
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)  # which it has read from another environment
    os.chdir(ROOT)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["r1pipe", *arguments]
    sys.exit(program(arguments))


def run_script(arguments: list[str]) -> None:
    """A program for `run`: a file, and what it is given."""
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


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
