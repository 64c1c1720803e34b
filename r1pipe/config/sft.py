"""Supervised training: the settings that sft and distill share, and sft's own."""

from typing import Literal

from pydantic import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from r1pipe.config.base import Optimization, ProblemSet, Share, TrainingStage
from r1pipe.config.strict import Strict, refuse_idle
from rewards.text.languages import LANGUAGES


class Supervised(Optimization):
    """Supervised training on traces, packed without padding."""

    save_steps: PositiveInt | None = 100

    max_steps: PositiveInt | None = None
    num_train_epochs: PositiveFloat | None = None
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    """times per_device_train_batch_size: rows in each optimizer step, over all processes."""
    max_length: PositiveInt | None = None
    """Longer rows, in tokens, are dropped and counted, never cut."""
    learning_rate: PositiveFloat = 5e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    bias_update_rate: NonNegativeFloat = 1e-3

    @property
    def batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def name_a_length(self) -> "Supervised":
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give either max_steps or num_train_epochs")
        if self.adapter:
            idle = "in supervised training, beside which nothing samples"
            refuse_idle(self.adapter, dict.fromkeys(("offload_base", "sync"), idle), "adapter.")
        if self.samples_in_fp8:
            raise ValueError(f'fp8 "{self.fp8}": nothing samples beside this training: give update')
        return self


class TraceFilters(Strict):
    """Filters of traces by their chain of thought, all off by default: those of R1
    (arXiv:2501.12948v1, section 2.3.3; the thresholds are not in the paper)."""

    min_language_share: Share = 0.0
    """Least share of words in one language; below it the chain counts as mixed. 0: off."""
    language: str | None = None
    """The language, a code such as en. Default: that of most words of the chain."""
    max_paragraph_length: PositiveInt | None = None
    """Most characters between two blank lines."""
    drop_code_blocks: bool = False
    require_format: bool = False
    """One `<think>...</think>`, then an answer (rewards.format): for traces that are given."""

    @field_validator("language")
    @classmethod
    def name_a_language(cls, language: str | None) -> str | None:
        if language is not None and language not in LANGUAGES:
            raise ValueError(f"no such language; there are {', '.join(LANGUAGES)}")
        return language

    @model_validator(mode="after")
    def use_every_key(self) -> "TraceFilters":
        unused = not self.min_language_share and "without min_language_share"
        refuse_idle(self, {"language": unused})
        return self


class SupervisedStage(TrainingStage):
    """A stage that trains a model on traces."""

    train: Supervised

    @property
    def optimization(self) -> Supervised:
        return self.train

    @property
    def longest_sequence(self) -> int | None:
        return self.train.max_length


class Sft(SupervisedStage):
    """Cold start: supervised training on the problems' own solutions."""

    kind: Literal["sft"]
    filters: TraceFilters = TraceFilters()
    """Solutions that are not trained on."""
    help = "cold start: supervised training on written-out reasoning"
    then = "r1pipe grpo configs/demo.yaml"
    how_made = "supervised training"

    @property
    def weights_from(self) -> str:
        return self.from_

    def learnt_sets(self) -> list[ProblemSet]:
        return self.problem_sets()
