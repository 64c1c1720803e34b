"""What is checked before a stage, so that it fails in its first second, not its last hour."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from r1pipe.config.base import Stage
from r1pipe.config.recipe import Recipe
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.doctor.machine import Diagnosis, Status, examine_machine
from r1pipe.doctor.recipe import Doctor
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line

if TYPE_CHECKING:
    from r1pipe.doctor.memory import Devices


class Preflight:
    """What the doctor says before stages run, quickly: of all of them when the first one begins,
    and of what a stage starts from when that is there. Rank 0 looks, and every rank ends."""

    def __init__(
        self,
        recipe: Recipe,
        devices: "Devices",
        stages: list[Stage],
        problem_sets: ProblemSets,
        skip: bool = False,
    ):
        self._recipe, self._devices, self._problem_sets = recipe, devices, problem_sets
        self._waiting: set[str] = set()
        if not skip:
            self._waiting = self._look(lambda d: [*examine_machine(), *d.examine(stages)])

    def begin(self, stage: Stage) -> None:
        """Raises UserError, as the constructor does, with a line for each FAIL."""
        if stage.name in self._waiting:
            self._look(lambda doctor: doctor.examine_inputs(stage))

    def _look(self, examine: Callable[[Doctor], Iterable[Diagnosis]]) -> set[str]:
        # A doctor of its own each time: a stage that is made again has another tokenizer.
        doctor = Doctor(self._recipe, self._devices, False, self._problem_sets)
        return distributed.on_first_rank(lambda: self._report(examine(doctor)))

    def _report(self, diagnoses: Iterable[Diagnosis]) -> set[str]:
        """Names of the stages of which something could not be looked at."""
        by_status: dict[Status, list[Diagnosis]] = {}
        for diagnosis in diagnoses:
            by_status.setdefault(diagnosis.status, []).append(diagnosis)
            if diagnosis.status == "warn":
                log_line(str(diagnosis))
        if failed := by_status.get("FAIL"):
            # What is wrong with a model is so for every stage that reads it.
            told = {d.detail: d for d in reversed(failed)}
            raise UserError("\n".join(f"{d.what}: {d.detail}" for d in [*told.values()][::-1]))
        skipped = by_status.get("skipped", [])
        later = f", {len(skipped)} cannot be made yet" if skipped else ""
        log_line(f"doctor: {len(by_status.get('ok', []))} checks ok{later}")
        return {diagnosis.what.partition(":")[0] for diagnosis in skipped}
