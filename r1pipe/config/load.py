"""A recipe's YAML and the command line's `--set`, and errors that name the nearest key."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from r1pipe.config.base import STAGE_TYPES, ProblemSet
from r1pipe.config.recipe import Recipe
from r1pipe.utils.errors import UserError


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe. `overrides` are `key=value` pairs, such as `seed=1` or
    `stages.grpo.max_steps=2` (a stage by its name), the value in YAML.

    Raises UserError naming the file and the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        here = "" if path.is_absolute() else f", in {Path.cwd()}"
        raise UserError(f"{path}: cannot be read: {error.strerror}{here}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8") from error
    try:
        values = yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or f"not YAML: {error}"
        raise UserError(f"{path}: {where}{' '.join(problem.split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping with name and stages")
    for override in overrides or []:
        apply_override(values, override)
    Recipe.learn_kinds()
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, values)}") from error


class RecipeLoader(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML takes the last one."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._flat: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts what a mapping merges (`<<`) before its own keys: keys come twice from then on."""
        if node in self._flat:
            return
        self._flat.add(node)
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f'the key "{key.value}" comes twice', problem_mark=key.start_mark
                )
            keys.add(key.value)
        super().flatten_mapping(node)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Parts of a key are keys, and of a list a stage's name or a number from 0: rewards.0.weight,
    or rewards[0].weight."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f'"{override}": an override is written key=value')
    *path, last = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    node: Any = values
    for part in path:
        if isinstance(node, list):
            node = node[find_entry(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f'"{override}": "{part}" is not a section')
    try:
        new = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f'"{override}": cannot be set: {" ".join(str(error).split())}') from error
    node[find_entry(node, last, override) if isinstance(node, list) else last] = new


def find_entry(entries: list[Any], part: str, override: str) -> int:
    names = [str(e.get("name") or e.get("kind")) if isinstance(e, dict) else "" for e in entries]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    if any(isinstance(entry, dict) and "kind" in entry for entry in entries):
        raise UserError(f'"{override}": no stage "{part}"; there are {", ".join(names)}')
    there = f"0 to {len(entries) - 1}" if entries else "none"
    raise UserError(f'"{override}": no entry "{part}" in the list; there are {there}')


def describe_error(error: ValidationError, values: dict[str, Any]) -> str:
    """pydantic's first complaint as `key: what is wrong`, with the nearest key if it is unknown."""
    first = error.errors()[0]
    location = list(first["loc"])
    if len(location) >= 2 and location[0] == "stages" and isinstance(location[1], int):
        raw = values["stages"][location[1]]
        name = (raw.get("name") or raw.get("kind")) if isinstance(raw, dict) else None
        # pydantic inserts the discriminator's value after the index.
        location = ["stages", name or location[1], *leave_out_numbers(location[3:], raw)]
    key = ".".join(str(part) for part in location)
    prefix = f"{key}: " if key else ""
    if first["type"] == "extra_forbidden":
        return f"{prefix}unknown key; {suggest_key(first['loc'], values)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{prefix}required key is missing"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{prefix}kind must be one of {', '.join(STAGE_TYPES)}"
    if not isinstance(first.get("input"), dict | list):
        return f"{prefix}{message} (got {first.get('input')!r:.80})"
    return f"{prefix}{message}"


def leave_out_numbers(location: list[str | int], given: Any) -> Iterator[str | int]:
    """The location as the user wrote it: without the 0 where one item stands for a list of one."""
    for part in location:
        if isinstance(part, int) and not isinstance(given, list):
            continue
        try:
            given = given[part]
        except (KeyError, TypeError, IndexError):
            given = None
        yield part


def suggest_key(location: tuple[str | int, ...], values: dict[str, Any]) -> str:
    """A hint for the unknown key at `location`: a similar name that is not given yet, or the
    section that has the key."""
    key = str(location[-1])
    models: list[type[BaseModel]] = [Recipe]
    given: Any = values
    for part in location[:-1]:
        if isinstance(given, list) or part in getattr(given, "keys", tuple)():
            given = given[part]
        if part in STAGE_TYPES and len(models) == 1:
            models.append(STAGE_TYPES[part])
        elif nested := list_sections(models[-1]).get(str(part)):
            models.append(nested)
    known = list_keys(models[-1])
    left = [name for name in known if not isinstance(given, dict) or name not in given]
    if near := difflib.get_close_matches(key, left, n=1, cutoff=0.7):
        return f"did you mean {near[0]}?"
    sections = list_sections(models[-1]) | list_sections(Recipe)
    if found := next((name for name, section in sections.items() if key in list_keys(section)), ""):
        return f"did you mean {found}.{key}?"
    if key in list_keys(Recipe):
        return f"{key} is a key of the recipe itself"
    if issubclass(models[-1], ProblemSet):
        return f"did you mean options.{key}? Known keys: {', '.join(sorted(known))}"
    return f"known keys: {', '.join(sorted(known))}"


def list_keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def list_sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The keys whose values are sections themselves."""
    sections = {}
    for name, field in model.model_fields.items():
        nested = [t for t in walk_types(field.annotation) if issubclass(t, BaseModel)]
        if nested and name != "stages":
            sections[field.alias or name] = nested[0]
    return sections


def walk_types(annotation: Any) -> list[type]:
    """All classes inside a possibly generic annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [t for arg in get_args(annotation) for t in walk_types(arg)]
