"""What a recipe's stages will read, as far as it is here: problems, tokenizers, checkpoints.

Each is read once, however many stages and checks ask for it.
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config import Eval, OnPolicy, ProblemSet, Recipe, Sampling, Stage
from r1pipe.errors import UserError
from r1pipe.lineage import find_snapshot
from r1pipe.problems import Loaded, read_problems, read_traces
from r1pipe.records import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ProblemSets:
    """The sets of problems of a run, each read once by a process and kept until no stage needs it:
    200,000 rows take minutes to read, and every stage that trains looks at every held-out set."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._loaded: dict[str, tuple[Hashable, Loaded]] = {}

    def read(self, source: ProblemSet) -> Loaded:
        """Callers must not change what they get. Raises UserError."""
        key, version = describe_rows(source), None
        if source.stage is not None:
            # Made anew when their stage is.
            path = self.run_dir / source.stage / "traces.jsonl"
            version = find_version(path)
        if key not in self._loaded or self._loaded[key][0] != version:
            loaded = read_problems(source) if source.stage is None else read_traces(path)
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
        if not isinstance(stage, Eval):
            for other in recipe.stages:
                if isinstance(other, Eval):
                    yield from other.problem_sets()


class Inputs:
    def __init__(self, recipe: Recipe, problem_sets: ProblemSets | None = None):
        self.recipe = recipe
        self._problem_sets = problem_sets or ProblemSets(recipe.run_dir)
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def read(self, source: ProblemSet) -> Loaded | None:
        """None for the traces of a stage that has not run. Raises UserError."""
        if source.stage and not (self.recipe.run_dir / source.stage / "traces.jsonl").exists():
            return None
        return self._problem_sets.read(source)

    def list_problems(self, stage: Stage) -> Iterator[tuple[ProblemSet, list[Problem]]]:
        """The stage's problems, without the sets that cannot be read."""
        for source in stage.problem_sets():
            with contextlib.suppress(UserError):
                if loaded := self.read(source):
                    yield source, loaded.problems

    def find_checkpoint(self, name: str) -> str | None:
        """The folder of a finished stage or of a user's own, or a hub id that can be had; None if
        it is not here yet."""
        from r1pipe.memory import reaches_hub

        if self.recipe.stage(name) is not None:
            folder = self.recipe.run_dir / name
            return str(folder) if (folder / "stage.json").exists() else None
        folder = Path(name).expanduser()
        if folder.is_dir():
            return str(folder)
        return name if find_snapshot(name) or reaches_hub() else None

    def find_tokenizer(self, name: str) -> "PreTrainedTokenizerBase | None":
        """That of a checkpoint, or of the one that it will have it from; None if that is not here
        yet either. Raises UserError for one that no stage can use."""
        from r1pipe.models import load_tokenizer

        place, stage = self.find_checkpoint(name), self.recipe.stage(name)
        if place is None and stage is not None and (origin := find_origin(stage)):
            return self.find_tokenizer(origin)
        if place is None:
            return None
        if place not in self._tokenizers:
            self._tokenizers[place] = load_tokenizer(place, self.recipe.chat_template)
        return self._tokenizers[place]

    def find_end_ids(self, name: str) -> list[int]:
        """Of a checkpoint whose tokenizer is here, or of the one that it will have it from."""
        from r1pipe.models import join_end_ids, read_end_ids

        tokenizer, place = self.find_tokenizer(name), self.find_checkpoint(name)
        if place is None:
            return self.find_end_ids(find_origin(self.recipe.stage(name)))
        return join_end_ids(tokenizer, read_end_ids(place))


def check_solutions(stage: Stage, source: ProblemSet, problems: Sequence[Problem]) -> None:
    """Raises UserError if the stage is to learn solutions that some of its problems do not have, or
    to show more than there are."""
    missing = [problem for problem in problems if not (problem.solution or "").strip()]
    if source in stage.learnt_sets() and missing:
        raise UserError(
            f"{describe(source)}: {len(missing)} of {len(problems)} problems have no solution to "
            f'train on, first "{missing[0].id}"; '
            + (
                "name the column of the traces as solution in options.columns"
                if source.recipe == "columns"
                else "make traces by a reject stage, or choose data with traces"
            )
        )
    few_shot = getattr(getattr(stage, "traces", None), "few_shot", None)
    if few_shot and source == few_shot.data:
        have = len(problems) - len(missing)
        if have < few_shot.num_examples:
            raise UserError(
                f"few_shot: {describe(source)} has {have} of {few_shot.num_examples} solutions"
            )


def find_origin(stage: Stage) -> str | None:
    """The checkpoint that a stage takes its tokenizer from."""
    student = getattr(stage, "student", None)
    if isinstance(student, str):
        return student
    return getattr(stage, "from_", None)


def list_models(stage: Stage) -> list[str]:
    """Checkpoints whose tokenizers a stage uses."""
    if isinstance(stage, Eval):
        return stage.checkpoints
    names = getattr(stage, "from_", None), getattr(stage, "student", None)
    return [name for name in names if isinstance(name, str)]


def list_samplings(stage: Stage) -> list[tuple[str, Sampling]]:
    """The checkpoints that a stage samples from, and how."""
    if isinstance(stage, OnPolicy):
        from r1pipe.grpo.collect import sampling_of

        return [(stage.policy, sampling_of(stage))]
    if isinstance(stage, Eval):
        return [(name, stage.sampling) for name in stage.checkpoints]
    traces = getattr(stage, "traces", None)
    if traces is None or stage.from_ is None:  # a teacher behind an endpoint samples elsewhere
        return []
    return [(stage.from_, traces.sampling)]


def describe(source: ProblemSet) -> str:
    return f"{source.recipe}/{source.split}" if source.recipe else f"traces of {source.stage}"


def count_characters(problem: Problem) -> int:
    return sum(len(message["content"]) for message in problem.prompt)
