"""The documents' examples run, their commands parse, their links and names lead somewhere."""

import importlib.util
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import run, run_script

from r1pipe.cli.commands import COMMANDS
from r1pipe.cli.main import build_parser
from r1pipe.config.base import ProblemSet
from r1pipe.config.recipe import STAGE_TYPES

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "data", "rewards", "benchmarks")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/*.md"))]
)
SOURCES = ("r1pipe", "rewards", "data", "tests", "benchmarks", "scripts", "examples")
PYTHON = {path: path.read_text() for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
NAMES = set(re.findall(r"(?:def|class) (\w+)", "\n".join(PYTHON.values())))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.py)\n")
NOT_OURS = re.compile("my|runs/|summary.md")
TEST_COLUMNS = ("test_list", "test_setup_code", "test_imports")
RUN_HERE = ("r1pipe completion bash", "r1pipe doctor configs/demo.yaml --quick")
"""Commands of the documents that take seconds: they are run, not only parsed."""

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def find_blocks(document: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(document.read_text()) if kind == language]


def find_commands(document: Path) -> Iterator[str]:
    """Command lines of the blocks and in the running text, without comments and pipes."""
    text = document.read_text()
    blocks = "\n".join(b for kind, b in BLOCK.findall(text) if kind in ("", "bash"))
    blocks += "\n".join(re.findall(r"^    (\S.*)$", BLOCK.sub("", text), re.MULTILINE))
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", BLOCK.sub("", text))
    for line in [*blocks.replace("\\\n", " ").splitlines(), *(s.replace("\n", " ") for s in spans)]:
        for part in re.split(r" \| | && ", line.strip().removeprefix("OMP_NUM_THREADS=1 ")):
            command = re.split("  #| >>", part)[0].strip().removeprefix(".venv/bin/")
            if re.match(r"(r1pipe|make|python -m|python \w+/) ?", command) and " " in command:
                yield command


def test_cheap_commands_run() -> None:
    known = {command for document in DOCUMENTS for command in find_commands(document)}
    for command in RUN_HERE:
        assert command in known
        done = run(*command.split()[1:])
        assert done.returncode == 0, done.stderr


@each_document
def test_commands_parse(document: Path) -> None:
    for command in find_commands(document):
        check_command(command)


def check_command(command: str) -> None:
    words = shlex.split(command.partition(" -- ")[0])
    if words[0] == "make":
        for line in expand_make(words[1:]):
            check_command(line)
    elif words[0] == "r1pipe" and len(words) == 2:
        assert words[1] in (*COMMANDS, "..."), command
    elif words[0] == "r1pipe":
        options = build_parser().parse_args(words[1:])
        config = getattr(options, "config", None)
        assert config in (None, "CONFIG", "configs/my.yaml") or (ROOT / config).is_file(), command
    elif words[:3] == ["python", "-m", "pytest"]:
        check_pytest(words[3:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), command
    elif words[0] == "python":
        script = (ROOT / words[1]).read_text()
        assert all(word in script for word in words if word.startswith("--")), command


def expand_make(arguments: list[str]) -> list[str]:
    """What make would run of r1pipe; not with what `make test ARGS=...` was given."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "ARGS")}
    told = subprocess.run(
        ["make", "-n", *arguments],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = told.stdout.replace(".venv/bin/", "").splitlines()
    return [line for line in lines if line.startswith(("r1pipe", "python"))]


def check_pytest(arguments: list[str]) -> None:
    """Every path holds tests, and each word after -k is in the name of one of them."""
    paths = [ROOT / word for word in arguments if word.startswith("tests")]
    assert all(path.exists() for path in paths), arguments
    if "-k" in arguments:
        word = arguments[arguments.index("-k") + 1].removeprefix("test_")
        found = (text for test, text in PYTHON.items() if {*paths} & {test, *test.parents})
        assert re.search(rf"def test_\w*{word}", "\n".join(found)), arguments


def run_in_its_folder(arguments: list[str]) -> None:
    os.chdir(Path(arguments[0]).parent)
    run_script(arguments)


@pytest.mark.parametrize("page", ["docs/extending.md", "rewards/README.md"])
def test_examples_run(page: str, tmp_path: Path) -> None:
    blocks = find_blocks(ROOT / page, "python")
    assert len(blocks) >= 2
    program = []
    for block in blocks:
        if file := FILE.match(block):
            (tmp_path / file.group(1)).write_text(block)
        else:
            program.append(block)
    (tmp_path / "examples.py").write_text("\n".join(program))
    done = run(tmp_path / "examples.py", program=run_in_its_folder)
    assert done.returncode == 0, done.stderr


@each_document
def test_recipes_are_read(document: Path) -> None:
    """Stages whole; of other keys, that they are YAML, and that a data set is one."""
    for block in find_blocks(document, "yaml"):
        values = yaml.safe_load(block)
        for stage in values if isinstance(values, list) else []:
            if set(stage) > {"kind", "data", "from"}:
                STAGE_TYPES[stage["kind"]].model_validate(stage)
        data = values.get("data", []) if isinstance(values, dict) else []
        for source in data if isinstance(data, list) else [data]:
            ProblemSet.model_validate({k: v for k, v in source.items() if k != "weight"})


def list_anchors(document: Path) -> set[str]:
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            page = document.parent / path if path else document
            assert page.exists(), target
            assert not anchor or anchor in list_anchors(page), target


@each_document
def test_files_named_exist(document: Path) -> None:
    """By their path from the root, the package, the configs or the document's own folder."""
    places = (ROOT, ROOT / "r1pipe", ROOT / "configs", document.parent)
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|https?://\S+", "", document.read_text())
    names = re.findall(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|yaml|sbatch|toml|md))\b", text)
    names += re.findall(r"`((?:r1pipe|rewards|tests|configs|docs|examples)/[\w/]*)`", text)
    for name in names:
        if not NOT_OURS.match(name.removeprefix("configs/")):
            assert any((place / name).exists() for place in places), name


@each_document
def test_slow_files_are_asked_for(document: Path) -> None:
    """Without -m slow pytest runs nothing of them."""
    found = re.findall(r"(-m slow\s+)?((?:tests/[\w/]+\.py\s*)+)", document.read_text())
    for is_asked, names in found:
        texts = [PYTHON[ROOT / name] for name in names.split()]
        assert is_asked or not all("\npytestmark = pytest.mark.slow" in t for t in texts), names


@each_document
def test_functions_and_tests_named_exist(document: Path) -> None:
    text = document.read_text()
    for name in re.findall(r"`(test_\w+)`(?!:)", text):
        assert name in NAMES or name in TEST_COLUMNS, name
    for name in re.findall(r"(?<![\w.])(?:[A-Z]\w+\.)?(\w+)\(\)", text):
        assert name in NAMES | {"input"}, name
