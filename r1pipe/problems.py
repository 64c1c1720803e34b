"""Problems: loads the recipes in data/ by path, checks every row, keeps held-out problems out.

A recipe is a file with `load(split, **options)` that yields dicts (data/README.md has the schema).
Recipes are loaded by path, never imported by name, so a user's own file is as good as ours.
"""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from r1pipe.config import ProblemSet
from r1pipe.errors import UserError
from r1pipe.records import Problem

DATA_DIRS = (Path("data"), Path(__file__).resolve().parent.parent / "data")
"""Where a recipe's bare name is looked up: here, then beside the package."""

COLUMNS = tuple(f.name for f in fields(Problem))


def load_problems(source: ProblemSet) -> list[Problem]:
    """All problems of a recipe, each row checked.

    Raises UserError naming the recipe and the row.
    """
    path = find_recipe(source.recipe)
    load = load_function(path)
    check_options(load, source.options, path)
    problems: list[Problem] = []
    seen: set[str] = set()
    try:
        for number, row in enumerate(load(source.split, **source.options), 1):
            problem = check_row(row, f"{path} (split {source.split}): row {number}")
            if problem.id in seen:
                raise UserError(f'{path}: row {number}: the id "{problem.id}" occurs twice')
            seen.add(problem.id)
            problems.append(problem)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if isinstance(error, KeyError):
            message = f"row {len(problems) + 1}: no column {error}"
        raise UserError(f"{path}: {message}") from error
    if not problems:
        raise UserError(f'{path}: split "{source.split}" has no rows')
    return problems


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


def check_row(row: object, where: str) -> Problem:
    """A row as a Problem. Raises UserError, starting with `where`, for what is missing or wrong."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a dict")
    if unknown := [key for key in row if key not in COLUMNS]:
        raise UserError(f'{where}: unknown column "{unknown[0]}"; known: {", ".join(COLUMNS)}')
    for column in ("id", "kind", "prompt"):
        if not row.get(column):
            raise UserError(f'{where}: no "{column}"')
    prompt = row["prompt"]
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    ):
        raise UserError(f'{where}: "prompt" is a list of messages, each with role and content')
    verdict = "tests" if row["kind"] == "code" else "answer"
    if row.get(verdict) in (None, ""):
        raise UserError(f'{where} (id {row["id"]}): no "{verdict}"')
    if not isinstance(row.get("answer"), str | None):
        raise UserError(f'{where} (id {row["id"]}): "answer" is not a string')
    return Problem(**row)


@dataclass(frozen=True)
class Decontaminated:
    """What `decontaminate` kept, and what it found."""

    kept: list[Problem]
    num_dropped: int

    @property
    def overlap_rate(self) -> float:
        return self.num_dropped / max(1, self.num_dropped + len(self.kept))


def decontaminate(training: list[Problem], heldout: list[Problem], ngram: int) -> Decontaminated:
    """Drop training problems that share `ngram` words in a row with a held-out problem.

    A held-out problem shorter than that is compared whole: a training problem is dropped if it
    contains all its words in a row. Words are compared without case and punctuation. The method
    is GPT-3's (Brown et al. 2020, appendix C, 13-grams).
    """
    index = OverlapIndex(heldout, ngram)
    kept = [problem for problem in training if not index.find(problem)]
    return Decontaminated(kept, len(training) - len(kept))


BOILERPLATE_SHARE = 0.1
"""An n-gram that more of the held-out problems share is their common instruction, not a problem."""


class OverlapIndex:
    """The n-grams of held-out problems, to be asked about training problems."""

    def __init__(self, heldout: list[Problem], ngram: int):
        self._ids_of_gram: dict[int, dict[tuple[str, ...], set[str]]] = {}
        for problem in heldout:
            words = split_words(problem.question)
            if words:
                length = min(ngram, len(words))
                ids_of_gram = self._ids_of_gram.setdefault(length, {})
                for gram in list_ngrams(words, length):
                    ids_of_gram.setdefault(gram, set()).add(problem.id)
        most = max(10, BOILERPLATE_SHARE * len(heldout))
        for length, ids_of_gram in self._ids_of_gram.items():
            self._ids_of_gram[length] = {
                g: ids for g, ids in ids_of_gram.items() if len(ids) <= most
            }

    def find(self, training: Problem) -> set[str]:
        """Ids of the held-out problems that a training problem overlaps with."""
        words = split_words(training.question)
        found: set[str] = set()
        for length, ids_of_gram in self._ids_of_gram.items():
            for gram in list_ngrams(words, length):
                found |= ids_of_gram.get(gram, set())
        return found


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def list_ngrams(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
