"""The eval stage and its problem sets."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from r1pipe.config.base import (
    ENVIRONMENT,
    Environment,
    ProblemSet,
    Reward,
    Sampling,
    Share,
    Stage,
    Temperature,
    as_list,
)
from r1pipe.config.strict import refuse_idle


class EvalSet(ProblemSet):
    """A set of held-out problems, with settings of its own where they differ from the stage's."""

    name: str = ""
    """In tables and summary.json; default: recipe/split."""
    num_samples: PositiveInt | None = None
    """Default: the stage's."""
    reward: str | None = None
    """Default: the stage's."""

    @property
    def label(self) -> str:
        return self.name or super().label


class EvalSampling(Sampling):
    """R1's protocol, unless the recipe has another (arXiv:2501.12948, section D.1)."""

    temperature: Temperature = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_completion_length: PositiveInt = 32_768


class Eval(Stage):
    """The same held-out problems for every checkpoint."""

    kind: Literal["eval"]
    checkpoints: Annotated[list[str], Field(min_length=1)]
    """Earlier stages, folders or hub ids."""
    data: Annotated[list[EvalSet], Field(min_length=1), BeforeValidator(as_list)]
    """One set of problems, or a list of them."""
    num_samples: PositiveInt | None = None
    """Samples per problem. Default: R1's for a set of that size (measures.R1_NUM_SAMPLES)."""
    k: PositiveInt | None = None
    """For pass@k and maj@k of the table; default: num_samples. summary.md has pass@2, 4, 8, ..."""
    sampling: EvalSampling = EvalSampling()
    environment: Environment | None = Field(default=None, exclude_if=lambda given: given is None)
    """Samples are episodes in it. `reward: environment`: right is a sum of its own rewards of 1."""
    reward: str = "rewards.math_correct"
    format_reward: str = "rewards.format"
    max_overlap: Share = 0.0
    """Share of a set's problems that a checkpoint may have seen in training; above it the stage
    ends before anything is sampled. Models with unknown training data pass."""
    summarizes: bool = True
    """Whether this stage writes the run's summary.json, summary.md and curves.png."""

    makes_checkpoint: ClassVar[bool] = False
    measures: ClassVar[bool] = True
    help = "measure checkpoints on held-out problems"
    example = "r1pipe eval configs/demo.yaml --compare sft grpo"
    then = "r1pipe publish runs/demo/grpo --repo user/name --dry-run"

    def parents(self) -> list[str]:
        return self.checkpoints

    def models(self) -> list[str]:
        return self.checkpoints

    def problem_sets(self) -> list[ProblemSet]:
        return list(self.data)

    def samplings(self) -> list[tuple[str, Sampling]]:
        return [(name, self.sampling) for name in self.checkpoints]

    def rewards_used(self) -> list[Reward]:
        own = [problems.reward for problems in self.data if problems.reward]
        names = (self.reward, self.format_reward, *own)
        return [Reward(function=name) for name in names if name != ENVIRONMENT]

    def environment_used(self) -> Environment | None:
        return self.environment

    def for_one(self, checkpoint: str) -> "Eval":
        """A stage that evaluates another checkpoint alone by the same protocol."""
        digest = hashlib.sha256(checkpoint.encode()).hexdigest()[:6]
        words = re.sub(r"[^A-Za-z0-9]+", "-", Path(checkpoint).name).strip("-")[:40]
        own = {"name": f"{self.name}-{words}-{digest}", "checkpoints": [checkpoint]}
        return self.model_copy(update={**own, "summarizes": False})

    @model_validator(mode="after")
    def use_every_key(self) -> "Eval":
        named = (self.reward, *(problems.reward for problems in self.data))
        if ENVIRONMENT in named and self.environment is None:
            raise ValueError("reward: environment does nothing without an environment")
        own = "where every set of data has its own"
        for key in ("num_samples", "reward"):
            idle = all(getattr(problems, key) for problems in self.data) and own
            refuse_idle(self, {key: idle})
        most = max((problems.num_samples or self.num_samples or 0) for problems in self.data)
        if self.k and self.num_samples and self.k > most:
            raise ValueError(f"k {self.k} is above num_samples {most}")
        return self

    @field_validator("checkpoints")
    @classmethod
    def be_named_once(cls, names: list[str]) -> list[str]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'"{name}" is there twice')
        return names

    @field_serializer("data")
    def write_as_given(self, data: list[EvalSet]) -> Any:
        """One set without a list around it."""
        rows = [problems.model_dump(mode="json") for problems in data]
        return rows if len(rows) > 1 else rows[0]

    @field_validator("data")
    @classmethod
    def tell_sets_apart(cls, data: list[EvalSet]) -> list[EvalSet]:
        labels = [problems.label for problems in data]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f'two sets are called "{label}"; give one a name')
        return data
