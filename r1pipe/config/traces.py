"""The two stages that sample traces to train on: reject and distill."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from r1pipe.config.base import (
    Environment,
    ProblemSet,
    PromptingStage,
    Reward,
    Sampling,
    Share,
)
from r1pipe.config.sft import SupervisedStage, TraceFilters
from r1pipe.config.strict import Strict, refuse_idle
from rewards.judges.endpoint import check_url


class FewShot(Strict):
    """Worked examples as earlier turns of the chat, before every problem; not part of the traces.
    Needs a chat template that keeps the `<think>` of earlier turns."""

    data: ProblemSet
    """The first ones with `solution`s are shown."""
    num_examples: PositiveInt = 2


class Traces(Strict):
    """Rejection sampling: which samples of a policy or teacher are kept."""

    num_generations: PositiveInt
    sampling: Sampling
    rewards: list[Reward] = [
        Reward(function="rewards.math_correct"),
        Reward(function="rewards.format"),
    ]
    """A sample is accepted if every one of these gives it its full reward, 1."""
    environment: Environment | None = Field(default=None, exclude_if=lambda given: given is None)
    """Samples are episodes in it, and so are the traces. Its own rewards, if it gives any, have to
    be 1 in sum."""
    min_pass_rate: Share = 0.0
    max_pass_rate: Share = 1.0
    """Problems with a share of accepted samples outside these limits yield no traces."""
    filters: TraceFilters = TraceFilters()
    max_per_problem: PositiveInt = 1
    """Samples kept per problem; duplicates count once."""
    choose: Literal["shortest", "diverse"] = "shortest"
    """Keep the shortest, or the shortest and then those least similar to the ones kept."""
    few_shot: FewShot | None = None

    @model_validator(mode="after")
    def use_every_key(self) -> "Traces":
        refuse_idle(self, {"choose": self.max_per_problem == 1 and "with max_per_problem 1"})
        everyone = "here, where every reward has to be full"
        for reward in self.rewards:
            refuse_idle(reward, {"weight": everyone}, f"the {reward.function} reward's ")
        if self.environment:
            refuse_idle(self.environment, {"weight": everyone}, "environment.")
            examples = "with an environment, which asks in its own way"
            refuse_idle(self, {"few_shot": examples})
        elif not self.rewards:
            raise ValueError("rewards: nothing says which samples to keep: give one")
        return self


class TeacherEndpoint(Strict):
    """An OpenAI-compatible server of chat completions."""

    base_url: str
    """Such as http://localhost:8000/v1."""
    model: str
    """The name that the server knows it by."""
    api_key_env: str | None = None
    """The environment variable that holds the key. The key itself is written nowhere."""
    max_concurrency: PositiveInt = 32
    """Concurrent requests."""
    max_retries: Annotated[int, Field(ge=0)] = 8
    """Retries of a request, with growing pauses, after connection errors, 408, 409, 429 and 5xx."""
    timeout_s: PositiveFloat = 1800.0
    """Timeout of a request: the server answers only when the whole chain of thought is done."""
    extra_body: dict[str, Any] = {}
    """Further fields of the request, such as chat_template_kwargs."""

    @field_validator("base_url")
    @classmethod
    def be_a_url(cls, url: str) -> str:
        check_url(url)
        return url


class Mix(Strict):
    """Other rows among the traces, such as R1's 200k of general data among 800k."""

    data: ProblemSet
    """With `solution`s."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the rows of traces.jsonl."""


class Reject(PromptingStage):
    """Rejection sampling, from a checkpoint or a teacher: writes traces for a later `sft` stage."""

    kind: Literal["reject"]
    from_: Annotated[str | None, Field(alias="from")] = None  # type: ignore[assignment]  # or teacher
    """An earlier stage, a checkpoint folder, or a hub id; or else there is a `teacher`."""
    teacher: TeacherEndpoint | None = None
    traces: Traces
    mix: Mix | None = None

    makes_checkpoint: ClassVar[bool] = False
    help = "sample traces for a later sft stage"
    example = "r1pipe reject configs/r1.yaml"
    then = "r1pipe sft configs/r1.yaml"

    @property
    def taught_by(self) -> list[str]:
        return [self.from_] if self.from_ else []

    def parents(self) -> list[str]:
        return [name for name in super().parents() if name is not None]

    def samplings(self) -> list[tuple[str, Sampling]]:
        """None for a teacher behind an endpoint: it samples elsewhere."""
        return [(self.from_, self.traces.sampling)] if self.from_ else []

    def rewards_used(self) -> list[Reward]:
        return self.traces.rewards

    def environment_used(self) -> Environment | None:
        return self.traces.environment

    def problem_sets(self) -> list[ProblemSet]:
        more = [self.traces.few_shot, self.mix]
        return [*self.data, *(part.data for part in more if part is not None)]

    def learnt_sets(self) -> list[ProblemSet]:
        return [self.mix.data] if self.mix else []

    @model_validator(mode="after")
    def name_one_source(self) -> "Reject":
        if (self.from_ is None) == (self.teacher is None):
            raise ValueError("give either from or teacher")
        if self.teacher and self.max_prompt_length:
            raise ValueError(
                "max_prompt_length: the tokenizer of a teacher's server is not known here"
            )
        if self.teacher and self.traces.environment:
            raise ValueError(
                "traces.environment: a teacher's server gives one answer, no tokens to go on from: "
                "sample from a checkpoint"
            )
        return self


class Distill(PromptingStage, SupervisedStage):
    """Rejection sampling from `from`, then supervised training of a dense student."""

    kind: Literal["distill"]
    student: str | dict[str, Any]
    """An earlier stage, a folder or a hub id; or, as in `init`, a config for a student from random
    weights, which takes over the teacher's tokenizer."""
    traces: Traces

    help = "teach a dense student the right samples of a policy"
    then = "r1pipe eval configs/demo.yaml"
    how_made = "supervised training on samples of a policy"

    @model_validator(mode="after")
    def adapt_a_model(self) -> "Distill":
        if self.train.adapter and self.new_model:
            raise ValueError("train.adapter: a student from random weights is trained whole")
        return self

    @property
    def weights_from(self) -> str | None:
        return self.student if isinstance(self.student, str) else None

    @property
    def new_model(self) -> dict[str, Any] | None:
        return self.student if isinstance(self.student, dict) else None

    @property
    def taught_by(self) -> list[str]:
        return [self.from_]

    def parents(self) -> list[str]:
        student = [self.weights_from] if self.weights_from else []
        return [*super().parents(), *student]

    def samplings(self) -> list[tuple[str, Sampling]]:
        return [(self.from_, self.traces.sampling)]

    def rewards_used(self) -> list[Reward]:
        return self.traces.rewards

    def environment_used(self) -> Environment | None:
        return self.traces.environment

    def problem_sets(self) -> list[ProblemSet]:
        few_shot = self.traces.few_shot
        return [*self.data, *([few_shot.data] if few_shot else [])]
