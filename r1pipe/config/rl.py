"""The two stages that sample from their own policy: grpo and on_policy_distill."""

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from r1pipe.config.base import (
    Environment,
    Optimization,
    PromptingStage,
    Reward,
    Sampling,
    Share,
    Temperature,
)
from r1pipe.config.breaker import Breaker, DistillBreaker
from r1pipe.config.strict import Strict, refuse_idle

LOSSES = {
    "grpo": ("clip_tokens", "weigh_by_completion"),
    "dr_grpo": ("clip_tokens", "weigh_by_constant"),
    "dapo": ("clip_tokens", "weigh_by_token"),
    "gspo": ("clip_sequences", "weigh_by_completion"),
    "cispo": ("clip_weights", "weigh_by_token"),
}
"""By `loss_type`: the functions of rl/losses.py for a token's loss and its weight. By name, because
that file imports torch."""


class Difficulty(Strict):
    """Selection of problems by the policy's pass rate."""

    num_samples: PositiveInt = 8
    """Samples per problem for the pass rate at the start, with the stage's own sampling."""
    min_pass_rate: Share = 0.0
    max_pass_rate: Share = 1.0
    """Problems outside these limits, or that no reward could judge, are left out."""
    reward: str | None = None
    """The reward function for which a 1 means "passed", or `environment` for the sum of its own
    rewards. Default: the stage's first."""
    order: Literal["none", "easy_first"] = "none"
    """Within an epoch."""
    refresh_steps: PositiveInt | None = None
    """Steps after which the pass rates are renewed: from the rollouts since, and for problems
    without any from `num_samples` samples of the current policy."""

    @model_validator(mode="after")
    def leave_something(self) -> "Difficulty":
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError("min_pass_rate is above max_pass_rate")
        return self


class OnPolicy(PromptingStage, Optimization):
    """A stage that trains a model on its own samples."""

    save_steps: PositiveInt | None = 10
    rewards: list[Reward] = []
    """Reward functions. on_policy_distill uses them for the log and the breaker only."""
    environment: Environment | None = Field(default=None, exclude_if=lambda given: given is None)
    """Samples are episodes of several turns in it. `max_completion_length` then is that of all
    sampled tokens of an episode."""
    max_steps: PositiveInt
    prompts_per_step: PositiveInt
    num_generations: PositiveInt
    """Samples per prompt."""
    temperature: Annotated[Temperature, Field(gt=0)] = 1.0
    max_completion_length: PositiveInt
    max_staleness: NonNegativeInt = 0
    """Steps that the policy which sampled a token may be behind the one that trains on it. 1: the
    next batch is sampled while this one trains. More: so many batches, which needs in_flight."""
    in_flight: bool = False
    """The sampler gets new weights while it samples, and running sequences go on; otherwise they
    are finished first. Needs sampler.kind fleet. The log-probs that a loss is corrected by are
    those of the weights that sampled each token. Such a run does not repeat bit by bit."""
    steps_per_generation: PositiveInt = 1
    """Optimizer steps (minibatches) per pass over a batch of rollouts."""

    learning_rate: PositiveFloat = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    bias_update_rate: NonNegativeFloat = 0.0

    routing_replay: bool = False
    """The trainer sends each token to the experts that the sampler chose (R3). For bf16; in float32
    both choose the same."""

    breaker: Breaker = Breaker()
    learns_from_rewards: ClassVar[bool] = False
    """Whether samples of one prompt with equal rewards teach nothing."""
    verify_sync: bool | None = None
    """Sample a few tokens after each weight sync and hold them to breaker.logprob_diff. Default:
    with max_staleness, or with fp8, where the trainer then rounds what the sampler does; otherwise
    the whole next batch is held to it anyway."""

    @property
    def policy(self) -> str:
        """The checkpoint that samples and is trained."""
        return self.from_

    @property
    def weights_from(self) -> str:
        return self.policy

    @property
    def optimization(self) -> Optimization:
        return self

    @property
    def longest_sequence(self) -> int | None:
        return None if self.environment else self.max_completion_length + 1

    @property
    def keeps_reference(self) -> bool:
        """Whether a frozen copy of the policy is in memory beside it."""
        return False

    @property
    def sampling(self) -> Sampling:
        """From the policy's own distribution, of which nothing is cut."""
        return Sampling(
            temperature=self.temperature, max_completion_length=self.max_completion_length
        )

    def samplings(self) -> list[tuple[str, Sampling]]:
        return [(self.policy, self.sampling)]

    def rewards_used(self) -> list[Reward]:
        return self.rewards

    def environment_used(self) -> Environment | None:
        return self.environment

    @property
    def verifies_sync(self) -> bool:
        if self.verify_sync is None:
            return bool(self.max_staleness or self.fp8)
        return self.verify_sync

    @model_validator(mode="after")
    def attend_as_the_sampler(self) -> "OnPolicy":
        if self.indexer and self.indexer.is_dense:
            raise ValueError(
                f"indexer.phase {self.indexer.phase} is for sft and distill: give sparse"
            )
        return self

    @model_validator(mode="after")
    def bound_the_staleness(self) -> "OnPolicy":
        if self.max_staleness > 1 and not self.in_flight:
            raise ValueError(
                f"max_staleness {self.max_staleness} needs in_flight: true: where sampling ends "
                "before each sync, there is time for one batch"
            )
        if self.in_flight and not self.max_staleness:
            raise ValueError("in_flight needs max_staleness: 1 or more")
        for other in ("routing_replay", "environment"):
            if self.in_flight and getattr(self, other):
                raise ValueError(f"in_flight does not go with {other} yet")
        return self

    @model_validator(mode="after")
    def split_evenly(self) -> "OnPolicy":
        if (self.prompts_per_step * self.num_generations) % self.steps_per_generation:
            raise ValueError(
                "prompts_per_step x num_generations must be a multiple of steps_per_generation"
            )
        return self


class Grpo(OnPolicy):
    """Reinforcement learning with group-relative advantages."""

    kind: Literal["grpo"]
    learns_from_rewards = True
    rewards: list[Reward] = []
    """Reward functions; at least one, or an environment."""
    num_generations: Annotated[int, Field(ge=2)]
    """Samples per prompt: the group."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit. Where top_p or top_k cut the distribution, the trainer cuts its own alike."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal are replaced by groups of further prompts (DAPO)."""
    max_sampling_rounds: PositiveInt = 4
    """Rounds of sampling in a step; then the groups that are there have to do."""
    difficulty: Difficulty | None = None
    """Default: all problems, in any order."""

    loss_type: str = "grpo"
    """One of LOSSES, or the dotted path of a loss of your own."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of the advantages: the group's std, the batch's, or none."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL term to the reference policy; 0 keeps no reference. With an adapter the
    reference is the policy without it."""
    kl_estimator: Literal["k1", "k3"] = "k3"
    use_bias_correction_kl: bool = False
    """Weigh the KL term by pi / pi_old, so that its gradient is that of the KL (DeepSeek-V3.2)."""
    reference_refresh_steps: PositiveInt | None = None
    """Steps after which the reference becomes the current policy."""
    epsilon: PositiveFloat = 0.2
    epsilon_high: PositiveFloat | None = None
    """Upper clip range; default: epsilon. For cispo the largest weight itself."""
    delta: PositiveFloat | None = None
    """Largest ratio where the advantage is negative (two-sided clipping); above 1 + epsilon."""
    num_iterations: PositiveInt = 1
    """Passes over a batch of rollouts (mu in the GRPO paper)."""
    old_policy: Literal["trainer", "sampler"] = "trainer"
    """Whose log-probs are pi_old's. sampler: those of the rollouts, which saves a forward pass over
    the batch wherever it has several optimizer steps, and corrects nothing: where sampler and
    trainer differ, clipping bounds that as well (verl's bypass mode)."""
    mask_truncated_completions: bool = False

    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by pi_old / pi_sampler: 1 up to rounding in float32, not so in bf16."""
    vllm_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    vllm_importance_sampling_clip_min: NonNegativeFloat = 0.0
    vllm_importance_sampling_clip_max: PositiveFloat = 2.0
    off_policy_mask_threshold: PositiveFloat | None = None
    """Mean log(pi_sampler / pi) above which a completion of negative advantage is dropped."""

    help = "reinforcement learning"
    example = "r1pipe grpo configs/demo.yaml --set stages.grpo.max_steps=8"
    then = "r1pipe eval configs/demo.yaml"
    how_made = "reinforcement learning (GRPO)"

    @property
    def keeps_reference(self) -> bool:
        return self.beta > 0 and self.adapter is None

    @property
    def sampling(self) -> Sampling:
        cut = {"top_p": self.top_p, "top_k": self.top_k}
        return super().sampling.model_copy(update=cut)

    def functions_used(self) -> list[str]:
        own_loss = [self.loss_type] if "." in self.loss_type else []
        return [*super().functions_used(), *own_loss]

    def remarks(self) -> list[str]:
        ranges = (self.epsilon, self.epsilon_high, self.delta)
        chosen = ranges != (0.2, None, None) and self.loss_type in set(LOSSES) - {"cispo"}
        if not chosen or self.steps_per_generation * self.num_iterations > 1:
            return []
        return [
            "epsilon, epsilon_high and delta do nothing: with one optimizer step a batch "
            "(steps_per_generation 1, num_iterations 1) the policy is the one they are relative to"
        ]

    @field_validator("loss_type")
    @classmethod
    def name_a_loss(cls, loss_type: str) -> str:
        if loss_type not in LOSSES and "." not in loss_type:
            near = difflib.get_close_matches(loss_type, LOSSES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LOSSES)}"
            raise ValueError(f"no such loss; {hint} (or give a dotted path)")
        return loss_type

    @model_validator(mode="after")
    def draw_in_order(self) -> "Grpo":
        redraws = self.difficulty and self.difficulty.refresh_steps
        if self.in_flight and (self.dynamic_sampling or redraws):
            raise ValueError(
                "in_flight does not go with dynamic_sampling and difficulty.refresh_steps yet: "
                "several batches are sampled at once, whose prompts are drawn in order"
            )
        return self

    @model_validator(mode="after")
    def fit_the_loss(self) -> "Grpo":
        if self.sequence_parallel > 1 and (self.top_p < 1 or self.top_k):
            raise ValueError("sequence_parallel does not go with top_p and top_k: leave them out")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type cispo needs epsilon_high, its largest weight, such as 5.0")
        if self.old_policy == "sampler" and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "old_policy sampler does not go with top_p and top_k, which cut pi_old's own "
                "distribution: leave them out"
            )
        if self.delta is not None and self.delta <= 1 + self.epsilon:
            raise ValueError("delta must be above 1 + epsilon")
        if self.beta and self.kl_estimator == "k1" and not self.use_bias_correction_kl:
            # d/dtheta log(pi / ref) is the score function, whose mean is zero.
            raise ValueError(
                "kl_estimator k1 needs use_bias_correction_kl: its own gradient is zero on average"
            )
        return self

    @model_validator(mode="after")
    def use_every_key(self) -> "Grpo":
        no_kl = not self.beta and "with beta 0"
        cispo = self.loss_type == "cispo" and "in cispo, which has epsilon_high alone"
        correction = "vllm_importance_sampling_correction"
        of_sampler = self.old_policy == "sampler" and "with old_policy sampler"
        uncorrected = of_sampler or (not getattr(self, correction) and f"without {correction}")
        refuse_idle(
            self,
            {
                "kl_estimator": no_kl,
                "use_bias_correction_kl": no_kl,
                "reference_refresh_steps": no_kl or (self.adapter and "with an adapter"),
                "epsilon": cispo,
                "delta": cispo,
                correction: of_sampler,
                "vllm_importance_sampling_mode": uncorrected,
                "vllm_importance_sampling_clip_min": uncorrected,
                "vllm_importance_sampling_clip_max": uncorrected,
                "max_sampling_rounds": not self.dynamic_sampling and "without dynamic_sampling",
            },
        )
        refuse_idle(self.breaker, {"kl": no_kl}, "breaker.")
        own = [self.environment.weight] if self.environment else []
        weights = [*own, *(reward.weight for reward in self.rewards)]
        if not weights:
            raise ValueError("rewards: there is nothing to learn from: give one, or an environment")
        if not any(weights):
            raise ValueError("rewards: every weight is 0, so there is nothing to learn")
        return self


class OnPolicyDistill(OnPolicy):
    """Distillation on the student's own samples: at each of their tokens its distribution over the
    vocabulary is pulled to that of the teacher `from`, or of its problem's own among `teachers`.
    All must have one vocabulary."""

    kind: Literal["on_policy_distill"]
    from_: Annotated[str | None, Field(alias="from", exclude_if=lambda given: given is None)] = None  # type: ignore[assignment]  # or teachers
    """The teacher: an earlier stage, a folder or a hub id."""
    teachers: dict[str, str] = Field(default={}, exclude_if=lambda given: not given)
    """Instead of `from`: a teacher for each value of `teacher_field`."""
    teacher_field: str | None = Field(default=None, exclude_if=lambda given: given is None)
    """The problems' column that says who teaches: kind, source, category, or one of their own."""
    student: str
    """An earlier stage, a folder or a hub id. Not from random weights: its samples are noise, of
    which the teacher has nothing to say."""
    beta: Share = 1.0
    """The divergence: 1 reverse KL, KL(student || teacher); 0 forward KL; between them the
    generalized Jensen-Shannon divergence. Not grpo's `beta`: there is no reference."""
    num_generations: PositiveInt = 1
    temperature: Annotated[Temperature, Field(gt=0)] = 1.0
    """Temperature of the samples and of both distributions in the divergence."""
    breaker: DistillBreaker = DistillBreaker()

    @model_validator(mode="after")
    def name_the_teachers(self) -> "OnPolicyDistill":
        if (self.from_ is None) == (not self.teachers):
            raise ValueError("give either from or teachers")
        if "" in self.teachers:
            raise ValueError("teachers: an empty value names no teacher; leave it out")
        if self.sequence_parallel > 1:
            raise ValueError("sequence_parallel is for sft, grpo and distill")
        if self.teachers and not self.teacher_field:
            raise ValueError("teachers need teacher_field, the column that says who teaches a row")
        refuse_idle(self, {"teacher_field": not self.teachers and "without teachers"})
        return self

    @model_validator(mode="after")
    def use_every_key(self) -> "OnPolicyDistill":
        refuse_idle(self.breaker, dict.fromkeys(("kl", "update_kl"), "in this stage"), "breaker.")
        return self

    help = "teach a student on its own samples"
    example = "r1pipe on_policy_distill configs/on_policy.yaml"
    then = "r1pipe eval configs/on_policy.yaml"
    how_made = "on-policy distillation"

    @property
    def policy(self) -> str:
        return self.student

    @property
    def taught_by(self) -> list[str]:
        return [self.from_] if self.from_ else list(dict.fromkeys(self.teachers.values()))

    def parents(self) -> list[str]:
        others = [name for name in super().parents() if name != self.from_]
        return [*self.taught_by, *others, self.student]

    @field_validator("student", mode="before")
    @classmethod
    def have_weights(cls, student: Any) -> Any:
        if isinstance(student, dict):
            raise ValueError(
                "a student from random weights samples noise: train it by a distill stage first, "
                "and give that stage's name"
            )
        return student
