"""Every schema of a recipe's YAML, strict: an unknown key is an error that names the nearest key.

A recipe is a name, a few settings for all stages, and an ordered list of stages. Each stage says
what it starts `from`: an earlier stage, a folder, or a hub id. Option names are TRL's and vLLM's
own where those have one. Imports no torch.
"""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

from r1pipe.checks import CHECKS, Action, Check
from r1pipe.errors import UserError
from rewards.languages import LANGUAGES

Share = Annotated[float, Field(ge=0, le=1)]

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
"""The losses in grpo/losses.py, which imports torch."""


MAX_NAME = 100
"""Bytes of a run's or a stage's name: it is a folder's, to which others add something."""


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


def refuse_idle(settings: BaseModel, idle: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError for a key that does nothing although it is set: to another value than its
    default, because a recipe that is written down has all keys. `idle`: by key, the words that say
    when it does nothing; false where it does something."""
    for key, when in idle.items():
        if when and getattr(settings, key) != type(settings).model_fields[key].get_default():
            raise ValueError(f"{prefix}{key} does nothing {when}; leave it out")


class ProblemSet(Strict):
    """Problems from a recipe in data/ (`recipe`), or the traces of an earlier stage (`stage`)."""

    recipe: str | None = None
    """A name in data/ ("arithmetic"), or the path of a .py file with `load(split, **options)`."""
    stage: str | None = None
    """An earlier `reject` stage whose traces are the rows."""
    split: str = "train"
    options: dict[str, Any] = {}
    """Keyword arguments of the recipe's `load`."""
    on_broken_row: Literal["error", "skip"] = "error"
    """What a row that is not as its dataset promises does: end the run, or be skipped, counted."""

    @model_validator(mode="after")
    def name_one_source(self) -> "ProblemSet":
        if (self.recipe is None) == (self.stage is None):
            raise ValueError("give either recipe or stage")
        idle = self.stage and "with stage, whose traces are read whole"
        refuse_idle(self, dict.fromkeys(("split", "options", "on_broken_row"), idle))
        return self

    @property
    def label(self) -> str:
        return f"{self.recipe or self.stage}/{self.split}"


class Sampling(Strict):
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit."""
    max_completion_length: PositiveInt
    """Tokens; a completion that reaches it counts as truncated."""

    @model_validator(mode="after")
    def use_every_key(self) -> "Sampling":
        # top_p 1 and top_k 0 say the same as a temperature of 0: nothing is cut.
        idle = not self.temperature and "at temperature 0, which takes the likeliest token"
        refuse_idle(self, {"top_p": self.top_p < 1 and idle, "top_k": self.top_k and idle})
        return self


class Reward(Strict):
    function: str
    """A dotted name, such as rewards.math_correct (TRL's reward contract)."""
    weight: float = 1.0
    options: dict[str, Any] = {}
    """Further keyword arguments of the function."""
    conversational: bool = Field(default=False, exclude_if=lambda given: not given)
    """Completions are lists of messages, as TRL gives them where prompts are: for a function that
    reads completion[0]["content"]. Default: strings."""


class Engine(Strict):
    """vLLM's settings; one engine serves all stages of a process that share an architecture."""

    max_model_len: PositiveInt | None = None
    """Prompt plus completion, tokens. Default: the model's own context."""
    max_num_seqs: PositiveInt = 256
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    kv_cache_gib: PositiveFloat | None = None
    """A fixed size of the KV cache instead of gpu_memory_utilization."""
    tensor_parallel_size: PositiveInt = 1
    enforce_eager: bool = False
    """No compilation: always so on CPU, where compiling takes longer than a small run."""


class DoctorLimits(Strict):
    """What `r1pipe doctor`, and the checks before a stage, put up with."""

    min_gold_share: Share = 1.0
    """Of a dataset's own golds that its rewards must give 1; with fewer it is refused."""
    gold_rows: PositiveInt = 500
    """How many golds of each dataset are tried before a stage; `r1pipe doctor` tries all."""
    free_disk_gib: NonNegativeFloat = 1.0
    """What must be left when the checkpoints are written."""


class KeptRollouts(Strict):
    """How much is kept of what a stage samples that trains on its own samples; all of it can be
    trained on again with --replay."""

    keep_gib: PositiveFloat = 10.0
    """Per stage, compressed; beyond it the oldest steps go."""
    routes: bool = True
    """With routing_replay, the routes as well, which a replay needs. A large model's take more room
    than all the rest: layers x experts per token bytes for each token."""


class Saving(Strict):
    """When a training stage saves what it needs to go on exactly where it was."""

    save_steps: PositiveInt | None = None
    """Every so many steps; None: only when the run is told to end."""
    save_total_limit: PositiveInt = 2
    """How many checkpoints are kept while the stage runs, the newest, and besides the best one: of
    grpo by reward, of on_policy_distill by divergence."""
    save_grace_s: NonNegativeFloat = 20.0
    """After SIGTERM or Ctrl-C: seconds that the running step may take to end and be saved. A second
    signal ends the run at once."""

    @model_validator(mode="after")
    def save_what_is_kept(self) -> "Saving":
        refuse_idle(self, {"save_total_limit": self.save_steps is None and "without save_steps"})
        return self


class Optimization(Saving):
    """What all training has in common: TRL's and transformers' names where they have the option."""

    learning_rate: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    """Where the cosine ends."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    """Each after `warmup_steps`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegativeFloat = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt | None = None
    """Tokens in one forward and backward pass: bounds memory, changes nothing else. Default: 16384
    on GPU; 1024 on CPU, where activations that stay in the cache make an update a tenth faster."""
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    """AdamW's moments stay in the CPU's memory (8 bytes a parameter, over all processes)."""
    bias_update_rate: NonNegativeFloat
    """How far a router's bias moves at each optimizer step towards an even load of its experts
    (DeepSeek-V3); nothing happens to models whose routers have none."""
    seq_aux_loss_coef: NonNegativeFloat = 0.0
    """Weight of DeepSeek-V3's auxiliary loss, which evens the load out within each sequence.
    DeepSeek-V3: 1e-4."""

    @model_validator(mode="after")
    def end_a_cosine(self) -> "Optimization":
        refuse_idle(self, {"min_lr": self.lr_scheduler_type != "cosine" and "without the cosine"})
        return self

    def tokens_per_micro_batch(self, *, on_gpu: bool) -> int:
        return self.micro_batch_tokens or (16384 if on_gpu else 1024)


class Supervised(Optimization):
    """Supervised training on traces, packed without padding."""

    save_steps: PositiveInt | None = 100

    max_steps: PositiveInt | None = None
    num_train_epochs: PositiveFloat | None = None
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    """times per_device_train_batch_size: rows in each optimizer step, over all processes."""
    max_length: PositiveInt | None = None
    """Rows of more tokens are dropped and counted, never cut."""
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
        return self


class TraceFilters(Strict):
    """Which traces are dropped for their chain of thought: what R1 drops, each only if asked for
    (arXiv:2501.12948v1, section 2.3.3; the thresholds are not in the paper)."""

    min_language_share: Share = 0.0
    """Of the words, in one language; below it the chain is mixed. 0: not looked at."""
    language: str | None = None
    """Which one: a code such as en. Default: the one that most of the chain's words are in."""
    max_paragraph_length: PositiveInt | None = None
    """Characters between two blank lines."""
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


class TokenizerTraining(Strict):
    """A byte-level BPE trained on the prompts and solutions of some problems."""

    data: ProblemSet
    vocab_size: PositiveInt = 512


class Stage(Strict):
    name: str = ""
    """The stage's folder in the run; default: its kind."""

    trains: ClassVar[bool] = False
    """Whether the stage learns from `data`, which decontamination then has to look at."""
    makes_checkpoint: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def default_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            return {**values, "name": values.get("kind", "")}
        return values

    @field_validator("name")
    @classmethod
    def be_a_folder_name(cls, name: str) -> str:
        if not name.replace("-", "").replace("_", "").isalnum() or len(name.encode()) > MAX_NAME:
            raise ValueError(
                f"a stage's name is made of letters, digits, - and _, at most {MAX_NAME} bytes"
            )
        if name == "publish":
            raise ValueError("a run keeps what it publishes there: take another name")
        return name

    def parents(self) -> list[str]:
        """What the stage starts from: names of earlier stages, folders or hub ids."""
        return []

    def problem_sets(self) -> list[ProblemSet]:
        """Every set of problems that the stage reads."""
        return []

    def learnt_sets(self) -> list[ProblemSet]:
        """Those of them whose `solution`s are trained on."""
        return []


class Init(Stage):
    """A policy from random weights, with a tokenizer built for the data."""

    kind: Literal["init"]
    model: dict[str, Any]
    """`model_type` and the keyword arguments of that transformers config."""
    tokenizer: TokenizerTraining

    def problem_sets(self) -> list[ProblemSet]:
        return [self.tokenizer.data]


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class TrainingSet(ProblemSet):
    """One of several sets that a stage trains on."""

    weight: PositiveFloat | None = None
    """The sets' rows stand to each other as their weights: as many as there can be without taking
    one twice. Default: all rows."""


class TrainingStage(Stage):
    from_: Annotated[str, Field(alias="from")]
    """An earlier stage, a checkpoint folder, or a hub id."""
    data: Annotated[list[TrainingSet], Field(min_length=1), BeforeValidator(as_list)]
    """One set of problems, or a list of them."""

    trains: ClassVar[bool] = True

    def parents(self) -> list[str]:
        return [self.from_, *(source.stage for source in self.problem_sets() if source.stage)]

    def problem_sets(self) -> list[ProblemSet]:
        return list(self.data)

    @field_validator("data")
    @classmethod
    def weigh_all_or_none(cls, data: list[TrainingSet]) -> list[TrainingSet]:
        rows = [source.model_dump_json(exclude={"weight"}) for source in data]
        if len(set(rows)) < len(rows):
            raise ValueError("a set is there twice; give it one weight")
        weighted = [source for source in data if source.weight is not None]
        if weighted and len(data) == 1:
            raise ValueError("a weight says nothing of one set alone")
        if len(weighted) not in (0, len(data)):
            raise ValueError("give all of the sets a weight, or none of them")
        return data

    @field_serializer("data")
    def write_as_given(self, data: list[TrainingSet]) -> Any:
        """One set without a list around it; weights where there are some."""
        rows = [source.model_dump(mode="json") for source in data]
        rows = [{k: v for k, v in row.items() if (k, v) != ("weight", None)} for row in rows]
        return rows if len(rows) > 1 else rows[0]


class Sft(TrainingStage):
    """Cold start: supervised training on the problems' own solutions."""

    kind: Literal["sft"]
    filters: TraceFilters = TraceFilters()
    """Which of the solutions are not trained on."""
    train: Supervised

    def learnt_sets(self) -> list[ProblemSet]:
        return self.problem_sets()


class Limit(Strict):
    """Of one check of the circuit breaker; what a recipe leaves out is the check's own."""

    limit: float
    action: Action


def complete_limit(check: Check, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if check.at == "step" and value.get("action") == "skip":
        raise ValueError("this is seen after the update, which cannot be skipped then")
    complete = {"limit": check.limit, "action": check.action, **value}
    if complete["action"] == "ignore" and complete["limit"] != check.limit:
        raise ValueError("limit does nothing with action ignore; give another action")
    return complete


class BreakerSettings(Strict):
    window: PositiveInt = 8
    """Steps before the present one that it is compared with; nothing is before there are half as
    many."""
    max_skips: Annotated[int, Field(ge=0)] = 3
    """Steps in a row whose update may be skipped."""


def make_breaker(name: str, checks: dict[str, Check]) -> type[BreakerSettings]:
    return create_model(
        name,
        __base__=BreakerSettings,
        __doc__="When training must not go on as it does: a Limit for each of checks.CHECKS.",
        **{
            name: (
                Annotated[Limit, BeforeValidator(partial(complete_limit, check))],
                Limit(limit=check.limit, action=check.action),
            )
            for name, check in checks.items()
        },
    )


Breaker = make_breaker("Breaker", CHECKS)
# A student becomes as sure as its teacher is: that its entropy falls is no collapse.
DistillBreaker = make_breaker(
    "DistillBreaker",
    CHECKS
    | {name: replace(CHECKS[name], action="ignore") for name in ("entropy", "entropy_collapse")},
)


class Difficulty(Strict):
    """Which problems a policy is trained on, by how often it solves them."""

    num_samples: PositiveInt = 8
    """Of each problem, by the policy that the stage starts from, with the stage's own sampling."""
    min_pass_rate: Share = 0.0
    max_pass_rate: Share = 1.0
    """Problems outside of the limits are left out, and those that no reward could judge."""
    reward: str | None = None
    """What decides, where it is 1, that a sample has passed. Default: the stage's first reward."""
    order: Literal["none", "easy_first"] = "none"
    """Within an epoch."""
    refresh_steps: PositiveInt | None = None
    """Every so many steps the choice is made anew, from the rollouts of these steps and, for
    problems that had none, from `num_samples` samples of the policy as it is then."""

    @model_validator(mode="after")
    def leave_something(self) -> "Difficulty":
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError("min_pass_rate is above max_pass_rate")
        return self


class PromptingStage(TrainingStage):
    """What the stages have in common that sample answers to their problems."""

    max_prompt_length: PositiveInt | None = None
    """Tokens; problems with longer prompts are dropped and counted, never cut. Default: such a
    problem is an error if it does not fit the context."""


class OnPolicy(PromptingStage, Optimization):
    """What the stages have in common that train a model on its own samples."""

    save_steps: PositiveInt | None = 10
    rewards: list[Reward] = []
    """Of the samples. In on_policy_distill for the log and the breaker: its loss does without."""
    max_steps: PositiveInt
    prompts_per_step: PositiveInt
    num_generations: PositiveInt
    """Samples per prompt."""
    temperature: PositiveFloat = 1.0
    max_completion_length: PositiveInt
    async_steps: Annotated[int, Field(ge=0, le=1)] = 0
    """1: the next batch is sampled, by the policy of the step before, while this one trains."""
    steps_per_generation: PositiveInt = 1
    """Optimizer steps (minibatches) per pass over a batch of rollouts."""

    learning_rate: PositiveFloat = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    bias_update_rate: NonNegativeFloat = 0.0

    routing_replay: bool = False
    """Of a mixture of experts: the trainer sends each token to the experts that the sampler chose
    (R3). For a bf16 sampler; in float32 both choose the same."""

    breaker: Breaker = Breaker()
    verify_sync: bool | None = None
    """After each weight sync, sample a few tokens and hold them to breaker.logprob_diff at once.
    Default: if async_steps; otherwise the next batch, all of it, is held to it anyway."""

    @property
    def policy(self) -> str:
        """The checkpoint that samples and is trained."""
        return self.from_

    @property
    def verifies_sync(self) -> bool:
        return bool(self.async_steps) if self.verify_sync is None else self.verify_sync

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
    rewards: Annotated[list[Reward], Field(min_length=1)]
    num_generations: Annotated[int, Field(ge=2)]
    """Samples per prompt: the group."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit. Where top_p or top_k cut the distribution, the trainer cuts its own alike."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal are replaced by groups of further prompts (DAPO)."""
    max_sampling_rounds: PositiveInt = 4
    """Rounds of sampling in a step before it goes on with the groups that it has."""
    difficulty: Difficulty | None = None
    """Default: all problems, in any order."""

    loss_type: str = "grpo"
    """One of LOSS_TYPES, or the dotted path of a loss of your own."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the advantages are divided by: the group's std, the batch's, or nothing."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL term to the reference policy; 0 keeps no reference."""
    kl_estimator: Literal["k1", "k3"] = "k3"
    use_bias_correction_kl: bool = False
    """KL term times pi / pi_old, so that its gradient is the KL's (DeepSeek-V3.2)."""
    reference_refresh_steps: PositiveInt | None = None
    """Every so many steps the reference becomes the current policy."""
    epsilon: PositiveFloat = 0.2
    epsilon_high: PositiveFloat | None = None
    """Upper clip range; default: epsilon. For cispo the largest weight itself."""
    delta: PositiveFloat | None = None
    """Largest ratio where the advantage is negative (two-sided clipping); above 1 + epsilon."""
    num_iterations: PositiveInt = 1
    """Passes over a batch of rollouts (mu in the GRPO paper)."""
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

    @property
    def never_clips(self) -> bool:
        """Whether clip ranges were chosen, and all ratios are 1."""
        ranges = (self.epsilon, self.epsilon_high, self.delta)
        chosen = ranges != (0.2, None, None) and self.loss_type in set(LOSS_TYPES) - {"cispo"}
        return chosen and self.steps_per_generation * self.num_iterations == 1

    @field_validator("loss_type")
    @classmethod
    def name_a_loss(cls, loss_type: str) -> str:
        if loss_type not in LOSS_TYPES and "." not in loss_type:
            near = difflib.get_close_matches(loss_type, LOSS_TYPES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LOSS_TYPES)}"
            raise ValueError(f"no such loss; {hint} (or give a dotted path)")
        return loss_type

    @model_validator(mode="after")
    def fit_the_loss(self) -> "Grpo":
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type cispo needs epsilon_high, its largest weight, such as 5.0")
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
        uncorrected = not getattr(self, correction) and f"without {correction}"
        refuse_idle(
            self,
            {
                "kl_estimator": no_kl,
                "use_bias_correction_kl": no_kl,
                "reference_refresh_steps": no_kl,
                "epsilon": cispo,
                "delta": cispo,
                "vllm_importance_sampling_mode": uncorrected,
                "vllm_importance_sampling_clip_min": uncorrected,
                "vllm_importance_sampling_clip_max": uncorrected,
                "max_sampling_rounds": not self.dynamic_sampling and "without dynamic_sampling",
            },
        )
        refuse_idle(self.breaker, {"kl": no_kl}, "breaker.")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so there is nothing to learn")
        return self


class FewShot(Strict):
    """Worked examples before every problem, as earlier turns of the chat; the traces are without
    them. For chat templates that keep the `<think>` of earlier turns, as a base model's do."""

    data: ProblemSet
    """The first ones with `solution`s are shown."""
    num_examples: PositiveInt = 2


class Traces(Strict):
    """Samples of a policy or a teacher, the right ones kept."""

    num_generations: PositiveInt
    sampling: Sampling
    rewards: Annotated[list[Reward], Field(min_length=1)] = [
        Reward(function="rewards.math_correct"),
        Reward(function="rewards.format"),
    ]
    """A sample is accepted if every one of these gives it its full reward, 1."""
    min_pass_rate: Share = 0.0
    max_pass_rate: Share = 1.0
    """Problems of whose samples fewer, or more, are accepted make no traces."""
    filters: TraceFilters = TraceFilters()
    max_per_problem: PositiveInt = 1
    """Kept samples per problem; equal ones count once."""
    choose: Literal["shortest", "diverse"] = "shortest"
    """Which ones: the shortest, or the shortest and then those least like the ones kept."""
    few_shot: FewShot | None = None

    @model_validator(mode="after")
    def use_every_key(self) -> "Traces":
        refuse_idle(self, {"choose": self.max_per_problem == 1 and "with max_per_problem 1"})
        for reward in self.rewards:
            everyone = "here, where every reward has to be full"
            refuse_idle(reward, {"weight": everyone}, f"the {reward.function} reward's ")
        return self


class TeacherEndpoint(Strict):
    """An OpenAI-compatible server of chat completions."""

    base_url: str
    """Such as http://localhost:8000/v1."""
    model: str
    """The server's name of it."""
    api_key_env: str | None = None
    """The environment variable that holds the key. The key itself is written nowhere."""
    max_concurrency: PositiveInt = 32
    """Requests under way at a time."""
    max_retries: Annotated[int, Field(ge=0)] = 8
    """Of a request, each after a longer pause: connection errors, 408, 409, 429, 5xx."""
    timeout_s: PositiveFloat = 1800.0
    """Of a request: the server sends nothing until the whole chain of thought is there."""
    extra_body: dict[str, Any] = {}
    """More of the request, such as chat_template_kwargs."""

    @field_validator("base_url")
    @classmethod
    def be_a_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give a URL such as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ValueError(
                "no name and password in the URL: it is written into the run's records"
            )
        return url


class Mix(Strict):
    """Other rows among the traces, such as R1's 200k of general data among 800k."""

    data: ProblemSet
    """With `solution`s."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of all rows of traces.jsonl."""


class Reject(PromptingStage):
    """Rejection sampling, from a checkpoint or a teacher: writes traces for a later `sft` stage."""

    kind: Literal["reject"]
    from_: Annotated[str | None, Field(alias="from")] = None
    """An earlier stage, a checkpoint folder, or a hub id; or else there is a `teacher`."""
    teacher: TeacherEndpoint | None = None
    traces: Traces
    mix: Mix | None = None

    makes_checkpoint: ClassVar[bool] = False

    def parents(self) -> list[str]:
        return [name for name in super().parents() if name is not None]

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
                "max_prompt_length: nobody here has the tokenizer of a teacher's server"
            )
        return self


class Distill(PromptingStage):
    """Rejection sampling from `from`, then supervised training of a dense student."""

    kind: Literal["distill"]
    student: str | dict[str, Any]
    """An earlier stage, a folder or a hub id; or, as in `init`, a config for a student from random
    weights, which takes over the teacher's tokenizer."""
    traces: Traces
    train: Supervised

    def parents(self) -> list[str]:
        student = [self.student] if isinstance(self.student, str) else []
        return [*super().parents(), *student]

    def problem_sets(self) -> list[ProblemSet]:
        few_shot = self.traces.few_shot
        return [*self.data, *([few_shot.data] if few_shot else [])]


class OnPolicyDistill(OnPolicy):
    """Distillation on the student's own samples: at each of their tokens its distribution over the
    vocabulary is pulled to that of the teacher `from`. Both must have one vocabulary."""

    kind: Literal["on_policy_distill"]
    student: str
    """An earlier stage, a folder or a hub id. Not from random weights: its samples are noise, of
    which the teacher has nothing to say."""
    beta: Share = 1.0
    """The divergence: 1 reverse KL, KL(student || teacher); 0 forward KL; between them the
    generalized Jensen-Shannon divergence. Not grpo's `beta`: there is no reference."""
    num_generations: PositiveInt = 1
    temperature: PositiveFloat = 1.0
    """Of the samples, and of both distributions in the divergence."""
    breaker: DistillBreaker = DistillBreaker()

    # What grpo can choose and this stage cannot: its samples are the student's own distribution,
    # of which nothing is cut off, and each is trained on once, whatever it was worth.
    top_p: ClassVar[float] = 1.0
    top_k: ClassVar[int] = 0
    dynamic_sampling: ClassVar[bool] = False
    difficulty: ClassVar[None] = None
    scale_rewards: ClassVar[None] = None
    reference_refresh_steps: ClassVar[None] = None
    num_iterations: ClassVar[int] = 1
    mask_truncated_completions: ClassVar[bool] = False

    @model_validator(mode="after")
    def use_every_key(self) -> "OnPolicyDistill":
        refuse_idle(self.breaker, dict.fromkeys(("kl", "update_kl"), "in this stage"), "breaker.")
        return self

    @property
    def policy(self) -> str:
        return self.student

    def parents(self) -> list[str]:
        return [*super().parents(), self.student]

    @field_validator("student", mode="before")
    @classmethod
    def have_weights(cls, student: Any) -> Any:
        if isinstance(student, dict):
            raise ValueError(
                "a student from random weights samples noise: train it by a distill stage first, "
                "and give that stage's name"
            )
        return student


class EvalSet(ProblemSet):
    """A set of held-out problems, and what it needs that the stage's other sets do not."""

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

    temperature: NonNegativeFloat = 0.6
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
    reward: str = "rewards.math_correct"
    format_reward: str = "rewards.format"
    max_overlap: Share = 0.0
    """Share of a set's problems that a checkpoint may have seen in training: above it the stage
    ends before anything is sampled. Models from elsewhere, whose data nobody knows, pass."""
    summarizes: bool = True
    """Whether the run's own summary.json, summary.md and curves.png are of this stage."""

    makes_checkpoint: ClassVar[bool] = False

    def parents(self) -> list[str]:
        return self.checkpoints

    def problem_sets(self) -> list[ProblemSet]:
        return list(self.data)

    def for_one(self, checkpoint: str) -> "Eval":
        """The same for another checkpoint alone: a stage of its own, beside the recipe's."""
        digest = hashlib.sha256(checkpoint.encode()).hexdigest()[:6]
        words = re.sub(r"[^A-Za-z0-9]+", "-", Path(checkpoint).name).strip("-")[:40]
        own = {"name": f"{self.name}-{words}-{digest}", "checkpoints": [checkpoint]}
        return self.model_copy(update={**own, "summarizes": False})

    @model_validator(mode="after")
    def use_every_key(self) -> "Eval":
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


AnyStage = Annotated[
    Init | Sft | Grpo | Reject | Distill | OnPolicyDistill | Eval, Field(discriminator="kind")
]
STAGE_TYPES: dict[str, type[Stage]] = {
    get_args(t.model_fields["kind"].annotation)[0]: t for t in get_args(get_args(AnyStage)[0])
}


class Recipe(Strict):
    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    runs_dir: str = "runs"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the sampler and in the trainer's forward."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    chat_template: str | None = None
    """Of models from elsewhere whose tokenizer has none, as a base model's: Jinja, or a file of it.
    Checkpoints that are made from them have it."""
    licenses: dict[str, str] = {}
    """Licences, by the hub's identifiers, of base models and data recipes that do not say their
    own: `publish` needs them."""
    ngram: PositiveInt = 13
    """Words that a training and an evaluation problem must share in a row to count as overlap."""
    phase_timeout_s: PositiveFloat | None = 1800.0
    """Seconds without a step of vLLM, a group judged, a micro-batch, a collective, after which the
    run counts as hung and ends. Starting vLLM is one such piece. null: never."""
    engine: Engine = Engine()
    doctor: DoctorLimits = DoctorLimits()
    rollouts: KeptRollouts = KeptRollouts()
    price_per_device_hour: NonNegativeFloat | None = None
    """Of a GPU, or of a CPU core where there is none: what `r1pipe cost` reckons with."""
    currency: str = "USD"
    tracking: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Where metrics go beside metrics.jsonl; each needs its package."""
    tracking_project: str = "r1pipe"
    stages: Annotated[list[AnyStage], Field(min_length=1)]

    @field_validator("name")
    @classmethod
    def be_a_folder_name(cls, name: str) -> str:
        if (
            not name.isprintable()
            or name != name.strip()
            or re.match(r"[.~-]|$", name)
            or set(name) & set("/\\")
            or len(name.encode()) > MAX_NAME
        ):
            raise ValueError(
                "a run's name is that of its folder in runs_dir: no / in it, no dot or - at its "
                f"start, at most {MAX_NAME} bytes; another place for runs is runs_dir"
            )
        return name

    @field_validator("chat_template")
    @classmethod
    def read_template(cls, template: str | None) -> str | None:
        """The text itself, of which a finished stage's record then tells."""
        if template is None or "{" in template:
            return template
        path = Path(template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8"
            raise ValueError(f"neither Jinja nor a file: {path.absolute()}: {why}") from error

    @model_validator(mode="after")
    def link_stages(self) -> "Recipe":
        earlier: set[str] = set()
        size = self.engine.tensor_parallel_size
        for stage in self.stages:
            if stage.name in earlier:
                raise ValueError(f'stages: two are called "{stage.name}"; give one a name')
            for parent in stage.parents():
                later = [s.name for s in self.stages if s.name == parent and parent not in earlier]
                if later:
                    raise ValueError(f'stages: "{stage.name}" starts from "{parent}", a later one')
            for source in stage.problem_sets():
                if source.stage and source.stage not in earlier:
                    raise ValueError(f'stages: "{stage.name}": no earlier stage "{source.stage}"')
            if isinstance(stage, OnPolicy) and stage.async_steps and size > 1:
                raise ValueError(
                    f"stages.{stage.name}.async_steps: sampling beside the training needs "
                    f"engine.tensor_parallel_size 1, not {size}: collectives of two threads would "
                    "meet in another order on every rank"
                )
            earlier.add(stage.name)
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    def stage(self, name: str) -> Stage | None:
        return next((s for s in self.stages if s.name == name), None)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe. `overrides` are `key=value` pairs, such as `seed=1` or
    `stages.grpo.max_steps=2` (a stage by its name), the value in YAML.

    Raises UserError naming the file and the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        here = "" if path.is_absolute() else f", in {Path.cwd()}"
        raise UserError(f"{path}: cannot be read: {error.strerror}{here}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8") from error
    try:
        values = yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or f"not YAML: {error}"
        raise UserError(f"{path}: {where}{' '.join(problem.split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping with name and stages")
    for override in overrides or []:
        apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, values)}") from error


class RecipeLoader(yaml.SafeLoader):
    """A key that comes twice is a mistake: YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f'the key "{key.value}" comes twice', problem_mark=key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def apply_override(values: dict, override: str) -> None:
    """Parts of a key are keys, and of a list a stage's name or a number from 0: rewards.0.weight,
    or rewards[0].weight."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f'"{override}": an override is written key=value')
    *path, last = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    node: Any = values
    for part in path:
        if isinstance(node, list):
            node = node[find_entry(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f'"{override}": "{part}" is not a section')
    try:
        new = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f'"{override}": cannot be set: {" ".join(str(error).split())}') from error
    node[find_entry(node, last, override) if isinstance(node, list) else last] = new


def find_entry(entries: list, part: str, override: str) -> int:
    names = [str(e.get("name") or e.get("kind")) if isinstance(e, dict) else "" for e in entries]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    if any(isinstance(entry, dict) and "kind" in entry for entry in entries):
        raise UserError(f'"{override}": no stage "{part}"; there are {", ".join(names)}')
    there = f"0 to {len(entries) - 1}" if entries else "none"
    raise UserError(f'"{override}": no entry "{part}" in the list; there are {there}')


def describe_error(error: ValidationError, values: dict) -> str:
    """pydantic's first complaint as `key: what is wrong`, with the nearest key if it is unknown."""
    first = error.errors()[0]
    location = list(first["loc"])
    if len(location) >= 2 and location[0] == "stages" and isinstance(location[1], int):
        raw = values["stages"][location[1]]
        name = (raw.get("name") or raw.get("kind")) if isinstance(raw, dict) else None
        # pydantic inserts the discriminator's value after the index.
        location = ["stages", name or location[1], *leave_out_numbers(location[3:], raw)]
    key = ".".join(str(part) for part in location)
    prefix = f"{key}: " if key else ""
    if first["type"] == "extra_forbidden":
        return f"{prefix}unknown key; {suggest_key(first['loc'], values)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{prefix}required key is missing"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{prefix}kind must be one of {', '.join(STAGE_TYPES)}"
    if not isinstance(first.get("input"), dict | list):
        return f"{prefix}{message} (got {first.get('input')!r:.80})"
    return f"{prefix}{message}"


def leave_out_numbers(location: list, given: Any) -> Iterator[str | int]:
    """A place in what the user gave: where one thing may stand for a list of one, without its 0."""
    for part in location:
        if isinstance(part, int) and not isinstance(given, list):
            continue
        try:
            given = given[part]
        except (KeyError, TypeError, IndexError):
            given = None
        yield part


def suggest_key(location: tuple, values: dict) -> str:
    """What the unknown key at `location` was meant to be: one with a similar name that is not
    given yet, or one that another section has."""
    key = str(location[-1])
    models: list[type[BaseModel]] = [Recipe]
    given: Any = values
    for part in location[:-1]:
        if isinstance(given, list) or part in getattr(given, "keys", tuple)():
            given = given[part]
        if part in STAGE_TYPES and len(models) == 1:
            models.append(STAGE_TYPES[part])
        elif nested := list_sections(models[-1]).get(part):
            models.append(nested)
    known = list_keys(models[-1])
    left = [name for name in known if not isinstance(given, dict) or name not in given]
    if near := difflib.get_close_matches(key, left, n=1, cutoff=0.7):
        return f"did you mean {near[0]}?"
    sections = list_sections(models[-1]) | list_sections(Recipe)
    if found := next((name for name, section in sections.items() if key in list_keys(section)), ""):
        return f"did you mean {found}.{key}?"
    if key in list_keys(Recipe):
        return f"{key} is a key of the recipe itself"
    if issubclass(models[-1], ProblemSet):
        return f"did you mean options.{key}? Known keys: {', '.join(sorted(known))}"
    return f"known keys: {', '.join(sorted(known))}"


def list_keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def list_sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The keys whose values are sections themselves."""
    sections = {}
    for name, field in model.model_fields.items():
        nested = [t for t in walk_types(field.annotation) if issubclass(t, BaseModel)]
        if nested and name != "stages":
            sections[field.alias or name] = nested[0]
    return sections


def walk_types(annotation: Any) -> list[type]:
    """All classes inside a possibly generic annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [t for arg in get_args(annotation) for t in walk_types(arg)]
