"""Runs a recipe's stages in order, or one of them, each continuing from the one before."""

import importlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from r1pipe.config.base import Stage
from r1pipe.config.evals import Eval
from r1pipe.config.recipe import Recipe
from r1pipe.data.problem_sets import ProblemSets, list_needed
from r1pipe.doctor.disk_checks import find_ancestor
from r1pipe.report.costs import describe_costs
from r1pipe.rollout.judging import begin_judges, bind_judges, count_requests
from r1pipe.rollout.store import find_rollouts
from r1pipe.runs.folder import RunFolder
from r1pipe.runs.ledger import Hardware, Ledger
from r1pipe.runs.tracking import Tracking
from r1pipe.utils import distributed
from r1pipe.utils.errors import FULL, Tripped, UserError, is_disk_full
from r1pipe.utils.phases import phase
from r1pipe.utils.progress import log_line
from r1pipe.utils.quiet import silence_warnings
from r1pipe.utils.threads import settle_threads
from r1pipe.utils.watchdog import Watchdog, clear_stacks

if TYPE_CHECKING:
    from r1pipe.context import StageContext
    from r1pipe.rollout.engines import Engines


def run_recipe(recipe: Recipe, redo: str | None = None, skip_doctor: bool = False) -> None:
    """Run every stage that is not finished; `redo` names a stage to make again, with all after."""
    if redo is not None and recipe.stage(redo) is None:
        names = ", ".join(stage.name for stage in recipe.stages)
        raise UserError(f"--redo {redo}: no such stage; there are {names}")
    with open_run(recipe) as run:
        names = [stage.name for stage in recipe.stages]
        redone = set(names[names.index(redo) :]) if redo else set()

        def find_finished() -> set[str]:
            return {s.name for s in recipe.stages if s.name not in redone and run.is_finished(s)}

        finished = distributed.on_first_rank(find_finished)
        for name in names:
            if name in finished:
                log_line(f"{name}: finished before")
        unfinished = [stage for stage in recipe.stages if stage.name not in finished]
        run_stages(run, unfinished, redone, skip_doctor)
        if unfinished and distributed.is_first():
            print(describe_costs(run.path))


def run_one(recipe: Recipe, kind: str, redo: bool, skip_doctor: bool = False) -> None:
    """Run the recipe's first unfinished stage of this kind (or, with `redo`, the last one again).

    Its predecessors must be finished.
    """
    stages = [stage for stage in recipe.stages if stage.kind == kind]
    if not stages:
        kinds = ", ".join(dict.fromkeys(stage.kind for stage in recipe.stages))
        raise UserError(f'recipe "{recipe.name}" has no {kind} stage; it has {kinds}')
    with open_run(recipe) as run:
        if redo:
            run_stages(run, stages[-1:], {stages[-1].name}, skip_doctor)
            return

        def find_unfinished() -> int | None:
            return next((i for i, s in enumerate(stages) if not run.is_finished(s)), None)

        number = distributed.on_first_rank(find_unfinished)
        if number is None:
            log_line(f"{kind}: finished before; add --redo to make it again")
            return
        run_stages(run, [stages[number]], skip_doctor=skip_doctor)


def evaluate_checkpoints(
    recipe: Recipe, names: list[str], redo: bool, skip_doctor: bool = False
) -> None:
    """Print how these checkpoints (stages of the recipe, folders or hub ids) do by the protocol of
    the recipe's last eval stage, and how they differ. What has been evaluated is not again."""
    stages = [stage for stage in recipe.stages if isinstance(stage, Eval)]
    if not stages:
        raise UserError(f'recipe "{recipe.name}" has no eval stage to say how')
    asked = stages[-1]
    singles = {name: asked.for_one(name) for name in names}
    with open_run(recipe) as run:

        def find_finished() -> set[str]:
            return {s.name for s in (asked, *singles.values()) if run.is_finished(s)}

        finished = set() if redo else distributed.on_first_rank(find_finished)
        if asked.name in finished:
            singles |= dict.fromkeys(set(names) & set(asked.checkpoints), asked)
        to_do = [stage for stage in singles.values() if stage.name not in finished]
        redone = {stage.name for stage in to_do if redo}
        run_stages(run, to_do, redone, skip_doctor)
        folders = {name: run.stage_dir(stage.name) for name, stage in singles.items()}
        if distributed.is_first():
            from r1pipe.stages.eval import join_evaluations

            print(join_evaluations(folders))


@contextmanager
def open_run(recipe: Recipe) -> Iterator[RunFolder]:
    """The run's folder, and in a run of several processes the connection between them."""
    if not distributed.alone():
        silence_libraries()
    stacks = recipe.run_dir / ".stacks"
    num_lanes = 1 + recipe.batches_ahead
    with (
        distributed.joined(recipe.device, recipe.phase_timeout_s, num_lanes),
        RunFolder(recipe) as run,
    ):
        if distributed.alone():  # the launcher has shared out the cores
            settle_threads(run.path, recipe.engines_beside)
        distributed.on_first_rank(lambda: clear_stacks(stacks))
        with Watchdog(stacks, recipe.phase_timeout_s):
            yield run


def replay_stage(
    recipe: Recipe, kind: str, name: str | None, steps: range, source: Path | None
) -> None:
    """Train the stage `name`, or the only one of this kind, on rollouts that it, or that of the run
    folder `source`, has kept, into a stage folder of its own: `<name>-replay`, made anew each
    time."""
    stages = {stage.name: stage for stage in recipe.stages if stage.kind == kind}
    if not stages:
        raise UserError(f'recipe "{recipe.name}" has no {kind} stage to replay')
    if name is None and len(stages) == 1:
        (name,) = stages
    if name not in stages:
        raise UserError(f"--replay: choose with --stage: {', '.join(stages)}")
    stage = stages[name]
    folder = find_rollouts(source or recipe.run_dir, None if source else stage.name)
    replayed = stage.model_copy(update={"name": f"{stage.name}-replay"})
    if recipe.stage(replayed.name):
        raise UserError(f'--replay: the recipe has a stage of the name "{replayed.name}"')
    with open_run(recipe) as run:
        make = partial(find_module(stage).replay, source=folder, steps=steps)
        run_stages(run, [replayed], {replayed.name}, skip_doctor=True, make=make)


def run_stages(
    run: RunFolder,
    stages: list[Stage],
    redone: Collection[str] = (),
    skip_doctor: bool = False,
    make: Callable | None = None,
    engines: "Engines | None" = None,
) -> None:
    """Run the stages: those in `redone` from the start, the others from their last checkpoint.
    `make` replaces the `run` of their kind. `engines` stay open; by default the stages have their
    own."""
    if not stages:
        return
    silence_libraries()
    from r1pipe.context import StageContext
    from r1pipe.doctor.memory import Devices, estimate_stage
    from r1pipe.doctor.preflight import Preflight
    from r1pipe.models.model import pick_device
    from r1pipe.rollout.engines import Engines

    recipe = run.recipe
    device = pick_device(recipe.device)
    devices = Devices.here(recipe.device)
    # A misspelt reward of the last stage is worth knowing before the first one has run for hours.
    problem_sets = ProblemSets(run.path)
    preflight = Preflight(recipe, devices, stages, problem_sets, skip_doctor)
    own = engines is None
    engines = engines or Engines.of(recipe, device)
    ledger = Ledger(run.path, recipe, Hardware.here(recipe, device.type))
    started = time.monotonic()
    try:
        for number, stage in enumerate(stages):
            problem_sets.keep(list_needed(stages[number:], recipe))
            preflight.begin(stage)
            if distributed.is_first() and (line := estimate_stage(stage, recipe, devices)):
                log_line(line)
            tracking = Tracking(recipe, stage)
            context = StageContext(
                recipe=recipe,
                run=run,
                stage_name=stage.name,
                folder=run.begin(stage, redo=stage.name in redone),
                engines=engines,
                device=device,
                facts={},
                ledger=ledger,
                listeners=[ledger.note_step, tracking.log],
                problem_sets=problem_sets,
            )
            make_stage(stage, context, tracking, make or find_module(stage).run)
    finally:
        if own:
            engines.close()
    if len(stages) > 1:
        log_line(f"{recipe.name}: {len(stages)} stages in {time.monotonic() - started:.0f} s")


def make_stage(
    stage: Stage, context: "StageContext", tracking: Tracking, make: Callable[..., dict]
) -> None:
    """Run one stage and put its folder in place; on failure keep what it can resume from."""
    started, run = time.monotonic(), context.run
    bound = bind_judges(stage, run.path)
    with context.ledger.stage(stage.name, partial(count_requests, bound.rewards_used())):
        try:
            with tracking, phase(stage.name):
                distributed.on_first_rank(lambda: begin_judges(bound))
                facts = make(bound, context)
        except BaseException as error:
            if step := run.abandon(context.folder, keep=isinstance(error, Tripped)):
                log_line(f"{stage.name}: step {step} is saved")
            if is_disk_full(error) and not isinstance(error, UserError):
                raise UserError(f"{find_full(run.path)}: {FULL}") from error
            raise
        context.ledger.finish(facts, context.folder)
    wall_s, peak_gib = time.monotonic() - started, round(peak_memory_gib(), 2)
    facts = {**context.facts, **facts, "peak_memory_gib": peak_gib}
    run.finish(stage, context.folder, facts, wall_s)
    log_line(f"{stage.name}: done in {wall_s:.0f} s, peak memory {peak_gib} GiB")


def find_full(folder: Path) -> Path:
    """The full disk: the run's, or that of temporary files, where kernels are compiled."""
    temporary = Path(tempfile.gettempdir())
    return min(folder, temporary, key=lambda place: shutil.disk_usage(place).free)


def silence_libraries() -> None:
    """Silence the libraries before they are imported: our own progress bars say more."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    cache = find_ancestor(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")))
    if not os.access(cache, os.W_OK):  # vLLM would print a traceback
        place = Path(tempfile.gettempdir(), f"vllm-{os.getuid()}")
        os.environ.setdefault("VLLM_CACHE_ROOT", str(place))
    silence_warnings()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def find_module(stage: Stage) -> ModuleType:
    """With `run(stage, context)`, and `replay` if it can; imported when its turn comes."""
    return importlib.import_module(stage.module or f"r1pipe.stages.{stage.kind}")


def peak_memory_gib() -> float:
    """Peak resident memory of this process and its largest child, GiB."""
    kib = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return kib / 2**20
