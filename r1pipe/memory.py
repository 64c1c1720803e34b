"""How much memory a training stage needs on each device, from the model's config alone.

Weights, gradients, optimizer and KV cache are counted; activations are estimated from the
architecture: within a third of what autograd keeps of the models in tests/unit/test_memory.py.
Peaks measured on CPU, in one process and in several, stand beside the estimate in
benchmarks/README.md; on GPUs nothing has been measured. Everything is in bytes.
"""

import contextlib
import os
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from r1pipe import distributed
from r1pipe.config import (
    Distill,
    Grpo,
    Init,
    OnPolicy,
    OnPolicyDistill,
    Optimization,
    Recipe,
    Sft,
    Stage,
    Supervised,
)
from r1pipe.errors import UserError
from r1pipe.models import find_layers, first_line
from r1pipe.progress import format_size

GIB = 2**30
MASTER = 4
"""Bytes of a parameter, of its gradient, and of each of AdamW's two moments: float32."""
LAYER_COPIES = 3
"""Of a sharded layer in its backward pass, in the dtype that it computes in: itself, its gradient,
the next layer on its way. Its gradient is then copied once more, in float32, to be summed."""
ENGINE_WORKSPACE = 1.5 * GIB
"""Of what vLLM may claim of a GPU: its own activations, its graphs."""
CPU_PROCESS, GPU_PROCESS = 1.0 * GIB, 2.0 * GIB
"""Python with torch, transformers and vLLM; CUDA's context, NCCL's buffers, fragmentation."""
LOGIT_COPIES = 3
"""Of a chunk of logits: themselves, their log-softmax, the gradient."""
TEACHER_LOGIT_COPIES = 4
"""Of the teacher's chunk and the divergence: its logits, their log-softmax, the student's
probabilities, the difference that these weigh."""
NORM_BYTES = {4: 12, 2: 8}
"""Of each entry that goes through a norm in transformers, by the size of the residual stream's: its
input in float32, that squared, and scaled, the last in the stream's dtype."""

ESTIMATED = ("activations", "logits", "process")
"""Parts that are not counted."""


@dataclass(frozen=True)
class Devices:
    """So many devices, of so many bytes each."""

    count: int
    size: float
    is_gpu: bool = True

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """From "8x80GB". A card's GB are GiB: an 80 GB one has 79.6."""
        found = re.fullmatch(r"(\d+) *x *(\d+(?:\.\d+)?) *G(?:i?B)?", text.strip(), re.IGNORECASE)
        if not found or not int(found[1]):
            raise UserError(f'--devices "{text}": write it like 8x80GB')
        return cls(int(found[1]), float(found[2]) * GIB)

    @classmethod
    def here(cls, device: str) -> "Devices":
        """Those of this run: one for each process, GPUs or equal parts of the machine's memory."""
        count = distributed.world_size()
        if device != "cpu" and torch.cuda.is_available():
            return cls(count, torch.cuda.get_device_properties(0).total_memory)
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(count, memory / local_count, is_gpu=False)


@dataclass(frozen=True)
class Shape:
    """Numbers of parameters, and what the formulas need of the architecture."""

    parameters: int
    largest: int
    """Of one tensor."""
    largest_layer: int
    outside_layers: int
    """Of embedding, last norm and head."""
    config: PretrainedConfig

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config)
        layers = [
            sum(parameter.numel() for parameter in layer.parameters())
            for layer in find_layers(model)
        ]
        sizes = [parameter.numel() for parameter in model.parameters()]
        outside = sum(sizes) - sum(layers)
        return cls(sum(sizes), max(sizes), max(layers), outside, config.get_text_config())

    def get(self, *names: str, default: Any = 0) -> Any:
        """The first of the config's keys that is set."""
        values = (getattr(self.config, name, None) for name in names)
        return next((value for value in values if value is not None), default)

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def head_sizes(self) -> tuple[int, int, int]:
        """Of a token's queries, keys and values, all heads together."""
        heads = self.config.num_attention_heads
        if self.get("kv_lora_rank"):  # MLA: every head has its own keys and values
            key = self.get("qk_nope_head_dim") + self.get("qk_rope_head_dim")
            return heads * key, heads * key, heads * self.get("v_head_dim")
        size = self.get("head_dim") or self.config.hidden_size // heads
        groups = self.get("num_key_value_heads", default=heads)
        return heads * size, groups * size, groups * size

    def kv_bytes_per_token(self, element: int, tensor_parallel_size: int) -> float:
        """On each of the engine's devices, which share the heads, but no head."""
        _, keys, values = self.head_sizes()
        parts = min(tensor_parallel_size, self.groups())
        if self.get("kv_lora_rank"):  # MLA keeps what keys and values are made of, for all heads
            keys, values, parts = self.config.kv_lora_rank, self.get("qk_rope_head_dim"), 1
        return self.num_layers * (keys + values) * element / parts

    def layer_activations(self, element: int, stream: int, is_moe: bool) -> float:
        """What autograd keeps of one layer's forward, bytes per token; matrix products have inputs
        of `element` bytes, the residual stream is of `stream` bytes, norms compute in float32."""
        hidden = self.config.hidden_size
        queries, keys, values = self.head_sizes()
        normed = 2 * hidden
        attention = 2 * hidden + 2 * (queries + keys) + values + self.config.num_attention_heads
        if self.get("kv_lora_rank"):
            normed += self.config.kv_lora_rank + (self.get("q_lora_rank") or 0)
        elif "qwen3" in self.config.model_type:
            normed += queries + keys
        attention += self.config.num_attention_heads * (values // max(1, self.groups()))
        if not is_moe:
            dense = 4 * self.get("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
            return NORM_BYTES[stream] * normed + element * (attention + dense)
        width = self.get("moe_intermediate_size", "intermediate_size")
        chosen = self.get("num_experts_per_tok", "top_k", default=1)
        shared = self.get("n_shared_experts") * width + self.get("shared_expert_intermediate_size")
        experts = chosen * (2 * hidden + 5 * width) + 4 * shared + self.num_experts()
        return NORM_BYTES[stream] * normed + element * (attention + experts)

    def groups(self) -> int:
        heads = self.config.num_attention_heads
        return heads if self.get("kv_lora_rank") else self.get("num_key_value_heads", default=heads)

    def num_experts(self) -> int:
        return self.get("n_routed_experts", "num_local_experts", "num_experts")

    def activations(
        self, num_tokens: int, element: int, checkpointing: bool, stream: int = MASTER
    ) -> float:
        """What autograd keeps of a forward pass; `stream`: bytes of the residual stream's dtype."""
        num_dense = self.get("first_k_dense_replace") if self.num_experts() else self.num_layers
        dense = self.layer_activations(element, stream, is_moe=False)
        moe = self.layer_activations(element, stream, is_moe=True) if self.num_experts() else 0
        if checkpointing:
            # Each layer's input, and all of the one layer that is computed again.
            inputs = stream * self.config.hidden_size * self.num_layers
            return num_tokens * (inputs + max(dense, moe))
        return num_tokens * (num_dense * dense + (self.num_layers - num_dense) * moe)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, by what they are for; and what cannot work whatever the total is."""

    stage: str
    shape: Shape
    devices: Devices
    parts: dict[str, float]
    problems: list[str]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.devices.size and not self.problems

    @property
    def is_hopeless(self) -> bool:
        """Whether it does not fit even without what is only estimated."""
        counted = sum(size for name, size in self.parts.items() if name not in ESTIMATED)
        return counted > self.devices.size or bool(self.problems)

    def __str__(self) -> str:
        sizes = {name: format_size(size) for name, size in self.parts.items()}
        parts = ", ".join(f"{name} {size.removesuffix(' GiB')}" for name, size in sizes.items())
        parameters = self.shape.parameters
        size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
        verdict = "; ".join(["fits" if self.fits else "DOES NOT FIT", *self.problems])
        return (
            f"{self.stage}: {size} parameters on {self.devices.count} x "
            f"{self.devices.size / GIB:.1f} GiB: about {format_size(self.total)} each ({parts}): "
            f"{verdict}"
        )


def estimate_on_policy(stage: OnPolicy, recipe: Recipe, shape: Shape, devices: Devices) -> Estimate:
    """The trainer and the sampler share every device."""
    element = 2 if recipe.dtype == "bfloat16" else 4
    context = recipe.engine.max_model_len or shape.config.max_position_embeddings
    longest = min(context, stage.max_completion_length + 1)
    share = shape.parameters / devices.count
    parts = trainer_parts(shape, devices, longest, element, stage)
    if isinstance(stage, Grpo) and stage.beta:
        parts["reference"] = element * share
    if isinstance(stage, OnPolicyDistill):
        teacher = Shape.of(find_config(stage.from_, recipe))
        parts["teacher"] = teacher_bytes(teacher, devices, element)
        parts["logits"] *= 1 + TEACHER_LOGIT_COPIES / LOGIT_COPIES
    sampler, problems = engine_parts(recipe, shape, devices)
    return Estimate(stage.name, shape, devices, parts | sampler, problems)


def teacher_bytes(shape: Shape, devices: Devices, element: int) -> float:
    """Weights that are not trained; sharded, with a layer on its way and the whole head."""
    if devices.count == 1:
        return element * shape.parameters
    head = shape.config.vocab_size * shape.config.hidden_size
    share = shape.parameters / devices.count
    return element * (share + shape.largest_layer + shape.outside_layers + head)


def engine_parts(
    recipe: Recipe, shape: Shape, devices: Devices
) -> tuple[dict[str, float], list[str]]:
    """What vLLM takes of each device, and what it cannot work with."""
    element = 2 if recipe.dtype == "bfloat16" else 4
    engine = recipe.engine
    context = engine.max_model_len or shape.config.max_position_embeddings
    weights = element * shape.parameters / engine.tensor_parallel_size
    if devices.is_gpu:
        weights += ENGINE_WORKSPACE
    one_sequence = context * shape.kv_bytes_per_token(element, engine.tensor_parallel_size)
    if engine.kv_cache_gib is not None:
        room = engine.kv_cache_gib * GIB
    else:
        room = engine.gpu_memory_utilization * devices.size - (weights if devices.is_gpu else 0)
    problems = []
    if room < one_sequence:
        problems.append(
            f"vLLM has {format_size(max(0.0, room))} for its KV cache and needs "
            f"{format_size(one_sequence)} for one sequence of {context} tokens: raise "
            "engine.tensor_parallel_size or gpu_memory_utilization"
        )
    return {"vLLM": weights, "KV cache": max(0.0, room)}, problems


def estimate_supervised(
    name: str, train: Supervised, recipe: Recipe, shape: Shape, devices: Devices
) -> Estimate:
    element = 2 if recipe.dtype == "bfloat16" else 4
    longest = train.max_length or shape.config.max_position_embeddings
    return Estimate(
        name, shape, devices, trainer_parts(shape, devices, longest, element, train), []
    )


def trainer_parts(
    shape: Shape, devices: Devices, longest: int, element: int, settings: Optimization
) -> dict[str, float]:
    """`longest`: tokens of the longest sequence, which may be a micro-batch of its own."""
    from r1pipe.grpo.logprobs import max_logits

    num_tokens = max(settings.tokens_per_micro_batch(on_gpu=devices.is_gpu), longest)
    sharded, checkpointing = devices.count > 1, settings.gradient_checkpointing
    share = MASTER * shape.parameters / devices.count
    parts = {"weights": share, "gradients": share, "optimizer": 2 * share}
    if settings.offload_optimizer and devices.is_gpu:
        parts["optimizer"] = 2 * MASTER * shape.largest / devices.count
    if sharded:
        # What lies outside the layers is whole from the first to the last layer's pass, and so is
        # its gradient from where it begins.
        layer = (LAYER_COPIES * element + MASTER) * shape.largest_layer
        parts["whole layers"] = layer + 2 * element * shape.outside_layers
    parts["activations"] = shape.activations(num_tokens, element, checkpointing, element)
    if element == 2 and not sharded:
        # There is a bf16 copy of each matrix for the backward pass.
        copied = shape.largest_layer if checkpointing else shape.parameters
        parts["activations"] += element * copied
    parts["logits"] = (
        4
        * LOGIT_COPIES
        * min(max_logits(on_gpu=devices.is_gpu), num_tokens * shape.config.vocab_size)
    )
    parts["process"] = GPU_PROCESS if devices.is_gpu else CPU_PROCESS
    return parts


def estimate_stage(stage: Stage, recipe: Recipe, devices: Devices) -> str | None:
    """One line about a training stage; None for others. Never raises for a model that cannot be
    read: a hub may be out of reach now."""
    estimate = make_estimate(stage, recipe, devices)
    return (
        describe_estimate(estimate, stage, recipe) if isinstance(estimate, Estimate) else estimate
    )


def make_estimate(stage: Stage, recipe: Recipe, devices: Devices) -> Estimate | str | None:
    """Of a training stage, or why there is none; None for other stages."""
    if not isinstance(stage, Sft | OnPolicy | Distill):
        return None
    try:
        return estimate_shape(stage, recipe, Shape.of(find_stage_config(stage, recipe)), devices)
    except (OSError, ValueError, UserError) as error:
        return f"{stage.name}: no memory estimate: {error}"
    except Exception as error:  # the formulas know no config but those of decoders
        return f"{stage.name}: no memory estimate: {type(error).__name__}: {first_line(error)}"


def describe_estimate(estimate: Estimate, stage: Stage, recipe: Recipe) -> str:
    """The estimate, and how many devices of that size would do if these do not."""
    if estimate.fits:
        return str(estimate)
    for factor in (2, 4, 8, 16, 32):
        more = replace(estimate.devices, count=estimate.devices.count * factor)
        with contextlib.suppress(UserError):
            if estimate_shape(stage, recipe, estimate.shape, more).fits:
                return f"{estimate}; {more.count} such devices would do"
    return str(estimate)


class Files(NamedTuple):
    """Bytes on the disk: of a stage's checkpoint, and of what it saves while it runs."""

    kept: float
    meanwhile: float


def estimate_files(stage: Stage, recipe: Recipe) -> Files:
    """Raises what `find_stage_config` does."""
    if not stage.makes_checkpoint:
        return Files(0, 0)
    model = MASTER * Shape.of(find_stage_config(stage, recipe)).parameters
    if isinstance(stage, Init):
        return Files(model, 0)
    settings = stage if isinstance(stage, OnPolicy) else stage.train
    # The optimizer's moments, and the reference; the newest ones, the best, and one being written.
    state = model * (4 if isinstance(stage, Grpo) and stage.beta else 3)
    count = settings.save_total_limit + isinstance(stage, OnPolicy) + 1
    return Files(model, state * (count if settings.save_steps else 1))


def estimate_shape(
    stage: Sft | OnPolicy | Distill, recipe: Recipe, shape: Shape, devices: Devices
) -> Estimate:
    if isinstance(stage, OnPolicy):
        return estimate_on_policy(stage, recipe, shape, devices)
    estimate = estimate_supervised(stage.name, stage.train, recipe, shape, devices)
    if isinstance(stage, Distill):
        # The teacher's engine stays beside the student.
        teacher = Shape.of(find_config(stage.from_, recipe))
        sampler, problems = engine_parts(recipe, teacher, devices)
        estimate = replace(estimate, parts=estimate.parts | sampler, problems=problems)
    return estimate


def find_stage_config(stage: Stage, recipe: Recipe) -> PretrainedConfig:
    """Of the model that the stage makes."""
    if isinstance(stage, Init):
        return make_config({"vocab_size": stage.tokenizer.vocab_size, **stage.model})
    if isinstance(stage, Distill) and not isinstance(stage.student, str):
        teacher = find_config(stage.from_, recipe)
        return make_config({"vocab_size": teacher.get_text_config().vocab_size, **stage.student})
    return find_config(getattr(stage, "student", stage.from_), recipe)


def find_config(source: str, recipe: Recipe) -> PretrainedConfig:
    """Of a stage's name, a folder or a hub id. Raises ValueError if it cannot be read."""
    stage = recipe.stage(source)
    if stage is not None:
        return find_stage_config(stage, recipe)
    folder = Path(source).expanduser()
    try:
        # A folder, or what the hub's cache has; only then the hub, which retries for a minute.
        here = folder.is_dir() or not reaches_hub()
        where = folder if folder.is_dir() else source
        return AutoConfig.from_pretrained(where, local_files_only=here)
    except Exception as error:  # a config may hold anything
        raise ValueError(
            f'no config of "{source}" to be had (a folder with its config.json is enough)'
        ) from error


def make_config(settings: dict[str, Any]) -> PretrainedConfig:
    """Raises ValueError for what makes none."""
    settings = dict(settings)
    try:
        return AutoConfig.for_model(settings.pop("model_type", ""), **settings)
    except Exception as error:  # each checks its values in its own way
        raise ValueError(str(error)) from error


def reaches_hub() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=3).close()
    except OSError:
        return False
    return True
