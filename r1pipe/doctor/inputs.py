"""What the checks look at: the recipe, the devices, and what its stages will read.

Problems, tokenizers and checkpoints are read once, however many stages and checks ask for them.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config.base import ProblemSet, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.data.problems import Loaded
from r1pipe.models.hub_cache import find_snapshot
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1pipe.doctor.memory import Devices


class Inputs:
    """`thorough`: check every row, and what takes an import of vLLM. `about_to_run`: what is out of
    reach now is a failure, not skipped. `problem_sets`: shared with the run's stages."""

    def __init__(
        self,
        recipe: Recipe,
        devices: "Devices",
        *,
        thorough: bool = False,
        about_to_run: bool = False,
        problem_sets: ProblemSets | None = None,
    ):
        self.recipe, self.devices = recipe, devices
        self.thorough, self.about_to_run = thorough, about_to_run
        self._problem_sets = problem_sets or ProblemSets(recipe.run_dir)
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def load(self, source: ProblemSet) -> Loaded | None:
        """None for the traces of a stage that has not run. Raises UserError."""
        if source.stage and not (self.recipe.run_dir / source.stage / "traces.jsonl").exists():
            return None
        return self._problem_sets.load(source)

    def load_problems(self, stage: Stage) -> Iterator[tuple[ProblemSet, list[Problem]]]:
        """The stage's problems, without the sets that cannot be read."""
        for source in stage.problem_sets():
            with contextlib.suppress(UserError):
                if loaded := self.load(source):
                    yield source, loaded.problems

    @functools.cached_property
    def heldout(self) -> set[str]:
        """Questions of the recipe's eval stages."""
        measuring = [stage for stage in self.recipe.stages if stage.measures]
        return {
            problem.question
            for stage in measuring
            for _, problems in self.load_problems(stage)
            for problem in problems
        }

    def find_checkpoint(self, name: str) -> str | None:
        """The folder of a finished stage or another folder, or a hub id in reach; None if it does
        not exist yet."""
        from r1pipe.models.hub_cache import reaches_hub

        if self.recipe.stage(name) is not None:
            folder = self.recipe.run_dir / name
            return str(folder) if (folder / "stage.json").exists() else None
        folder = Path(name).expanduser()
        if folder.is_dir():
            return str(folder)
        return name if find_snapshot(name) or reaches_hub() else None

    def find_tokenizer(self, name: str) -> "PreTrainedTokenizerBase | None":
        """The checkpoint's, or that of the one it will be trained from; None if neither exists yet.
        Raises UserError for one that no stage can use."""
        from r1pipe.models.tokenizer import load_tokenizer

        place, stage = self.find_checkpoint(name), self.recipe.stage(name)
        if place is None and stage is not None and (origin := find_origin(stage)):
            return self.find_tokenizer(origin)
        if place is None:
            return None
        if place not in self._tokenizers:
            self._tokenizers[place] = load_tokenizer(place, self.recipe.chat_template)
        return self._tokenizers[place]

    def find_end_ids(self, name: str) -> list[int]:
        """The checkpoint's end tokens, found as `find_tokenizer` finds its tokenizer."""
        from r1pipe.models.tokenizer import join_end_ids, read_end_ids

        tokenizer, place = self.find_tokenizer(name), self.find_checkpoint(name)
        if place is None:
            return self.find_end_ids(find_origin(self.recipe.stage(name)))
        return join_end_ids(tokenizer, read_end_ids(place))


def find_origin(stage: Stage) -> str | None:
    """The checkpoint that a stage takes its tokenizer from."""
    return stage.weights_from or next(iter(stage.taught_by), None)


def describe_source(source: ProblemSet) -> str:
    return f"{source.recipe}/{source.split}" if source.recipe else f"traces of {source.stage}"


def count_characters(problem: Problem) -> int:
    return sum(len(message["content"]) for message in problem.prompt)
