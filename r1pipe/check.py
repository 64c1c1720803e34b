"""Looks at a recipe before anything is run: its data's rows, its rewards, its run folder."""

from collections.abc import Iterator

from r1pipe.config import Grpo, Recipe, Stage
from r1pipe.errors import UserError
from r1pipe.inputs import check_solutions
from r1pipe.problems import read_problems
from r1pipe.scoring import Scorer, list_rewards
from r1pipe.tracking import check_tracking


def check_recipe(recipe: Recipe, devices: str | None = None) -> Iterator[str]:
    """One line per stage, and one about the memory of each that trains, on such devices ("8x80GB")
    or this machine. Raises UserError at the first thing that is wrong."""
    from r1pipe.memory import Devices, estimate_stage

    check_tracking(recipe)
    given = Devices.parse(devices) if devices else Devices.here(recipe.device)
    yield f"{recipe.name}: {len(recipe.stages)} stages, run folder {recipe.run_dir}"
    for stage in recipe.stages:
        if line := estimate_stage(stage, recipe, given):
            yield line
    for stage in recipe.stages:
        yield check_stage(stage)


def check_stage(stage: Stage) -> str:
    check_functions(stage)
    counts = []
    for source in stage.problem_sets():
        if source.recipe is not None:
            loaded = read_problems(source)
            check_solutions(stage, source, loaded.problems)
            filtered = len(loaded.problems) < loaded.num_rows
            of_rows = f" ({loaded.describe()})" if filtered else ""
            counts.append(
                f"{source.recipe}/{source.split}: {len(loaded.problems)} problems{of_rows}"
            )
    return f"{stage.name}: {', '.join(counts) or 'ok'}"


def check_functions(stage: Stage) -> None:
    """Raises UserError for a reward or loss that does not exist or take its options."""
    Scorer(list_rewards(stage))
    if isinstance(stage, Grpo):
        check_loss(stage)


def check_loss(stage: Grpo) -> None:
    from r1pipe.grpo.losses import find_loss

    try:
        find_loss(stage.loss_type)
    except ValueError as error:
        raise UserError(f"stages.{stage.name}.loss_type: {error}") from error
