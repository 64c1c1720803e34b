"""scripts/setup_env.py: which packages it asks pip for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import setup_env  # noqa: E402

TORCH = next(line for line in setup_env.read_requirements() if line.startswith("torch=="))


def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_indexes: int) -> list[list[str]]:
    """pip's arguments of each call, files of requirements as their lines. `torch_indexes`: how many
    of the two places do not have torch."""
    seen: list[list[str]] = []

    def pip(*arguments: object, quiet_errors: bool = False) -> None:
        words = [str(argument) for argument in arguments]
        if words[0] == "-r" or "--require-hashes" in words:
            words[-1:] = Path(words[-1]).read_text().splitlines()
        seen.append(words)
        if words[-1].startswith("torch==") and sum(TORCH in call for call in seen) <= torch_indexes:
            raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(setup_env, "pip", pip)
    monkeypatch.setattr(setup_env, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(setup_env, "PYTHON", tmp_path)  # is there
    setup_env.install()
    return seen


def test_torch_comes_from_its_own_index_if_pip_finds_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = [call for call in install(monkeypatch, tmp_path, 1) if TORCH in call]
    assert asked == [[TORCH], ["--index-url", setup_env.TORCH_CPU_INDEX, TORCH]]
    with pytest.raises(subprocess.CalledProcessError):  # in the thread of the large ones
        install(monkeypatch, tmp_path, 2)


def test_what_commands_import_is_compiled_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """pip compiles nothing; each start would compile all that it imports."""
    asked: list[tuple[list[str], dict[str, str]]] = []
    done = subprocess.CompletedProcess([], 0, "", "")
    run = lambda command, env, **options: asked.append((command, env)) or done  # noqa: E731
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(setup_env, "read_requirements", lambda: [])
    monkeypatch.setattr(setup_env, "PYTHON", tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    setup_env.pip("one")
    assert setup_env.check() == 0
    (pip, _), (imports, environment) = asked
    assert "--no-compile" in pip
    assert "r1pipe.stages.grpo" in imports[-1]
    assert "PYTHONDONTWRITEBYTECODE" not in environment


def test_every_pinned_package_is_installed_once_and_the_hashed_by_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = install(monkeypatch, tmp_path, 0)
    (hashed,) = (call for call in calls if "--require-hashes" in call)
    assert all("--hash=" in line for line in hashed[2:])
    pinned = setup_env.read_requirements() + setup_env.read_requirements(optional=True)
    assert sorted(word for call in calls for word in call if "==" in word) == sorted(pinned)
    assert calls[-1][-1] == str(ROOT)
