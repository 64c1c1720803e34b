"""What `pip install .` gives, from the files that git knows."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # and not deleted since
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "clone" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, folder / "clone"],
        check=True,
    )
    [wheel] = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True
    )
    return wheel


def test_the_wheel_holds_exactly_the_two_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    [info] = {name.split("/")[0] for name in names if ".dist-info/" in name}
    sources = {name for name in names if not name.startswith(info)}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("r1pipe", "rewards")
        for path in (ROOT / package).rglob("*.py")
    } | {f"r1pipe/data_recipes/{path.name}" for path in (ROOT / "data").glob("*.py")}
    assert sources >= expected
    # Besides modules: what a package reads, never what somebody works with.
    assert {name.split("/")[0] for name in sources} == {"r1pipe", "rewards"}
    assert {Path(name).suffix for name in sources} == {".py", ".typed", ".html", ".css", ".js"}
    assert sources >= {"r1pipe/py.typed", "rewards/py.typed"}


def test_the_command_is_there(wheel: Path, tmp_path: Path) -> None:
    site = wheel.parent / "site"
    result = subprocess.run(
        [sys.executable, site / "bin" / "r1pipe", "--version"],
        env={"PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.startswith("r1pipe ")


def run_code(site: Path, folder: Path, code: str) -> str:
    """What Python prints in that folder, with the wheel's packages and no clone."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(site)},
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout


def test_rewards_work_where_there_is_no_torch(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, vllm=None, r1pipe=None)\n"
        "import rewards; print(rewards.__file__)\n"
        "print(rewards.math_correct(['<think>\\n1</think>\\\\boxed{7}'], answer=['7']))\n"
    )
    site = wheel.parent / "site"
    file, verdict = run_code(site, tmp_path, code).splitlines()
    assert Path(file).is_relative_to(site)
    assert verdict == "[1.0]"


def test_data_recipes_are_found_where_there_is_no_clone(wheel: Path, tmp_path: Path) -> None:
    """Ours by name, and before them those of a folder data/ where the command runs."""
    (tmp_path / "my.csv").write_text("q,a\n1+1?,2\n")
    (tmp_path / "data").mkdir()
    row = {"id": "1", "kind": "math", "prompt": [{"role": "user", "content": "?"}], "answer": "1"}
    (tmp_path / "data" / "mine.py").write_text(f"def load(split):\n    yield {row!r}\n")
    code = (
        "from r1pipe.config.base import ProblemSet\n"
        "from r1pipe.data.problems import find_recipe, load_problems\n"
        "options = {'path': 'my.csv', 'columns': {'prompt': 'q', 'answer': 'a'}}\n"
        "for source in ({'recipe': 'columns', 'options': options}, {'recipe': 'arithmetic'},\n"
        "               {'recipe': 'mine'}):\n"
        "    problems = load_problems(ProblemSet(**source))\n"
        "    print(len(problems), find_recipe(source['recipe']).absolute())\n"
    )
    site = wheel.parent / "site"
    found = [line.split() for line in run_code(site, tmp_path, code).splitlines()]
    ours = str(site / "r1pipe" / "data_recipes")
    mine = str(tmp_path / "data" / "mine.py")
    assert found == [["1", f"{ours}/columns.py"], ["1000", f"{ours}/arithmetic.py"], ["1", mine]]
