"""The command line: help, errors in one line, streams, interrupts."""

import errno
import io
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from unit.rollout.test_rollout_files import make_rollout_rows

from r1pipe.cli.commands import COMMANDS
from r1pipe.cli.main import FIRST_STEPS, build_parser, main
from r1pipe.config.recipe import STAGE_TYPES, KeptRollouts
from r1pipe.rollout.store import RolloutFiles
from r1pipe.serve import require_free_port
from r1pipe.utils.errors import FULL, UserError

ROOT = Path(__file__).parents[3]


def test_every_kind_of_stage_is_a_command() -> None:
    assert set(STAGE_TYPES) <= set(COMMANDS)


def test_without_arguments_it_says_where_to_begin(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert FIRST_STEPS in out
    for line in FIRST_STEPS.splitlines():
        if line.startswith("  r1pipe"):
            check_example(line.split("   ")[0])
    for name in COMMANDS:
        assert f"    {name}" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    example, then = COMMANDS[name].example, COMMANDS[name].then
    help_text = capsys.readouterr().out
    assert f"example:\n  {example}\n\nnext:\n  {then}\n" in help_text
    assert shlex.split(example)[1] == name
    check_example(example)
    if "<TAB>" not in then:
        check_example(then)


def check_example(line: str) -> None:
    words = shlex.split(line.partition(">")[0].partition(" -- ")[0])
    assert words[0] == "r1pipe"
    options = build_parser().parse_args(words[1:])
    config = getattr(options, "config", None)
    assert config is None or (Path(__file__).parents[3] / config).is_file()


@pytest.mark.parametrize(
    ("line", "completions"),
    [("r1pipe pub", {"publish "}), ("r1pipe publish --dry", {"--dry-run "})],
)
def test_the_shell_completes(line: str, completions: set[str], tmp_path: Path) -> None:
    """As the script that `r1pipe completion bash` prints asks it to."""
    out = tmp_path / "completions"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "r1pipe"], env=environment, check=True)
    assert set(out.read_text().split("\n")) == completions


RECIPE = """
name: mine
stages:
  - kind: init
    model: {model_type: qwen2, hidden_size: 64, num_hidden_layers: 2, intermediate_size: 128,
            num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 256}
    tokenizer: {vocab_size: 400, data: {recipe: arithmetic, options: {size: 20}}}
  - kind: grpo
    from: init
    data: {recipe: arithmetic, options: {size: 20}}
    rewards: [{function: my_rewards.one}, {function: rewards.format}, {function: rewards.two}]
    max_steps: 1
    prompts_per_step: 1
    num_generations: 2
    max_completion_length: 24
"""


def run_here(*arguments: str, program: tuple[str, ...] = ("-m", "r1pipe"), **options: object):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("more", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, env=environment, text=True, encoding="utf-8", **streams)


MODULE, SCRIPT = ("-m", "r1pipe"), ("-P", "-m", "r1pipe")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "python_path"),
    [
        pytest.param(MODULE, f".:{ROOT}", id="-m, the folder first"),
        pytest.param(SCRIPT, str(ROOT), id="r1pipe"),
        pytest.param(MODULE, str(ROOT), id="-m"),
        pytest.param(SCRIPT, f".:{ROOT}", id="r1pipe, the folder first"),
    ],
)
def test_modules_of_the_working_folder(
    program: tuple[str, ...], python_path: str, tmp_path: Path
) -> None:
    """They are found, and stand in for no module of ours or, unless the user asks for it, of a
    library. -P: as the installed script, without the working folder."""
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "my_rewards.py").write_text("def one(completions): return [1.0] * len(completions)")
    (tmp_path / "rewards.py").write_text("def two(completions): return [2.0] * len(completions)")
    if not python_path.startswith("."):
        (tmp_path / "yaml.py").write_text("raise RuntimeError('not this one')")
    options = {"program": program, "cwd": tmp_path, "more": {"PYTHONPATH": python_path}}
    done = run_here("doctor", "mine.yaml", "--quick", **options)
    assert done.returncode == 1
    (failed,) = (line for line in done.stdout.splitlines() if line.startswith("FAIL"))
    assert f"({tmp_path}/rewards.py has the name of r1pipe's own package: rename it)" in failed


def close_streams() -> None:
    for number in range(3):
        os.close(number)


def test_closed_and_ascii_streams(tmp_path: Path) -> None:
    """Closed, with a closed reader, or in an encoding without the printed characters."""
    assert run_here("--help", preexec_fn=close_streams).returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    done = run_here("rollouts", make_run(tmp_path), stdout=writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    done = run_here(
        "rollouts", make_run(tmp_path), "--step", "1", more={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "of sample 0 \\xfc" in done.stdout


def make_run(folder: Path) -> str:
    RolloutFiles(folder, KeptRollouts()).write(1, make_rollout_rows(), {})
    return str(folder)


def test_what_the_disk_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    errors = {
        PermissionError(errno.EACCES, "Permission denied", "/a/b"): "/a/b: Permission denied",
        OSError(errno.ENOSPC, "No space left on device", "/a/b"): FULL,
        ConnectionResetError("by peer"): "ConnectionResetError: by peer",
    }
    for error, line in errors.items():

        def fail(options: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setitem(COMMANDS, "cost", replace(COMMANDS["cost"], run=fail))
        assert main(["cost", "demo"]) == 2
        assert capsys.readouterr().err == f"r1pipe: {line}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("chat demo --temperature -1", "-1 is not from 0"),
        ("chat demo --top-p 0", "0 is not above 0 to 1"),
        ("chat demo --max-completion-length x", "invalid int value: 'x'"),
        ("serve demo --port 99999", "99999 is not from 1 to 65535"),
        ("serve demo --tool-call-parser hermes", "vLLM's own flags go after --"),
        ("report demo --watch 0", "0 is not above 0"),
        ("report demo --what", "unrecognized arguments: --what\n"),
    ],
)
def test_wrong_arguments(line: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_arguments_after_two_dashes_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(COMMANDS, "serve", replace(COMMANDS["serve"], run=seen.append))
    main(["serve", "demo", "--port", "9", "--", "--tool-call-parser", "hermes", "--port", "7"])
    (options,) = seen
    assert options.port == 9
    assert options.passed_on == ["--tool-call-parser", "hermes", "--port", "7"]


def test_sampling_that_contradicts_itself(capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", "demo", "--temperature", "0", "--top-p", "0.5"]) == 2
    assert "top_p does nothing at temperature 0" in capsys.readouterr().err
    assert main(["chat", "demo", "--temperature", "0.001"]) == 2
    assert "give 0.01, or 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "words"), [(b"", "no question"), (b" \n", "no question"), (b"\xff", "not UTF-8")]
)
def test_no_question_starts_no_engine(
    question: bytes,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question), encoding="utf-8"))
    assert main(["chat", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use: choose"):
            require_free_port("127.0.0.1", port)


def test_completion_scripts(capsys: pytest.CaptureFixture) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "_ARGCOMPLETE" in capsys.readouterr().out
