"""The problem sets of a recipe, each loaded once a process."""

from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from r1pipe.config.base import ProblemSet, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.data.problems import Loaded, load_set, load_traces


class ProblemSets:
    """The sets of problems of a run, each read once by a process and kept until no stage needs it:
    200,000 rows take minutes to read, and every stage that trains looks at every held-out set."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._loaded: dict[str, tuple[Hashable, Loaded]] = {}

    def load(self, source: ProblemSet) -> Loaded:
        """Callers must not change what they get. Raises UserError."""
        key, version = describe_rows(source), None
        if source.stage is not None:
            # Made anew when their stage is.
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
    """What decides which rows are read; not what an eval stage adds to it."""
    return source.model_dump_json(include=set(ProblemSet.model_fields))


def find_version(path: Path) -> tuple[int, ...] | None:
    """Another one for every file that was put there; None for none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def list_needed(stages: Iterable[Stage], recipe: Recipe) -> Iterator[ProblemSet]:
    """The sets that these stages read: a stage that trains is kept apart from every held-out set of
    the recipe."""
    for stage in stages:
        yield from stage.problem_sets()
        if not stage.measures:
            yield from recipe.heldout_sets()
