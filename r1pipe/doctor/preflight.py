"""Checks before a stage, so that it fails in its first second, not in its last hour."""

from collections.abc import Callable, Iterable

from r1pipe.config.base import Stage
from r1pipe.config.recipe import Recipe
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.doctor.inputs import Inputs
from r1pipe.doctor.machine import Diagnosis, Status, examine_machine
from r1pipe.doctor.memory import Devices
from r1pipe.doctor.recipe import CHECKPOINT_CHECKS, examine_recipe, examine_stage
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line


class Preflight:
    """The quick checks of the doctor: of all stages before the first one, and of a stage's
    checkpoints once they exist. Rank 0 looks; a failure ends every rank."""

    def __init__(
        self,
        recipe: Recipe,
        devices: Devices,
        stages: list[Stage],
        problem_sets: ProblemSets,
        skip: bool = False,
    ):
        self._recipe, self._devices, self._problem_sets = recipe, devices, problem_sets
        self._waiting: set[str] = set()
        if not skip:
            self._waiting = self._look(
                lambda inputs: [*examine_machine(), *examine_recipe(inputs, stages)]
            )

    def begin(self, stage: Stage) -> None:
        """Raises UserError, as the constructor does, with a line for each FAIL."""
        if stage.name in self._waiting:
            self._look(lambda inputs: examine_stage(stage, inputs, CHECKPOINT_CHECKS))

    def _look(self, examine: Callable[[Inputs], Iterable[Diagnosis]]) -> set[str]:
        # New inputs each time: a stage that is made again has another tokenizer.
        inputs = Inputs(
            self._recipe, self._devices, about_to_run=True, problem_sets=self._problem_sets
        )
        return distributed.on_first_rank(lambda: self._report(examine(inputs)))

    def _report(self, diagnoses: Iterable[Diagnosis]) -> set[str]:
        """Log warnings and counts; the names of the stages with skipped checks."""
        by_status: dict[Status, list[Diagnosis]] = {}
        for diagnosis in diagnoses:
            by_status.setdefault(diagnosis.status, []).append(diagnosis)
            if diagnosis.status == "warn":
                log_line(str(diagnosis))
        if failed := by_status.get("FAIL"):
            # A fault of a model is one line, however many stages read it.
            told = {d.detail: d for d in reversed(failed)}
            raise UserError("\n".join(f"{d.what}: {d.detail}" for d in [*told.values()][::-1]))
        skipped = by_status.get("skipped", [])
        later = f", {len(skipped)} cannot be made yet" if skipped else ""
        log_line(f"doctor: {len(by_status.get('ok', []))} checks ok{later}")
        return {diagnosis.what.partition(":")[0] for diagnosis in skipped}
