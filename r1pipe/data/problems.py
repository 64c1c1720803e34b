"""Problems: loads a recipe in data/ and checks every row.

A recipe is a file with `load(split, **options)` that yields dicts (data/README.md has the schema).
It is loaded by path, not imported by name, so a user's own file works like one of ours.
"""

import ast
import difflib
import functools
import importlib.util
import inspect
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from r1pipe.config.base import ProblemSet
from r1pipe.data.formats import BrokenRow, find_format
from r1pipe.data.rows import FilteredRow
from r1pipe.data.tables import describe_here, hint_at
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.jsonl import read_jsonl

PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = PACKAGE / "data_recipes"
SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else PACKAGE.parent / "data"
"""Our own recipes: inside the package in a wheel, beside it in a clone."""
DATA_DIRS = (Path("data"), SHIPPED)
"""Where a recipe's bare name is looked up: the working folder's data/, then ours."""

COLUMNS = tuple(f.name for f in fields(Problem) if f.name != "extra")
TEXTS = ("id", "kind", "answer", "source", "category")
TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
ROLES = ("system", "developer", "user", "assistant", "tool")

NEEDED = {"math": "answer", "code": "tests", "task": "tests", "text": "solution"}
"""The kinds of problems, and the column that each needs."""


@dataclass(frozen=True)
class Loaded:
    """A recipe's problems, and its broken and filtered rows."""

    problems: list[Problem]
    num_rows: int
    broken: list[BrokenRow]
    filtered: Counter[str]
    """Number of filtered rows by reason."""

    def steps(self) -> list[tuple[str, int]]:
        """Number of rows in all, then after each filter."""
        left = self.num_rows
        steps = [("rows", left)]
        for name, dropped in {"broken rows": len(self.broken), **self.filtered}.items():
            if dropped:
                left -= dropped
                steps.append((name, left))
        return steps

    def describe(self) -> str:
        (_, num_rows), *filters = self.steps()
        return f"{num_rows} rows" + "".join(f", {left} after {name}" for name, left in filters)


def load_problems(source: ProblemSet) -> list[Problem]:
    """The problems of a recipe; see `load_set`."""
    return load_set(source).problems


def load_set(source: ProblemSet) -> Loaded:
    """All problems of a recipe, each row checked.

    Raises UserError naming recipe and row for a broken row, unless `on_broken_row` is skip; also if
    no row is left, or an option is wrong.
    """
    path = find_recipe(source.recipe)
    name = describe_recipe(source)
    load = load_function(path)
    check_options(load, source.options, name, is_ours=path.resolve().parent == SHIPPED)
    problems: list[Problem] = []
    broken: list[BrokenRow] = []
    filtered: Counter[str] = Counter()
    seen: dict[str, str] = {}
    number = 0
    try:
        for number, row in enumerate(load(source.split, **source.options), 1):
            if isinstance(row, FilteredRow):
                filtered[row.reason] += 1
                continue
            item = row if isinstance(row, BrokenRow) else read_row(row, number, seen)
            if isinstance(item, Problem):
                problems.append(item)
            elif source.on_broken_row == "skip":
                broken.append(item)
            else:
                raise UserError(f"{name}: {item} (on_broken_row: skip leaves such rows out)")
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's own recipe may raise anything
        raise UserError(f"{name}: {describe_error(error, path, number)}") from error
    if not problems:
        place = source.options.get("path")
        where = f"{name}: {place}" if isinstance(place, str) else name
        counts = "".join(f", {count} rows {reason}" for reason, count in filtered.items())
        why = f" in order; {broken[0]}" if broken else counts
        raise UserError(f'{where}: split "{source.split}": no rows{why}')
    return Loaded(problems, number, broken, filtered)


def describe_recipe(source: ProblemSet) -> str:
    """Ours by name, a user's own by its file."""
    is_file = source.recipe.endswith(".py")
    return source.recipe if is_file else f"recipe {source.recipe}"


def describe_error(error: BaseException, path: Path, number: int) -> str:
    """In one line. Errors other than OSError and ValueError come with the line in the recipe's file
    and the number of rows before."""
    if isinstance(error, OSError | ValueError) and str(error).strip():
        return first_line(error)
    file = str(path.absolute())
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    line = f"line {lines[-1]}, " if lines else ""
    return f"{line}after {number} rows: {first_line(error, with_type=True)}"


def load_traces(path: Path) -> Loaded:
    """The traces of an earlier stage."""
    problems = []
    for number, row in read_jsonl(path):
        try:
            problems.append(check_row(row))
        except ValueError as error:
            raise UserError(f"{path}: row {number}: {error}") from error
    return Loaded(problems, len(problems), [], Counter())


def read_row(row: object, number: int, seen: dict[str, str]) -> Problem | BrokenRow:
    """A row as a Problem; a BrokenRow if it is none, or if its id is in `seen` already. Adds the id
    and its place to `seen`."""
    place = getattr(row, "place", "") or f"row {number}"
    try:
        problem = check_row(row)
    except ValueError as error:
        return BrokenRow(number, str(error), place)
    if problem.id in seen:
        reason = f'the id "{problem.id}" occurs twice, first in {seen[problem.id]}'
        return BrokenRow(number, reason, place)
    seen[problem.id] = place
    return problem


def find_recipe(name: str) -> Path:
    own = Path(name).expanduser()
    if name.endswith(".py"):
        if not own.is_file():
            raise UserError(f"{name}: no such data recipe{describe_here(own)}")
        return own
    for folder in DATA_DIRS:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    if find_format(own) or "/" in name:
        raise UserError(f"{name}: no data recipe; for rows use recipe columns, with options.path")
    known = sorted({p.stem for folder in DATA_DIRS for p in folder.glob("*.py")})
    raise UserError(f'no data recipe "{name}"; {hint_at(name, known)}')


def read_constants(recipe: str) -> dict[str, str]:
    """LICENSE and HUB_ID of a data recipe, without running it."""
    try:
        tree = ast.parse(find_recipe(recipe).read_text(encoding="utf-8"))
    except (UserError, OSError, SyntaxError):
        return {}
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def load_function(path: Path) -> Callable[..., Iterable[dict]]:
    spec = importlib.util.spec_from_file_location(f"r1pipe_data_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        what = first_line(error, with_type=True)
        raise UserError(f"{path}: cannot be imported: {what}") from error
    if not callable(getattr(module, "load", None)):
        raise UserError(f"{path}: a data recipe defines load(split, **options)")
    return module.load


def check_options(load: Callable, options: dict, name: str, is_ours: bool) -> None:
    """Raises UserError for an option that `load` does not take or a needed one that is missing; for
    our own recipes, also for one of the wrong type."""
    _, *parameters = inspect.signature(load).parameters.values() or (None,)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    for option in options:
        if option not in known:
            raise UserError(f'{name}: no option "{option}"; {hint_at(option, known)}')
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f'{name}: the option "{parameter.name}" is needed')
        if is_ours and parameter.name in options:
            value = options[parameter.name]
            try:
                TypeAdapter(parameter.annotation).validate_python(value, strict=True)
            except ValidationError as error:
                what = error.errors()[0]["msg"]
                raise UserError(
                    f"{name}: options.{parameter.name}: {what} (got {value!r})"
                ) from error


def check_row(row: object) -> Problem:
    """A row as a Problem. Raises ValueError for what is missing or wrong."""
    if not isinstance(row, dict):
        raise ValueError("not a dict")
    extra = {key: value for key, value in row.items() if key not in COLUMNS}
    for column in extra:
        check_extra(column)
    more = extra.pop("extra", None) or {}
    if not isinstance(more, dict):
        raise ValueError('"extra" is a dict of further columns')
    extra |= more
    for column in TEXTS:
        if not isinstance(row.get(column), str | None):
            raise ValueError(f'"{column}" is {type(row[column]).__name__}, not a string')
    for column in ("id", "kind", "prompt"):
        if not row.get(column):
            raise ValueError(f'no "{column}"')
    if row["kind"] not in NEEDED:
        raise ValueError(f'kind "{row["kind"]}": there are {", ".join(NEEDED)}')
    check_prompt(row["prompt"])
    check_solution(row.get("solution"))
    if is_missing(row.get(NEEDED[row["kind"]])):
        raise ValueError(f'(id {row["id"]}): no "{NEEDED[row["kind"]]}"')
    values = {c: row[c] for c in COLUMNS if c in row} | {"extra": extra or None}
    values |= {"source": row.get("source") or "", "category": row.get("category") or ""}
    check_writable(values)
    return Problem(**values)


def check_writable(values: dict) -> None:
    """Raises ValueError for values that cannot be written as JSON in UTF-8."""
    texts = [*(values.get(column) for column in TEXTS), *(m["content"] for m in values["prompt"])]
    others = [values.get("tests"), values["extra"], *(m for m in values["prompt"] if len(m) > 2)]
    (texts if isinstance(solution := values.get("solution"), str) else others).append(solution)
    try:
        if any(others):
            texts.append(json.dumps(others, ensure_ascii=False))
        for text in texts:
            if text and not text.isascii():
                text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a character (a lone surrogate such as \\ud83d)") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot be written as JSON: {first_line(error)}") from error


@functools.cache
def check_extra(column: object) -> None:
    """Raises ValueError if the name of a further column looks like a misspelt one of ours, or is
    another argument of rewards."""
    near = difflib.get_close_matches(str(column), COLUMNS, n=1, cutoff=0.7)
    if near:
        raise ValueError(f'unknown column "{column}"; did you mean {near[0]}?')
    if column in TAKEN or not str(column).isidentifier():
        raise ValueError(f'a column cannot be called "{column}": give it another name')


def check_prompt(prompt: object) -> None:
    """Raises ValueError unless it is a conversation that the assistant answers next."""
    if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
        raise ValueError('"prompt" is a list of messages, each with role and content')
    for number, message in enumerate(prompt, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f'message {number} of the prompt: no role "{role}"; {hint_at(str(role), ROLES)}'
            )
        if not isinstance(content, str) or message.get("tool_calls"):
            what = "tool calls" if "tool_calls" in message else type(content).__name__
            raise ValueError(f"message {number} of the prompt: its content is {what}, not text")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "the prompt ends with the assistant's answer, which is to be the solution (recipe "
            "columns: name the column as messages instead of prompt)"
        )
    if not any(m["role"] in ("user", "tool") and m["content"].strip() for m in prompt):
        raise ValueError("the prompt is empty: no message of the user has text")


def check_solution(solution: object) -> None:
    """Raises ValueError unless it is text, missing, or turns from the assistant's first to its
    last."""
    if not isinstance(solution, list):
        if not isinstance(solution, str | None):
            raise ValueError(f'"solution" is {type(solution).__name__}, not a string or messages')
        return
    for number, message in enumerate(solution, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} of the solution: no role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} of the solution: its content is not text")
    ends = {message["role"] for message in (solution[:1] + solution[-1:])}
    if ends != {"assistant"}:
        raise ValueError("the solution begins and ends with the assistant's messages")


def is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return (
        value is None or isinstance(value, float) or (isinstance(value, list | dict) and not value)
    )
