"""Settings shared by all kinds of stages: problem sets, sampling, rewards, training."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from r1pipe.config.adapter import Adapter
from r1pipe.config.strict import Strict, refuse_idle
from rewards.judges.settings import LIMITS

Share = Annotated[float, Field(ge=0, le=1)]

COLDEST = 0.01
"""vLLM takes lower temperatures for this one, and says so in its own log alone."""


def check_temperature(temperature: float) -> float:
    if 0 < temperature < COLDEST:
        raise ValueError(f"vLLM samples at {COLDEST:g} what is colder: give {COLDEST:g}, or 0")
    return temperature


Temperature = Annotated[NonNegativeFloat, AfterValidator(check_temperature)]
"""0: the likeliest token."""

MAX_NAME = 100
"""Bytes in the name of a run or stage: it becomes a folder name, with affixes."""


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
    """A row that its dataset's schema does not allow ends the run, or is skipped and counted."""

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
    temperature: Temperature = 1.0
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

    @property
    def is_judge(self) -> bool:
        """Whether a model judges: it costs money, so the doctor does not ask it."""
        return self.function == "rewards.judge"

    def decisive(self) -> dict[str, Any]:
        """As JSON, without the options that change no reward."""
        dumped = self.model_dump(mode="json")
        if self.is_judge:
            options = dumped["options"].items()
            dumped["options"] = {name: value for name, value in options if name not in LIMITS}
        return dumped


ENVIRONMENT = "environment"
"""The name of an environment's own rewards among those of the reward functions."""


class Environment(Strict):
    """What the policy talks to in several turns (docs/extending.md). A row's own column
    `environment`, a name or `{name, options}`, wins over `name` and `options`."""

    name: str
    """`tools`, or the dotted name of a class or function: called with the problem and `options`, it
    returns an envs.base.Environment."""
    options: dict[str, Any] = {}
    weight: float = 1.0
    """Of the environment's own rewards, beside the stage's reward functions."""
    max_turns: PositiveInt = 8
    max_tool_s: PositiveFloat = 60.0
    """Seconds that the environment may take to answer; then the episode ends."""
    tool_parser: str | None = None
    """vLLM's parser of the model's tool calls (its --tool-call-parser): hermes, llama3_json,
    deepseek_v3, ... For environments with tools."""

    def functions_used(self) -> list[str]:
        return [self.name] if "." in self.name else []


class Saving(Strict):
    """When a training stage saves the checkpoint that it can be resumed from exactly."""

    save_steps: PositiveInt | None = None
    """Every so many steps; None: only when the run is told to end."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints to keep while the stage runs, besides the best one (grpo: by reward;
    on_policy_distill: by divergence)."""
    save_grace_s: NonNegativeFloat = 20.0
    """Seconds that the running step has, after SIGTERM or Ctrl-C, to end and be saved. A second
    signal ends the run at once."""

    @model_validator(mode="after")
    def save_what_is_kept(self) -> "Saving":
        refuse_idle(self, {"save_total_limit": self.save_steps is None and "without save_steps"})
        return self


class Mtp(Strict):
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): the model's prediction
    layer learns each token from those up to the second before it. In supervised training the model
    learns with it; on the policy's own samples the layer alone does, to follow the policy."""

    loss_weight: PositiveFloat = 0.3
    """Weight of its loss (lambda). DeepSeek-V3: 0.3, and 0.1 for the last third."""


class Indexer(Strict):
    """The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, section
    2.1) learns to score tokens as attention weighs them: a KL of its own, optimizer group included.
    """

    phase: Literal["dense", "warmup", "sparse"]
    """dense: attention sees all tokens, the model learns with it. warmup: the same, and the model
    stays as it is. sparse: attention sees the model's `index_topk` selected tokens, and both learn.
    """
    learning_rate: PositiveFloat = 1e-3
    """Of the indexer, on the stage's schedule. DeepSeek-V3.2: 1e-3 in the warm-up, then the
    model's."""

    @property
    def is_dense(self) -> bool:
        return self.phase != "sparse"

    @property
    def is_alone(self) -> bool:
        """Whether nothing else learns."""
        return self.phase == "warmup"


class Optimization(Saving):
    """The optimizer and its schedule, under the names that TRL and transformers use."""

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
    sharding: Literal["full", "none"] = Field(
        default="full", exclude_if=lambda given: given == "full"
    )
    """In several processes. full: FSDP, each holds a part of every weight. none: each holds them
    all, and gradients are summed once an optimizer step, as DDP does; faster for small models."""
    expert_parallel: PositiveInt = Field(default=1, exclude_if=lambda given: given == 1)
    """Neighbouring processes that share out every layer's experts and send each other tokens.
    1: FSDP gathers all experts of a layer, one layer at a time (docs/distributed.md)."""
    sequence_parallel: PositiveInt = Field(default=1, exclude_if=lambda given: given == 1)
    """Neighbouring processes that share out the tokens of each micro-batch, for sequences whose
    activations are too many for one device."""
    offload_optimizer: bool = False
    """AdamW's moments stay in the CPU's memory (8 bytes a parameter, over all processes)."""
    bias_update_rate: NonNegativeFloat
    """Step size of a router's bias, at each optimizer step, towards an even load of the experts
    (DeepSeek-V3); no effect on routers without a bias."""
    seq_aux_loss_coef: NonNegativeFloat = 0.0
    """Weight of DeepSeek-V3's auxiliary loss, which evens the load out within each sequence.
    DeepSeek-V3: 1e-4."""
    adapter: Adapter | None = Field(default=None, exclude_if=lambda given: given is None)
    """Train an adapter only; the stage's checkpoint has it merged, and apart in `adapter/`."""
    mtp: Mtp | None = Field(default=None, exclude_if=lambda given: given is None)
    """Train the prediction layer, which a deepseek_v3 made with `num_mtp_layers: 1` has. Default:
    leave it as it is."""
    indexer: Indexer | None = Field(default=None, exclude_if=lambda given: given is None)
    """Train the indexer, which a deepseek_v32 has. Default: attention is sparse, and the indexer
    stays as it is."""
    fp8: Literal["rollouts", "update", "both"] | None = Field(
        default=None, exclude_if=lambda given: given is None
    )
    """What computes in FP8 as DeepSeek-V3 does, emulated (models/fp8.py): the sampler, with rounded
    weights; the trainer's products, in which tiles of tokens begin anew in each micro-batch; or
    both. The checkpoint keeps its precision."""

    @property
    def parallel(self) -> dict[str, Any]:
        """How processes share the model out: arguments of `shard`."""
        names = ("sharding", "expert_parallel", "sequence_parallel")
        return {name: getattr(self, name) for name in names}

    @property
    def samples_in_fp8(self) -> bool:
        return self.fp8 in ("rollouts", "both")

    @property
    def trains_in_fp8(self) -> bool:
        return self.fp8 in ("update", "both")

    @model_validator(mode="after")
    def round_all_weights(self) -> "Optimization":
        if self.fp8 and self.adapter:
            raise ValueError("fp8 is for training without an adapter; leave one of them out")
        unsharded = self.sharding == "none"
        if self.expert_parallel > 1 and (self.fp8 or self.adapter or unsharded):
            what = "fp8" if self.fp8 else "an adapter" if self.adapter else "sharding none"
            raise ValueError(f"expert_parallel does not go with {what}; leave one of them out")
        of_neighbours = [k for k in ("fp8", "seq_aux_loss_coef") if getattr(self, k)]
        if self.sequence_parallel > 1 and of_neighbours:
            what = of_neighbours[0]
            raise ValueError(f"sequence_parallel does not go with {what}; leave one of them out")
        return self

    @model_validator(mode="after")
    def end_a_cosine(self) -> "Optimization":
        refuse_idle(self, {"min_lr": self.lr_scheduler_type != "cosine" and "without the cosine"})
        return self

    @model_validator(mode="after")
    def leave_the_base_alone(self) -> "Optimization":
        idle = self.adapter and "with an adapter"
        refuse_idle(self, {"bias_update_rate": idle, "mtp": idle, "indexer": idle})
        return self

    @model_validator(mode="after")
    def leave_the_model_alone(self) -> "Optimization":
        idle = self.indexer and self.indexer.is_alone and "in the indexer's warmup"
        keys = ("learning_rate", "weight_decay", "bias_update_rate", "seq_aux_loss_coef")
        refuse_idle(self, dict.fromkeys(keys, idle))
        return self

    def tokens_per_micro_batch(self, *, on_gpu: bool) -> int:
        return self.micro_batch_tokens or (16384 if on_gpu else 1024)


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class TokenizerTraining(Strict):
    """A byte-level BPE trained on the prompts and solutions of some problems."""

    data: Annotated[list[ProblemSet], Field(min_length=1), BeforeValidator(as_list)]
    """One set of problems, or a list of them."""
    vocab_size: PositiveInt = 512

    @field_serializer("data")
    def write_as_given(self, data: list[ProblemSet]) -> Any:
        """One set without a list around it."""
        rows = [source.model_dump(mode="json") for source in data]
        return rows if len(rows) > 1 else rows[0]


STAGE_TYPES: dict[str, type["Stage"]] = {}
"""The kinds of stages, by the recipe's `kind`: every subclass of Stage that has one."""


class Stage(Strict):
    """A stage's settings, and what the rest of the package has to know about its kind.

    A kind is a subclass with `kind: Literal["..."]`, and a module `r1pipe/stages/KIND.py` with
    `run(stage, context) -> facts` (and `replay`, if it can train on kept rollouts). Whatever else
    asks about a stage (doctor, memory estimate, lineage, card, command line) asks by the attributes
    and methods below.
    """

    name: str = ""
    """The stage's folder in the run; default: its kind."""

    module: ClassVar[str] = ""
    """Where `run` is; default: r1pipe.stages.KIND."""
    help: ClassVar[str] = ""
    """Help text of `r1pipe KIND`."""
    example: ClassVar[str] = ""
    """A command line; default: `r1pipe KIND configs/demo.yaml`."""
    then: ClassVar[str] = ""
    """The next command."""
    how_made: ClassVar[str] = ""
    """A checkpoint's origin, for its model card."""
    makes_checkpoint: ClassVar[bool] = True
    measures: ClassVar[bool] = False
    """Whether the stage's problems are held out: kept away from all training."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for kind in get_args(cls.__annotations__.get("kind")):
            STAGE_TYPES[kind] = cls

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

    # Data

    def problem_sets(self) -> list[ProblemSet]:
        """Every set of problems that the stage reads."""
        return []

    def training_sets(self) -> list[ProblemSet]:
        """Those whose problems are trained on, or sampled for training."""
        return []

    def learnt_sets(self) -> list[ProblemSet]:
        """Those whose `solution`s are trained on."""
        return []

    # Checkpoints: names of earlier stages, folders or hub ids

    def parents(self) -> list[str]:
        """All that the stage starts from."""
        return []

    @property
    def weights_from(self) -> str | None:
        """The checkpoint that is trained; None if its weights are random, or none is trained."""
        return None

    @property
    def taught_by(self) -> list[str]:
        """The checkpoints whose samples or distributions this or a later stage learns from."""
        return []

    @property
    def new_model(self) -> dict[str, Any] | None:
        """`model_type` and config arguments of a model that is built from random weights."""
        return None

    def models(self) -> list[str]:
        """The checkpoints that the stage loads."""
        names = (*self.taught_by, self.weights_from)
        return [name for name in names if name is not None]

    # What it does with them

    def samplings(self) -> list[tuple[str, Sampling]]:
        """The checkpoints that vLLM samples from, and how."""
        return []

    def rewards_used(self) -> list[Reward]:
        """The rewards that the stage calls."""
        return []

    def environment_used(self) -> Environment | None:
        """In which the stage's samples are episodes."""
        return None

    def functions_used(self) -> list[str]:
        """Dotted names of all functions of the user's choice: their sources are in the lineage."""
        environment = self.environment_used()
        own = environment.functions_used() if environment else []
        return [*(reward.function for reward in self.rewards_used()), *own]

    @property
    def optimization(self) -> Optimization | None:
        """Settings of the optimizer; None if nothing is trained."""
        return None

    @property
    def longest_sequence(self) -> int | None:
        """Tokens of the longest sequence that is trained on; None: as the model's context."""
        return None

    def remarks(self) -> list[str]:
        """Warnings of the doctor: settings that are allowed and hardly meant."""
        return []


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

    def parents(self) -> list[str]:
        return [self.from_, *(source.stage for source in self.problem_sets() if source.stage)]

    def problem_sets(self) -> list[ProblemSet]:
        return list(self.data)

    def training_sets(self) -> list[ProblemSet]:
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


class PromptingStage(TrainingStage):
    """A stage that samples answers to its problems."""

    max_prompt_length: PositiveInt | None = None
    """Tokens; problems with longer prompts are dropped and counted, never cut. Default: such a
    problem is an error if it does not fit the context. In an environment the prompt is its first,
    with the tools: one is started for each problem."""


class Init(Stage):
    """A policy from random weights, with a tokenizer built for the data."""

    kind: Literal["init"]
    model: dict[str, Any]
    """`model_type` and the keyword arguments of that transformers config."""
    tokenizer: TokenizerTraining

    help = "make a policy from random weights"
    then = "r1pipe sft configs/demo.yaml"
    how_made = "random weights, untrained"

    def problem_sets(self) -> list[ProblemSet]:
        return list(self.tokenizer.data)

    @property
    def new_model(self) -> dict[str, Any]:
        return {"vocab_size": self.tokenizer.vocab_size, **self.model}
