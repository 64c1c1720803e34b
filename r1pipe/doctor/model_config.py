"""The config of a stage's model, before the stage has run."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from r1pipe.config.base import Stage
from r1pipe.config.recipe import Recipe
from r1pipe.models.hub_cache import reaches_hub
from r1pipe.models.quirks import find_quirks
from r1pipe.models.yarn import check_yarn_keys
from r1pipe.utils.errors import first_line


def find_stage_config(stage: Stage, recipe: Recipe) -> PretrainedConfig:
    """The config of the stage's model. Raises ValueError if it cannot be read."""
    settings = stage.new_model
    if settings is None:
        if stage.weights_from is None:
            raise ValueError(f'the stage "{stage.name}" makes no checkpoint')
        return find_config(stage.weights_from, recipe)
    if stage.taught_by:
        teacher = find_config(stage.taught_by[0], recipe).get_text_config()
        settings = {"vocab_size": teacher.vocab_size, **settings}
    return make_config(settings)


def find_config(source: str, recipe: Recipe) -> PretrainedConfig:
    """By a stage's name, a folder or a hub id. Raises ValueError if it cannot be read."""
    stage = recipe.stage(source)
    if stage is not None:
        return find_stage_config(stage, recipe)
    folder = Path(source).expanduser()
    try:
        # The hub last: without a connection it retries for a minute.
        here = folder.is_dir() or not reaches_hub()
        where = folder if folder.is_dir() else source
        return AutoConfig.from_pretrained(where, local_files_only=here)
    except Exception as error:  # a config may hold anything
        raise ValueError(
            f'no config of "{source}" found (a folder with its config.json is enough)'
        ) from error


def make_config(settings: dict[str, Any]) -> PretrainedConfig:
    """Raises ValueError for settings that transformers does not accept, UserError as
    `check_yarn_keys` does."""
    check_yarn_keys(settings)
    settings = deepcopy(settings)
    model_type = settings.pop("model_type", "")
    try:
        return AutoConfig.for_model(model_type, **find_quirks(model_type).config | settings)
    except Exception as error:  # each checks its values in its own way
        raise ValueError(first_line(error)) from error
