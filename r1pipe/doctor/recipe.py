"""The doctor: what would go wrong in a run, found before it starts. One line per check:

    r1pipe doctor                                       # installed packages, GPU, sandbox
    r1pipe doctor configs/demo.yaml                     # and the recipe: data, models, disk
    r1pipe doctor configs/demo.yaml --quick             # without what takes more than seconds
    r1pipe doctor configs/demo.yaml --parity            # and sampler = trainer; starts an engine

A check is ok, warn, FAIL, or skipped where it cannot be made yet: never ok without having looked.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from huggingface_hub import constants

from r1pipe.config.base import Stage
from r1pipe.config.recipe import Recipe
from r1pipe.config.rl import OnPolicy
from r1pipe.doctor.data_checks import (
    examine_data,
    examine_functions,
    examine_golds,
    examine_teachers,
)
from r1pipe.doctor.disk_checks import examine_disk, examine_folder
from r1pipe.doctor.inputs import Inputs
from r1pipe.doctor.machine import Diagnosis, examine_sandbox
from r1pipe.doctor.memory import Devices
from r1pipe.doctor.model_checks import (
    examine_architecture,
    examine_checkpoints,
    examine_memory,
    examine_prompts,
    examine_tokenizers,
    examine_vocabulary,
)
from r1pipe.models.hub_cache import reaches_hub
from r1pipe.rollout.placement import describe_placement
from r1pipe.runs.tracking import check_tracking
from r1pipe.utils.errors import UserError

Check = Callable[[Stage, Inputs], Iterator[Diagnosis]]

STAGE_CHECKS: dict[str, Check] = {
    "rewards and loss": examine_functions,
    "data": examine_data,
    "golds": examine_golds,
    "teachers": examine_teachers,
    "architecture": examine_architecture,
    "memory": examine_memory,
}
"""Made once, before anything runs."""

CHECKPOINT_CHECKS: dict[str, Check] = {
    "checkpoints": examine_checkpoints,
    "tokenizers": examine_tokenizers,
    "vocabulary": examine_vocabulary,
    "prompts": examine_prompts,
}
"""Depend on the checkpoints that the stage starts from: repeated once those exist."""


def diagnose_recipe(
    recipe: Recipe, devices: str | None = None, quick: bool = False, parity: bool = False
) -> Iterator[Diagnosis]:
    """`r1pipe doctor CONFIG`. `devices`: such as "8x80GB"; None: this machine's. `quick`: without
    every row's gold and prompt, and without importing vLLM."""
    given = Devices.parse(devices) if devices else Devices.here(recipe.device)
    yield examine_hub()
    inputs = Inputs(recipe, given, thorough=not quick)
    yield from examine_recipe(inputs, recipe.stages)
    if parity:
        from r1pipe.doctor.parity_check import examine_parity

        for stage in recipe.stages:
            yield from examine_stage(stage, inputs, {"parity": examine_parity})
    elif not quick and any(isinstance(stage, OnPolicy) for stage in recipe.stages):
        yield Diagnosis("parity", "skipped", "takes an engine: add --parity")


def examine_recipe(inputs: Inputs, stages: list[Stage]) -> Iterator[Diagnosis]:
    """Everything about these stages that can be known now."""
    recipe = inputs.recipe
    yield examine_folder(recipe)
    yield examine_disk(recipe, stages)
    if recipe.tracking:
        yield examine_tracking(recipe)
    if recipe.sampler.kind == "fleet" and any(stage.samplings() for stage in stages):
        yield examine_fleet(recipe, inputs.devices)
    if any(r.function == "rewards.code_passes" for s in stages for r in s.rewards_used()):
        yield examine_sandbox(is_needed=True)
    for stage in stages:
        yield from examine_stage(stage, inputs, STAGE_CHECKS | CHECKPOINT_CHECKS)


def examine_stage(stage: Stage, inputs: Inputs, checks: Mapping[str, Check]) -> Iterator[Diagnosis]:
    """Each check's diagnoses under the stage's name; a UserError from a check is a FAIL."""
    for name, check in checks.items():
        try:
            for diagnosis in check(stage, inputs):
                yield replace(diagnosis, what=f"{stage.name}: {diagnosis.what or name}")
        except UserError as error:
            yield Diagnosis(f"{stage.name}: {name}", "FAIL", str(error))


def examine_tracking(recipe: Recipe) -> Diagnosis:
    try:
        check_tracking(recipe)
    except UserError as error:
        return Diagnosis("tracking", "FAIL", str(error))
    return Diagnosis("tracking", "ok", ", ".join(recipe.tracking))


def examine_fleet(recipe: Recipe, devices: Devices) -> Diagnosis:
    if devices.is_gpu and not torch.cuda.is_available():
        what = "its engines take GPUs beside the trainer's: looked for where there are some"
        return Diagnosis("sampler", "skipped", what)
    try:
        found = describe_placement(recipe.sampler, "cuda" if devices.is_gpu else "cpu")
    except UserError as error:
        return Diagnosis("sampler", "FAIL", str(error))
    return Diagnosis("sampler", "ok", found)


def examine_hub() -> Diagnosis:
    if reaches_hub():
        return Diagnosis("hub", "ok", f"{constants.ENDPOINT} answers")
    # Every later request would be retried for half a minute.
    constants.HF_HUB_OFFLINE = True
    what = f"no answer from {constants.ENDPOINT}: only its cache counts"
    return Diagnosis("hub", "skipped", what)
