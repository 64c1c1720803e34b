"""The recipe: a name, a few settings for all stages, and an ordered list of stages.

Each stage says what it starts `from`: an earlier stage, a folder, or a hub id. Option names are
TRL's and vLLM's own where those have one. Imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

# isort: off
# The kinds of stages, which register themselves, in the order of `r1pipe --help`.
from r1pipe.config import sft, rl, traces, evals  # noqa: F401
from r1pipe.config.base import MAX_NAME, STAGE_TYPES, ProblemSet, Share, Stage

# isort: on
from r1pipe.config.strict import Strict, refuse_idle


class Speculative(Strict):
    """Tokens are drafted by a small model, and the policy checks several in one forward pass
    (Leviathan et al. 2022, arXiv:2211.17192). Drafts are the drafter's likeliest tokens; on CPU
    the samples are the same as without."""

    method: Literal["mtp", "draft_model"]
    """mtp: the policy's own module for multi-token prediction (DeepSeek-V3, arXiv:2412.19437,
    section 2.2), which is synced with it; models without one are sampled without drafts.
    draft_model: a checkpoint with the policy's vocabulary, which stays as it is."""
    model: str | None = None
    """The draft_model: a folder or a hub id."""
    num_speculative_tokens: PositiveInt
    trial: bool = True
    """On CPU: sample with drafts and without, three calls each in turn and again every 50 calls,
    and leave out what is slower. The choice follows the machine's load, and the last bits of
    log-probs follow the choice; with false a run repeats bit by bit."""

    @model_validator(mode="after")
    def name_a_draft_model(self) -> "Speculative":
        if self.method == "draft_model" and self.model is None:
            raise ValueError("model is missing: the folder or hub id of the draft_model")
        refuse_idle(self, {"model": self.method == "mtp" and "with mtp"})
        return self


class Engine(Strict):
    """vLLM's settings; one engine serves all stages of a process that share an architecture."""

    max_model_len: PositiveInt | None = None
    """Prompt plus completion, tokens. Default: the model's own context."""
    max_num_seqs: PositiveInt = 256
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    kv_cache_gib: PositiveFloat | None = None
    """A fixed size of the KV cache instead of gpu_memory_utilization."""
    tensor_parallel_size: PositiveInt = 1
    sleep: Literal[0, 1, 2] | None = None
    """vLLM's sleep mode while a model learns from its samples: 1 keeps the sampler's weights in the
    CPU's memory meanwhile, 2 keeps none, 0 does not sleep. Default: 1 on CUDA with max_staleness
    0; otherwise 0. On CPU sleeping frees nothing."""
    enforce_eager: bool = False
    """No compilation: always so on CPU, where compiling takes longer than a small run."""
    quantization: Literal["fp8_per_block"] | None = Field(
        default=None, exclude_if=lambda given: given is None
    )
    """What vLLM makes of the weights that it is given: FP8 by blocks of 128 x 128, and its products
    in FP8. Needs a GPU and bfloat16. Emulated on any device: a training stage's `fp8`."""
    speculative: Speculative | None = Field(default=None, exclude_if=lambda given: given is None)
    """Default: every token by a forward pass of its own."""

    @model_validator(mode="after")
    def keep_the_drafter(self) -> "Engine":
        if self.speculative and self.speculative.model and self.sleep == 2:
            raise ValueError(
                "sleep 2 keeps no weights of speculative.model, which are never sent again: take "
                "sleep 1"
            )
        return self


class SamplerPlace(Strict):
    """Where vLLM's engines run."""

    kind: Literal["colocated", "fleet"] = "colocated"
    """colocated: one engine in the trainer's process. fleet: `engines` in processes of their own,
    for all stages that sample. Samples are the same: each token is drawn from its request's seed
    and its position."""
    engines: PositiveInt = 1
    """On CPU each computes with one core: to one engine a second core gives a tenth. On GPUs each
    has one, beside those of the trainer's processes, which are the machine's first. Several
    processes of a trainer share the engines out evenly, as they do `reward_workers`."""
    ray: str | None = None
    """Ray places the engines: auto joins the cluster at RAY_ADDRESS, or else starts one on this
    machine for the run; or a cluster's address. All machines then need r1pipe and the run's folder
    at the same path. Default: processes of this machine."""
    reward_workers: NonNegativeInt = 0
    """Ray actors that score the samples of stages which train on them, each in processes of its own
    as the trainer does by default, on any machine."""

    @model_validator(mode="after")
    def use_every_key(self) -> "SamplerPlace":
        alone = self.kind == "colocated" and "without kind: fleet"
        without_ray = self.ray is None and "without ray"
        refuse_idle(self, {"engines": alone, "ray": alone, "reward_workers": without_ray})
        return self


class DoctorLimits(Strict):
    """Limits of `r1pipe doctor` and of the checks before a stage."""

    min_gold_share: Share = 1.0
    """Share of a dataset's own golds that its rewards must score 1, or the stage is refused."""
    gold_rows: PositiveInt = 500
    """Golds of each dataset that are tried before a stage; `r1pipe doctor` tries all."""
    free_disk_gib: NonNegativeFloat = 1.0
    """Disk space that must be left after the checkpoints are written."""


class KeptRollouts(Strict):
    """Rollouts that stay on disk, of stages that train on their own samples; `--replay` trains on
    them again."""

    keep_gib: PositiveFloat = 10.0
    """Per stage, compressed; beyond it the oldest steps are deleted."""
    routes: bool = True
    """Keep the routes of routing_replay as well, which a replay needs: layers x experts per token
    bytes for each token, in a large model more than everything else."""


class OfItsKind:
    """Validates a stage by the class that has its `kind`."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        kinds = {kind: handler.generate_schema(stage) for kind, stage in STAGE_TYPES.items()}
        return core_schema.tagged_union_schema(kinds, discriminator="kind")


class Recipe(Strict):
    _kinds: ClassVar[set[str]] = set(STAGE_TYPES)

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    runs_dir: str = "runs"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights in the sampler and in the trainer's forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attn_implementation: Literal[
        "auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "eager"
    ] = "auto"
    """The trainer's attention. auto: varlen, which are flash-attention's kernels in torch, on a GPU
    in bfloat16, else sdpa."""
    chat_template: str | None = None
    """Jinja, or a file of it, for models whose tokenizer has no template, such as base models.
    Checkpoints trained from them inherit it."""
    licenses: dict[str, str] = {}
    """Hub identifiers of licenses, for base models and data recipes that do not state theirs;
    `publish` needs them."""
    ngram: PositiveInt = 13
    """Consecutive words that a training and an evaluation problem share to count as overlap."""
    phase_timeout_s: PositiveFloat | None = 1800.0
    """Seconds without a step of vLLM, a group judged, a micro-batch, a collective, after which the
    run counts as hung and ends. Starting vLLM is one such piece. null: never."""
    engine: Engine = Engine()
    sampler: SamplerPlace = SamplerPlace()
    doctor: DoctorLimits = DoctorLimits()
    rollouts: KeptRollouts = KeptRollouts()
    price_per_device_hour: NonNegativeFloat | None = None
    """Per GPU, or per CPU core where there is none; used by `r1pipe cost`."""
    currency: str = "USD"
    tracking: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Where metrics go beside metrics.jsonl; each needs its package."""
    tracking_project: str = "r1pipe"
    stages: Annotated[list[Annotated[Stage, OfItsKind()]], Field(min_length=1)]

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
        """Replace a file name by the file's text, so that the stage's record has it."""
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
            if isinstance(stage, rl.OnPolicy) and stage.max_staleness and size > 1:
                raise ValueError(
                    f"stages.{stage.name}.max_staleness: sampling beside the training needs "
                    f"engine.tensor_parallel_size 1, not {size}: collectives of two threads would "
                    "meet in another order on every rank"
                )
            adapter = stage.optimization and stage.optimization.adapter
            if self.engine.speculative and adapter and adapter.sync == "alone":
                raise ValueError(
                    f"stages.{stage.name}.adapter.sync: alone does not go with engine.speculative: "
                    "take merged"
                )
            if isinstance(stage, rl.OnPolicy) and stage.max_staleness and self.engine.sleep:
                raise ValueError(
                    f"stages.{stage.name}.max_staleness: sampling beside the training needs the "
                    f"engine awake: leave out engine.sleep {self.engine.sleep}, or max_staleness"
                )
            if self.sampler.kind == "fleet":
                self._refuse_outside_a_fleet(stage)
            elif isinstance(stage, rl.OnPolicy) and stage.in_flight:
                raise ValueError(f"stages.{stage.name}.in_flight: needs sampler.kind fleet")
            earlier.add(stage.name)
        return self

    def _refuse_outside_a_fleet(self, stage: Stage) -> None:
        adapter = stage.optimization and stage.optimization.adapter
        if adapter and adapter.sync == "alone":
            raise ValueError(
                f"stages.{stage.name}.adapter.sync: alone does not go with sampler.kind fleet: "
                "take merged"
            )
        asks_judges = any(reward.is_judge for reward in stage.rewards_used())
        if self.sampler.reward_workers and isinstance(stage, rl.OnPolicy) and asks_judges:
            raise ValueError(
                f"stages.{stage.name}.rewards: rewards.judge asks a server, and books in one file "
                "what that costs: leave out sampler.reward_workers"
            )
        if self.engine.tensor_parallel_size > 1 or self.engine.sleep:
            raise ValueError(
                "engine: tensor_parallel_size above 1 and sleep do not go with sampler.kind fleet"
            )

    def sleep_level(self, stage: Stage, device_type: str) -> int:
        """vLLM's sleep level while the stage trains; 0: its engine stays awake."""
        samples_for_itself = stage.samplings() and stage.optimization is not None
        if not samples_for_itself or (isinstance(stage, rl.OnPolicy) and stage.max_staleness):
            return 0
        if self.sampler.kind == "fleet":
            return 0
        default = 1 if device_type == "cuda" else 0
        return default if self.engine.sleep is None else self.engine.sleep

    @property
    def batches_ahead(self) -> int:
        """The most that a stage samples beside its training."""
        return max((s.max_staleness for s in self.stages if isinstance(s, rl.OnPolicy)), default=0)

    @property
    def engines_beside(self) -> int:
        """Those that sample in processes of their own while a stage trains."""
        return self.sampler.engines if self.sampler.kind == "fleet" and self.batches_ahead else 0

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    def stage(self, name: str) -> Stage | None:
        return next((s for s in self.stages if s.name == name), None)

    def heldout_sets(self) -> list[ProblemSet]:
        """Problem sets that no stage may train on."""
        return [s for stage in self.stages if stage.measures for s in stage.problem_sets()]

    @classmethod
    def learn_kinds(cls) -> None:
        """Accept kinds of stages that were defined after this class."""
        if set(STAGE_TYPES) != cls._kinds:
            cls._kinds = set(STAGE_TYPES)
            cls.model_rebuild(force=True)
