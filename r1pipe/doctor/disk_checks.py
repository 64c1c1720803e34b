"""Checks of the run folder and of free disk space."""

import shutil
import tempfile
from pathlib import Path

from r1pipe.config.base import Stage
from r1pipe.config.recipe import Recipe
from r1pipe.doctor.machine import Diagnosis
from r1pipe.utils.progress import format_size

GIB = 2**30
TEMPORARY = 100 * 2**20
"""Bytes needed for temporary files: vLLM's and torch's compilers write there."""


def examine_folder(recipe: Recipe) -> Diagnosis:
    folder = find_ancestor(recipe.run_dir)
    places = (recipe.run_dir, *recipe.run_dir.parents)
    if file := next((place for place in places if place.is_file()), None):
        return Diagnosis("run folder", "FAIL", f"{file} is a file, not a folder; set runs_dir")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Diagnosis(
            "run folder",
            "FAIL",
            f"{recipe.run_dir}: cannot be written: {error.strerror}; set runs_dir",
        )
    return Diagnosis("run folder", "ok", f"{recipe.run_dir} can be written")


def examine_disk(recipe: Recipe, stages: list[Stage]) -> Diagnosis:
    """Space for every stage's checkpoint, and for the largest stage's checkpoints to resume."""
    from r1pipe.doctor.memory import estimate_files

    kept, meanwhile, unknown = 0.0, 0.0, []
    for stage in stages:
        try:
            files = estimate_files(stage, recipe)
        except Exception:  # a config may lack anything; the stage's own checks tell
            unknown.append(stage.name)
            continue
        kept, meanwhile = kept + files.kept, max(meanwhile, files.meanwhile)
    free = shutil.disk_usage(find_ancestor(recipe.run_dir)).free
    rest = recipe.doctor.free_disk_gib * GIB
    line = (
        f"{format_size(free)} free; checkpoints take about {format_size(kept)}, and "
        f"{format_size(meanwhile)} while a stage runs"
    )
    if unknown:
        line += f", besides those of {', '.join(unknown)}, whose size is not known"
    try:
        temporary = Path(tempfile.gettempdir())
        left = shutil.disk_usage(temporary).free
    except OSError as error:
        return Diagnosis("disk", "FAIL", f"no folder for temporary files: {error.strerror}")
    if left < TEMPORARY:
        what = f"{temporary}: {format_size(left)} free for temporary files, "
        what += f"{format_size(TEMPORARY)} are needed: make room or set TMPDIR"
        return Diagnosis("disk", "FAIL", what)
    if free < kept + meanwhile + rest:
        what = f"{line}; {format_size(rest)} must stay free: make room or set runs_dir"
        return Diagnosis("disk", "FAIL", what)
    return Diagnosis("disk", "ok", line)


def find_ancestor(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
