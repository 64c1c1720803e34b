"""Imports of functions by their dotted names in a recipe, with errors that a user can fix."""

import importlib
import re
import traceback
from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from r1pipe.utils.errors import UserError

RewardFunction = Callable[..., list[float | None] | Awaitable[list[float | None]]]


def find_reward(name: str) -> RewardFunction:
    """Raises UserError for any error of the import."""
    return import_named("reward", name)


def import_named(key: str, name: str, is_wanted: Callable[[Any], bool] = callable) -> Any:
    """The object at the dotted name under a recipe's `key`. Raises UserError for any error of the
    import."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) or name.endswith(".py"):
        # A path: the file is a module, found from the folder that it lies in.
        module, _, function = re.sub(r"\.py\b:?", ".", Path(name).name).rpartition(".")
        example = f"{module}.{function or 'FUNCTION'}" if module else "rewards.math_correct"
        raise UserError(
            f'{key} "{name}": give a dotted name, module and function, such as {example}'
        )
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        what = describe_failure(error)
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{module_name}.".startswith(f"{absent}."):
            what = f'no module "{absent}", installed or in {Path.cwd()}'
        raise UserError(f'{key} "{name}": {what}') from error
    found = getattr(module, attribute, None)
    if not is_wanted(found):
        known = [n for n, value in vars(module).items() if is_wanted(value) and n[0] != "_"]
        near = get_close_matches(attribute, known, n=1)
        hint = f"; did you mean {module_name}.{near[0]}?" if near else ""
        own = Path.cwd() / "rewards.py"
        if module_name == "rewards" and own.exists():
            hint += f" ({own} has the name of r1pipe's own package: rename it)"
        raise UserError(f'{key} "{name}": {module_name} has no function "{attribute}"{hint}')
    return found


def describe_failure(error: BaseException) -> str:
    """A user's error and its place, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and f.filename != __file__]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({error.filename}:{error.lineno})"
        error = type(error)(error.msg)
    return " ".join(f"{type(error).__name__}: {error}".split()) + where
