"""What the command line tells somebody who does not know it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from r1pipe.cli import FIRST_STEPS, build_parser, main
from r1pipe.commands import COMMANDS
from r1pipe.config import STAGE_TYPES


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
    words = shlex.split(line.partition(">")[0])
    assert words[0] == "r1pipe"
    options = build_parser().parse_args(words[1:])
    config = getattr(options, "config", None)
    assert config is None or (Path(__file__).parents[2] / config).is_file()


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


def test_completion_scripts(capsys: pytest.CaptureFixture) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "_ARGCOMPLETE" in capsys.readouterr().out
