"""Metrics to TensorBoard, W&B, trackio or MLflow, by accelerate's trackers, beside metrics.jsonl.

One run of the tracker per stage, called `<run>-<stage>`, in the recipe's `tracking_project`.
TensorBoard writes to `runs/<name>/tensorboard/`; the others go where their own settings and
environment say (WANDB_MODE, TRACKIO_DIR, MLFLOW_TRACKING_URI, ...).
"""

import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from r1pipe.config.base import Stage
from r1pipe.config.recipe import Recipe
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

LOGIN_TIMEOUT_S = 60
"""W&B would otherwise wait for a key to be typed."""


def check_tracking(recipe: Recipe) -> None:
    """Raises UserError for a tracker whose package is missing."""
    for name in recipe.tracking:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'tracking: {name} is not installed: pip install "r1pipe[{name}]", or leave it out'
            )


class Tracking:
    """The trackers of one stage, opened with its first metrics; a context manager. A tracker that
    fails is dropped with a warning. Rank 0 only."""

    def __init__(self, recipe: Recipe, stage: Stage):
        self.recipe, self.stage = recipe, stage
        self._trackers: dict[str, GeneralTracker] | None = None

    def log(self, metrics: dict[str, Any]) -> None:
        """A row of metrics.jsonl, under the same names, without nulls."""
        if not self.recipe.tracking or not distributed.is_first():
            return
        if self._trackers is None:
            self._trackers = {}
            for name in self.recipe.tracking:
                self._try(name, lambda name=name: self._open(name, metrics["step"]))
        values = {
            key: value
            for key, value in metrics.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step=metrics["step"]))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *error: object) -> None:
        for name, tracker in list((self._trackers or {}).items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a network or a service comes up with
            self._trackers.pop(name, None)
            what = str(error).strip().splitlines() or [type(error).__name__]
            log_line(f"{self.stage.name}: warning: tracking continues without {name}: {what[0]}")

    def _open(self, name: str, first_step: int) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if not PartialState._shared_state:  # accelerate's own log asks for it
            PartialState(cpu=self.recipe.device == "cpu")
        kind, project = LOGGER_TYPE_TO_CLASS[name], self.recipe.tracking_project
        run_name = f"{self.recipe.name}-{self.stage.name}"
        if name == "tensorboard":
            # After a resume, repeated steps replace the old ones.
            folder = self.recipe.run_dir / name
            tracker = kind(self.stage.name, folder, purge_step=first_step)
        elif name == "wandb":
            settings = {"login_timeout": LOGIN_TIMEOUT_S}
            tracker = kind(project, name=run_name, dir=self.recipe.run_dir, settings=settings)
        elif name == "mlflow":
            tracker = kind(project, run_name=run_name)
        else:
            tracker = kind(project, name=run_name)
        tracker.start()
        self._trackers[name] = tracker
        tracker.store_init_configuration(describe_settings(self.recipe, self.stage))


def describe_settings(recipe: Recipe, stage: Stage) -> dict[str, str | int | float | bool]:
    """The recipe and the stage, flat: `stage.train.learning_rate`, `engine.max_num_seqs`."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude={"stages"})
    values["stage"] = stage.model_dump(mode="json", by_alias=True)
    return flatten(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float | bool)
            flat[f"{prefix}{key}"] = value if plain else str(value)
    return flat
