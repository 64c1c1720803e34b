"""configs/launch/: what a parser can say of it, and whether a recipe's engines fit."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from r1pipe.cli.main import build_parser
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs" / "launch"


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())


def read_options(script: str) -> dict[str, str]:
    """#SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))


def load(command: str) -> Recipe:
    """The recipe that the command runs, from the project's folder."""
    words = shlex.split(command)
    options = build_parser().parse_args(words[words.index("run") :])
    return load_recipe(ROOT / options.config, options.overrides)


@pytest.mark.parametrize("name", ["slurm.sbatch", "ray.sbatch"])
def test_a_batch_script_is_bash(name: str) -> None:
    script = (LAUNCH / name).read_text()
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    options = read_options(script)
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])


def test_engines_fit_the_cores_of_a_slurm_job() -> None:
    """One for each core of all nodes but the trainer's, in the command that the script shows and
    with its own defaults."""
    script = (LAUNCH / "ray.sbatch").read_text()
    shown = re.search(r"#   (sbatch .*?)\n#\n", script, re.DOTALL)[1].replace("\\\n#", " ")
    own = read_options(script)
    words = shlex.split(shown)
    for option in ("nodes", "cpus-per-task"):
        assert words[words.index(f"--{option}") + 1] == own[option]
    sampler = load(shown).sampler
    assert (sampler.kind, sampler.ray) == ("fleet", "auto")
    assert sampler.engines == (int(own["nodes"]) - 1) * int(own["cpus-per-task"])


def test_engines_fit_the_pods_of_a_ray_job(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    cores = int(workers["rayStartParams"]["num-cpus"])
    assert str(cores) == container["resources"]["requests"]["cpu"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    sampler = load(job["spec"]["entrypoint"]).sampler
    assert (sampler.kind, sampler.ray) == ("fleet", "auto")
    assert sampler.engines == workers["replicas"] * cores


def test_pods_have_the_token_the_runs_and_the_extras_ray(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    extras = (ROOT / "pyproject.toml").read_text()
    wanted = Requirement(re.search(r'^ray = \["(.*)"\]', extras, re.MULTILINE)[1])
    assert canonicalize_name(wanted.name) == "ray"
    assert cluster["rayVersion"] in wanted.specifier
    pinned = re.search(r"ray==([\d.]+)", (ROOT / ".ci" / "run").read_text())[1]
    assert cluster["rayVersion"] == pinned
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            names = {variable["name"] for variable in container["env"]}
            assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= names
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    runs = load(job["spec"]["entrypoint"]).runs_dir
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"{container['workingDir']}/{runs}" in mounts
