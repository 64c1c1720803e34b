"""The stage that is to be published, in its run: evaluations, objections, example texts."""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from r1pipe.runs.reader import Evaluation, FinishedRun, StageFolder
from r1pipe.runs.verify import verify_stage
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import read_json, read_jsonl

MAX_TEXTS = 2_000
"""Texts on which llama.cpp's pre-tokenizer is compared with the tokenizer's own."""


@dataclass(frozen=True)
class Candidate:
    run: FinishedRun
    stage: StageFolder

    @cached_property
    def lineage(self) -> list[StageFolder]:
        """The stage and its ancestors, each after its parents."""
        return self.run.lineage(self.stage.name)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        return self.run.evaluations(self.stage.name)

    @property
    def base_model(self) -> str | None:
        """The hub id or folder that the weights go back to; None: random weights."""
        return self.run.base_model(self.stage.name)

    def read_config(self) -> dict[str, Any]:
        """Raises UserError for a model that needs code of its own."""
        config = read_json(self.stage.folder / "config.json")
        if "auto_map" in config:
            raise UserError(
                f"{self.stage.folder}/config.json: auto_map: the model needs code of its own"
            )
        return config

    def find_objections(self, max_overlap: float) -> list[str]:
        """Why the stage should not be published."""
        objections = []
        if not self.evaluations:
            objections.append(
                f"{self.stage.folder}: not evaluated since it was made; run r1pipe eval with "
                f'"{self.stage.name}" among its checkpoints'
            )
        for evaluation in self.evaluations:
            overlap, dataset = evaluation.entry["overlap"], evaluation.entry["dataset"]
            if overlap is not None and overlap > max_overlap:
                objections.append(
                    f"{self.stage.folder}: {overlap:.2%} of {dataset} overlaps with what it was "
                    f"trained on; --max-overlap is {max_overlap:.2%}"
                )
        for stage in [*self.lineage, *(evaluation.stage for evaluation in self.evaluations)]:
            objections += [
                f"{stage.folder}: {finding.what}"
                for finding in verify_stage(stage.folder)
                if finding.is_problem
            ]
        return objections

    def find_prompt(self) -> list[dict[str, str]]:
        """A prompt that the stage, or the nearest stage before it, was trained on."""
        for stage in reversed(self.lineage):
            file = stage.folder / "problems.jsonl"
            if file.exists():
                for _, row in read_jsonl(file):
                    return row["prompt"]
        return [{"role": "user", "content": "What is 7 + 5?"}]

    def find_texts(self) -> list[str]:
        """Prompts and completions of the evaluations; without any, a training prompt."""
        rows = (
            row
            for evaluation in self.evaluations
            for _, row in read_jsonl(evaluation.stage.folder / evaluation.entry["samples"])
        )
        texts = (row[key] for row in rows for key in ("prompt", "completion") if key in row)
        if found := list(islice(texts, MAX_TEXTS)):
            return list(dict.fromkeys(found))
        return [message["content"] for message in self.find_prompt()]
