"""StageContext: the recipe, folder, inputs and shared engine that every stage is given."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1pipe.config.adapter import Adapter
from r1pipe.config.base import ProblemSet, PromptingStage, TrainingSet, TrainingStage
from r1pipe.config.recipe import Recipe
from r1pipe.data.decontamination import decontaminate
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.data.problems import Loaded
from r1pipe.runs.folder import RunFolder
from r1pipe.runs.ledger import Ledger
from r1pipe.runs.logs import MetricsLog
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import dump_row, write_text
from r1pipe.utils.progress import StageProgress, log_line
from r1pipe.utils.seeds import derive_seed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from r1pipe.models.adapter import NewAdapter
    from r1pipe.rollout.engines import Engines

NUM_BROKEN_SHOWN, NUM_BROKEN_KEPT = 3, 100
"""Broken rows that a stage prints one by one, and that its record keeps."""


@dataclass
class StageContext:
    """Handed to a stage's `run(stage, context)`, which returns facts for `stage.json`."""

    recipe: Recipe
    run: RunFolder
    stage_name: str
    folder: Path
    """The stage's output, moved into place when `run` returns; on other ranks than 0 deleted."""
    engines: "Engines"
    device: "torch.device"
    facts: dict[str, Any]
    """Facts for the stage's record, added by shared code."""
    ledger: Ledger
    listeners: Sequence[Callable[[dict[str, Any]], None]]
    """Functions that are given each step's metrics."""
    problem_sets: ProblemSets
    """Problem sets that this process has loaded, shared with the run's other stages."""

    def open_log(self) -> MetricsLog:
        return MetricsLog(self.folder, self.listeners)

    def open_progress(self, label: str, num_steps: int) -> StageProgress:
        """A progress bar that also shows the projected cost."""
        return StageProgress(label, num_steps, self.ledger.project)

    @property
    def shared_folder(self) -> Path:
        """The first rank's `folder`, which all can read and write."""
        return self.run.partial_dir(self.stage_name)

    def checkpoint(self, name: str) -> str:
        """The folder or hub id behind a stage's `from`."""
        return self.run.resolve_checkpoint(name, self.stage_name)

    def tokenizer(self, checkpoint: str) -> "PreTrainedTokenizerBase":
        """The tokenizer of a folder or hub id, with the recipe's chat template if it has none."""
        from r1pipe.models.tokenizer import load_tokenizer

        return load_tokenizer(checkpoint, self.recipe.chat_template)

    def new_adapter(self, settings: Adapter | None) -> "NewAdapter | None":
        """What the stage's `load_sharded` is given; None without settings."""
        from r1pipe.models.adapter import NewAdapter

        if settings is None:
            return None
        return NewAdapter(settings, derive_seed(self.recipe.seed, self.stage_name, "adapter"))

    def load_training_problems(self, stage: TrainingStage) -> list[Problem]:
        """The stage's problems without those that overlap with any evaluation set of the recipe;
        kept in the stage's folder as problems.jsonl."""
        problems, owners = self._join(stage.data)
        problems = self.keep_out_heldout(problems)
        if not problems:
            raise UserError(f'stage "{stage.name}": every training problem is a held-out one')
        if isinstance(stage, PromptingStage) and stage.max_prompt_length:
            problems = self._drop_long(problems, stage)
        if stage.data[0].weight is not None:
            problems = self._weigh(problems, owners, stage.data)
        self._keep(problems)
        return problems

    def _join(self, sources: list[TrainingSet]) -> tuple[list[Problem], dict[str, int]]:
        """The rows of all sets, and by id the number of each row's set. An id that an earlier set
        has gets its set's number."""
        problems: list[Problem] = []
        owners: dict[str, int] = {}
        for number, source in enumerate(sources):
            for problem in self.load_problems(source):
                if problem.id in owners:
                    problem = replace(problem, id=f"{number}:{problem.id}")
                owners[problem.id] = number
                problems.append(problem)
        if len(sources) > 1:  # what becomes of all together is written behind these
            names = " + ".join(source.label for source in sources)
            self.facts["sizes"].insert(0, {"data": names, "rows": len(problems)})
        return problems, owners

    def _weigh(
        self, problems: list[Problem], owners: dict[str, int], sources: list[TrainingSet]
    ) -> list[Problem]:
        """As many rows as stand to each other as the sets' weights, by the run's seed."""
        rows = [[p for p in problems if owners[p.id] == i] for i in range(len(sources))]
        scale = min(len(part) / source.weight for part, source in zip(rows, sources))
        counts = [round(scale * source.weight) for source in sources]
        told = [
            f"{count} of {len(part)} problems of {source.label}"
            for count, part, source in zip(counts, rows, sources)
        ]
        if not all(counts):
            raise UserError(f"{self.stage_name}: by their weights {', '.join(told)}: change them")
        log_line(f"{self.stage_name}: {', '.join(told)} by weight")
        chance = random.Random(f"{self.recipe.seed}/{self.stage_name}/weights")
        chosen = {
            p.id
            for part, count in zip(rows, counts)
            for p in chance.sample(part, min(count, len(part)))
        }
        self.record_left("weights", len(chosen))
        return [problem for problem in problems if problem.id in chosen]

    def _drop_long(self, problems: list[Problem], stage: PromptingStage) -> list[Problem]:
        from r1pipe.envs.base import read_first_prompts
        from r1pipe.models.tokenizer import encode_prompt

        [(name, _)] = stage.samplings()
        tokenizer = self.tokenizer(self.checkpoint(name))
        limit = stage.max_prompt_length
        begun = read_first_prompts(stage.environment_used(), problems)
        kept = [
            p
            for p, (messages, tools) in zip(problems, begun, strict=True)
            if len(encode_prompt(tokenizer, messages, f'problem "{p.id}"', tools)) <= limit
        ]
        dropped = self.facts["prompts_too_long"] = len(problems) - len(kept)
        counts = (
            f"{len(problems)} problems, {dropped} dropped for prompts of more than {limit} tokens"
        )
        if not kept:
            raise UserError(f"{stage.name}: {counts}: raise max_prompt_length")
        log_line(f"{stage.name}: {counts}")
        self.record_left("max_prompt_length", len(kept))
        return kept

    def _keep(self, problems: list[Problem]) -> None:
        """Raises UserError if an interrupted run had other problems: no exact resume."""
        path = self.folder / "problems.jsonl"
        text = "".join(f"{dump_row(problem)}\n" for problem in problems)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f'stage "{self.stage_name}": its data has changed since the run was interrupted; '
                "put it back, or add --redo to begin again"
            )
        write_text(path, text)

    def keep_out_heldout(
        self, problems: list[Problem], what: str = "training problems"
    ) -> list[Problem]:
        """Drop rows whose prompt or trace overlaps with a held-out set; the count goes into the
        stage's record."""
        heldout = [
            problem
            for source in self.recipe.heldout_sets()
            for problem in self.load_set(source).problems
        ]
        if not heldout:
            return problems
        result = decontaminate(problems, heldout, self.recipe.ngram)
        for fact, count in (
            ("overlap_dropped", result.num_dropped),
            ("overlap_dropped_for_trace", result.num_dropped_for_trace),
        ):
            self.facts[fact] = self.facts.get(fact, 0) + count
        self.facts.setdefault("overlap_rate", round(result.overlap_rate, 6))
        log_line(
            f"{self.stage_name}: {len(problems)} {what}, {result.num_dropped} dropped "
            f"for overlap with {len(heldout)} held-out ones"
        )
        self.record_left(f"{what} without overlap", len(result.kept))
        return result.kept

    def load_problems(self, source: ProblemSet) -> list[Problem]:
        """The problems of `source`; what was dropped is printed and noted for stage.json."""
        loaded = self.load_set(source)
        place = f" ({source.options['path']})" if source.recipe == "columns" else ""
        name = f"{self.stage_name}: {source.recipe or source.stage}/{source.split}{place}"
        for row in loaded.broken[:NUM_BROKEN_SHOWN]:
            log_line(f"{name}: skipped {row}")
        if len(loaded.broken) > NUM_BROKEN_SHOWN:
            log_line(f"{name}: {len(loaded.broken) - NUM_BROKEN_SHOWN} more broken rows skipped")
        if loaded.broken:
            rows = [[row.number, row.reason] for row in loaded.broken[:NUM_BROKEN_KEPT]]
            self.facts.setdefault("broken_rows", []).extend(rows)
        log_line(f"{name}: {loaded.describe()}")
        sizes = {"data": f"{source.recipe or source.stage}/{source.split}", **dict(loaded.steps())}
        self.facts.setdefault("sizes", []).append(sizes)
        return list(loaded.problems)

    def load_set(self, source: ProblemSet) -> Loaded:
        loaded = self.problem_sets.load(source)
        self.run.lineages[self.stage_name].add_data(source, loaded.problems)
        return loaded

    def record_left(self, reason: str, num_left: int) -> None:
        """Note in the stage's record how many rows a filter left."""
        if sizes := self.facts.get("sizes"):
            sizes[0][reason] = num_left  # the data to train on is first
