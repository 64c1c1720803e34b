"""Problems: loads the recipes in data/ by path and checks every row.

A recipe is a file with `load(split, **options)` that yields dicts (data/README.md has the schema).
Recipes are loaded by path, never imported by name, so a user's own file is as good as ours.
"""

import ast
import difflib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from r1pipe.config import ProblemSet
from r1pipe.datasets_io import BrokenRow, FilteredRow
from r1pipe.errors import UserError
from r1pipe.records import Problem, read_jsonl

DATA_DIRS = (Path("data"), Path(__file__).resolve().parent.parent / "data")
"""Where a recipe's bare name is looked up: here, then beside the package."""

COLUMNS = tuple(f.name for f in fields(Problem))

NEEDED = {"math": "answer", "code": "tests", "task": "tests", "text": "solution"}
"""The kinds of problems, and the column that each cannot do without."""


@dataclass(frozen=True)
class Loaded:
    """A recipe's problems, and what became of its other rows."""

    problems: list[Problem]
    num_rows: int
    broken: list[BrokenRow]
    filtered: Counter[str]
    """Rows that the recipe did not want, by reason."""

    def steps(self) -> list[tuple[str, int]]:
        """How many rows were left after each filter, all of them first."""
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
    """The problems of a recipe; see `read_problems`."""
    return read_problems(source).problems


def read_problems(source: ProblemSet) -> Loaded:
    """All problems of a recipe, each row checked, and how many rows there were.

    Raises UserError naming the recipe and the row for a broken one, unless `on_broken_row` is skip;
    also if no row is left, or the recipe's options are wrong.
    """
    path = find_recipe(source.recipe)
    load = load_function(path)
    check_options(load, source.options, path)
    problems: list[Problem] = []
    broken: list[BrokenRow] = []
    filtered: Counter[str] = Counter()
    seen: set[str] = set()
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
                raise UserError(
                    f"{path} (split {source.split}): row {item.number}: {item.reason} "
                    "(on_broken_row: skip goes on without such rows)"
                )
    except (OSError, ValueError, KeyError) as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if isinstance(error, KeyError):
            message = f"row {number + 1}: no column {error}"
        raise UserError(f"{path}: {message}") from error
    if not problems:
        why = f"; row {broken[0].number}: {broken[0].reason}" if broken else ""
        raise UserError(f'{path}: split "{source.split}" has no rows in order{why}')
    return Loaded(problems, number, broken, filtered)


def read_traces(path: Path) -> Loaded:
    """The traces that an earlier stage has written."""
    problems = []
    for number, row in read_jsonl(path):
        try:
            problems.append(check_row(row))
        except ValueError as error:
            raise UserError(f"{path}: row {number}: {error}") from error
    return Loaded(problems, len(problems), [], Counter())


def read_row(row: object, number: int, seen: set[str]) -> Problem | BrokenRow:
    """A row as a Problem, its id added to `seen`; a broken one if it is none or was there."""
    try:
        problem = check_row(row)
    except ValueError as error:
        return BrokenRow(number, str(error))
    if problem.id in seen:
        return BrokenRow(number, f'the id "{problem.id}" occurs twice')
    seen.add(problem.id)
    return problem


def find_recipe(name: str) -> Path:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such data recipe")
        return Path(name)
    for folder in DATA_DIRS:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    known = sorted({p.stem for folder in DATA_DIRS for p in folder.glob("*.py")})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise UserError(f'no data recipe "{name}" in data/; {hint}')


def read_constants(recipe: str) -> dict[str, str]:
    """LICENSE and HUB_ID of a data recipe, which is read and not run."""
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
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "load", None)):
        raise UserError(f"{path}: a data recipe defines load(split, **options)")
    return module.load


def check_options(load: Callable, options: dict, path: Path) -> None:
    """An option that `load` does not take is an error that names the nearest one it does."""
    parameters = inspect.signature(load).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name != "split"]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise UserError(f'{path}: no option "{option}"; {hint}')
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            raise UserError(f'{path}: the option "{name}" is needed')


def check_row(row: object) -> Problem:
    """A row as a Problem. Raises ValueError for what is missing or wrong."""
    if not isinstance(row, dict):
        raise ValueError("not a dict")
    if unknown := [key for key in row if key not in COLUMNS]:
        raise ValueError(f'unknown column "{unknown[0]}"; known: {", ".join(COLUMNS)}')
    for column in ("id", "kind", "prompt"):
        if not row.get(column):
            raise ValueError(f'no "{column}"')
    prompt, needed = row["prompt"], NEEDED.get(row["kind"])
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    ):
        raise ValueError('"prompt" is a list of messages, each with role and content')
    if needed is None:
        raise ValueError(f'kind "{row["kind"]}": there are {", ".join(NEEDED)}')
    if row.get(needed) in (None, ""):
        raise ValueError(f'(id {row["id"]}): no "{needed}"')
    for column in ("answer", "solution"):
        if not isinstance(row.get(column), str | None):
            raise ValueError(f'(id {row["id"]}): "{column}" is not a string')
    return Problem(**row)
