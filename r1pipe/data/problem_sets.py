"""The problem sets of a recipe, each loaded once."""

from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from r1pipe.config.base import ProblemSet, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.data.problems import Loaded, load_set, load_traces


class ProblemSets:
    """A run's problem sets, each read once by a process and kept until no stage needs it: reading
    200,000 rows takes minutes, and every training stage needs every held-out set."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._loaded: dict[str, tuple[Hashable, Loaded]] = {}

    def load(self, source: ProblemSet) -> Loaded:
        """Shared between callers, who must not change it. Raises UserError."""
        key, version = describe_rows(source), None
        if source.stage is not None:
            # Traces change when their stage is run again.
            path = self.run_dir / source.stage / "traces.jsonl"
            version = find_version(path)
        if key not in self._loaded or self._loaded[key][0] != version:
            loaded = load_set(source) if source.stage is None else load_traces(path)
            self._loaded[key] = version, loaded
        return self._loaded[key][1]

    def keep(self, sources: Iterable[ProblemSet]) -> None:
        """Forget all others."""
        needed = set(map(describe_rows, sources))
        self._loaded = {key: kept for key, kept in self._loaded.items() if key in needed}


def describe_rows(source: ProblemSet) -> str:
    """The fields that decide which rows are read; an eval stage's set has more."""
    return source.model_dump_json(include=set(ProblemSet.model_fields))


def find_version(path: Path) -> tuple[int, ...] | None:
    """Changes when the file is replaced; None without a file."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def list_needed(stages: Iterable[Stage], recipe: Recipe) -> Iterator[ProblemSet]:
    """The sets that these stages read; a training stage also reads the recipe's held-out sets,
    to drop rows that overlap."""
    for stage in stages:
        yield from stage.problem_sets()
        if not stage.measures:
            yield from recipe.heldout_sets()
