"""The direction cli -> pipeline -> stages -> shared modules -> rewards, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {"init", "sft", "reject", "distill", "on_policy_distill", "evaluate", "grpo.stage"}
ABOVE = {"cli", "commands", "doctor", "launch", "pipeline", "__main__"}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def own_modules() -> dict[str, set[str]]:
    package = ROOT / "r1pipe"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): imported_modules(path)
        for path in package.rglob("*.py")
    }


def test_stages_do_not_import_each_other() -> None:
    for name, imports in own_modules().items():
        if name in STAGES:
            for other in STAGES - {name}:
                assert f"r1pipe.{other}" not in imports, f"{name} imports {other}"


def test_shared_modules_import_no_stage_and_nothing_above() -> None:
    for name, imports in own_modules().items():
        forbidden = ABOVE if name in STAGES else STAGES | ABOVE
        if name not in ABOVE:
            for other in forbidden:
                assert f"r1pipe.{other}" not in imports, f"{name} imports {other}"


def test_rewards_import_no_r1pipe_torch_or_vllm() -> None:
    for path in (ROOT / "rewards").rglob("*.py"):
        for module in imported_modules(path):
            assert module.split(".")[0] not in ("r1pipe", "torch", "vllm"), f"{path}: {module}"


def test_only_rollout_imports_vllm() -> None:
    for name, imports in own_modules().items():
        if name != "rollout":
            assert not {m for m in imports if m.split(".")[0] == "vllm"}, name


@pytest.mark.parametrize("module", ["r1pipe.config", "r1pipe.records", "r1pipe.cli", "rewards"])
def test_imports_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; assert not {{'torch', 'transformers', 'vllm'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
