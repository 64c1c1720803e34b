"""Which package imports which, read from the source: always from a floor below its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "r1pipe": (
        "__main__",
        "cli",
        "pipeline publish serve launch",
        "stages doctor report",
        "rl sft evals",
        "context trainer",
        "envs",
        "rollout runs",
        "models data",
        "config",
        "types utils",
    ),
    "rewards": (
        "bench",
        "tasks",
        "code judges shaping",
        "math sandbox",
        "text workers",
    ),
}
"""From the roof down. Packages on one floor know nothing of each other, and no package is in two
places, so there are no circles."""

OUTSIDE = {
    "vllm": {"r1pipe.rollout"},
    "trackio": {"r1pipe.runs"},
    "wandb": {"r1pipe.runs"},
    "mlflow": {"r1pipe.runs"},
    "matplotlib": {"r1pipe.evals"},
    "gguf": {"r1pipe.models"},
    "ray": {"r1pipe.rollout"},
}
"""Libraries that only these packages may import."""


def list_modules(package: str) -> dict[str, Path]:
    paths = (ROOT / package).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def list_imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its head or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def find_room(name: str) -> str | None:
    """`rl` of `r1pipe.rl.losses`; None of the root's own names."""
    root, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return room if room in " ".join(FLOORS.get(root, ())).split() else None


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    floor = {room: n for n, rooms in enumerate(FLOORS[package]) for room in rooms.split()}
    for name, path in list_modules(package).items():
        if name.endswith("__init__") and name.count(".") == 1:
            continue  # the package's public names
        own = name.split(".")[1]
        assert own in floor, f"{own} has no floor: add it to FLOORS"
        for imported in list_imports(path):
            if imported.split(".")[0] == package and (room := find_room(imported)):
                fits = room == own or floor[room] > floor[own]
                assert fits, f"{name} imports {imported}: {own} is not above {room}"


def test_stages_do_not_import_each_other() -> None:
    for name, path in list_modules("r1pipe").items():
        if name.startswith("r1pipe.stages."):
            others = [x for x in list_imports(path) if x.startswith("r1pipe.stages.")]
            assert not others, f"{name} imports {others}"


def test_rewards_import_no_r1pipe_torch_or_vllm() -> None:
    for name, path in list_modules("rewards").items():
        for imported in list_imports(path):
            assert imported.split(".")[0] not in ("r1pipe", "torch", "vllm"), f"{name}: {imported}"


@pytest.mark.parametrize("library", OUTSIDE)
def test_only_these_import(library: str) -> None:
    for name, path in list_modules("r1pipe").items():
        if any(imported.split(".")[0] == library for imported in list_imports(path)):
            assert ".".join(name.split(".")[:2]) in OUTSIDE[library], f"{name} imports {library}"


@pytest.mark.parametrize(
    "module",
    ["r1pipe.config.recipe", "r1pipe.config.load", "r1pipe.types", "r1pipe.cli.main", "rewards"],
)
def test_imports_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; assert not {{'torch', 'transformers', 'vllm'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
