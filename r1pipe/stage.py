"""What every stage is given: the recipe, its folder, its inputs, the shared engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config import Eval, ProblemSet, Recipe, TrainingStage
from r1pipe.errors import UserError
from r1pipe.problems import check_row, decontaminate, load_problems
from r1pipe.progress import say
from r1pipe.records import Problem, dump_row, read_jsonl, write_text
from r1pipe.runs import RunFolder

if TYPE_CHECKING:
    import torch

    from r1pipe.rollout import Engines


@dataclass
class StageContext:
    """Handed to a stage's `run(stage, context)`, which returns facts for `stage.json`."""

    recipe: Recipe
    run: RunFolder
    stage_name: str
    folder: Path
    """Where the stage writes; moved into its place when `run` returns. Of ranks but the first
    thrown away."""
    engines: "Engines"
    device: "torch.device"
    facts: dict[str, float]
    """Facts that shared steps add to the stage's record."""

    @property
    def shared_folder(self) -> Path:
        """The first rank's `folder`, which all can read and write."""
        return self.run.partial_dir(self.stage_name)

    def checkpoint(self, name: str) -> str:
        """The folder or hub id behind a stage's `from`."""
        return self.run.resolve_checkpoint(name, self.stage_name)

    def training_problems(self, stage: TrainingStage) -> list[Problem]:
        """The stage's problems without those that overlap with any evaluation set of the recipe;
        kept in the stage's folder as problems.jsonl."""
        problems = self.load(stage.data)
        heldout = [
            problem
            for other in self.recipe.stages
            if isinstance(other, Eval)
            for source in other.data
            for problem in self.load(source)
        ]
        if heldout:
            result = decontaminate(problems, heldout, self.recipe.ngram)
            self.facts["overlap_dropped"] = result.num_dropped
            self.facts["overlap_rate"] = result.overlap_rate
            say(
                f"{stage.name}: {len(problems)} training problems, {result.num_dropped} dropped "
                f"for overlap with {len(heldout)} held-out ones"
            )
            problems = result.kept
        if not problems:
            raise UserError(f'stage "{stage.name}": every training problem is a held-out one')
        self._keep(problems)
        return problems

    def _keep(self, problems: list[Problem]) -> None:
        """Raises UserError if an interrupted run had other problems: it cannot go on exactly."""
        path = self.folder / "problems.jsonl"
        text = "".join(f"{dump_row(problem)}\n" for problem in problems)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f'stage "{self.stage_name}": its data has changed since the run was interrupted; '
                "put it back, or add --redo to begin again"
            )
        write_text(path, text)

    def load(self, source: ProblemSet) -> list[Problem]:
        if source.recipe is not None:
            problems = load_problems(source)
        else:
            path = self.run.stage_dir(source.stage) / "traces.jsonl"
            rows = read_jsonl(path)
            problems = [check_row(row, f"{path}: row {number}") for number, row in rows]
        self.run.lineages[self.stage_name].add_data(source, problems)
        return problems
