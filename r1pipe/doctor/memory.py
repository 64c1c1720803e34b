"""Memory that a training stage needs on each device, from the model's config alone, in bytes.

Weights, gradients, optimizer and KV cache are counted; activations are estimated, within a third of
what autograd keeps of the models in tests/unit/doctor/test_memory.py. benchmarks/README.md has
peaks measured on CPU beside the estimates; on GPUs nothing has been measured.
"""

import contextlib
import os
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from r1pipe.config.base import Optimization, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.config.rl import OnPolicy
from r1pipe.doctor.model_config import find_config, find_stage_config
from r1pipe.doctor.traffic import estimate_traffic
from r1pipe.models.shape import GIB, MASTER, AdapterShape, Shape
from r1pipe.rl.loop import PROBE_PROMPTS, PROBE_TOKENS
from r1pipe.rollout.vllm_args import choose_speculation
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.progress import format_size

LAYER_COPIES = 3
"""Of a sharded layer in its backward pass, in the compute dtype: weights, gradient, and the next
layer's weights being gathered. The gradient is copied once more, in float32, to be summed."""
ENGINE_WORKSPACE = 1.5 * GIB
"""Within vLLM's share of a GPU: its activations and graphs. What an engine keeps asleep is less."""
CPU_PROCESS, GPU_PROCESS = 1.0 * GIB, 2.0 * GIB
"""Python with torch, transformers and vLLM; CUDA's context, NCCL's buffers, fragmentation."""
LOGIT_COPIES = 3
"""Of a chunk: logits, log-softmax, gradient."""
TEACHER_LOGIT_COPIES = 4
"""Of a chunk: the teacher's logits and log-softmax, the student's probabilities, the difference of
log-probs."""

ESTIMATED = (
    "activations",
    "logits",
    "process",
    "engines' processes",
    "probe",
    "vLLM asleep",
)
"""Parts that are estimated, not counted."""


@dataclass(frozen=True)
class Devices:
    """Equal devices. `size`: bytes of each."""

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
        """This run's: a GPU per process, or an equal part of the machine's memory."""
        count = distributed.world_size()
        if device != "cpu" and torch.cuda.is_available():
            return cls(count, torch.cuda.get_device_properties(0).total_memory)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(count, memory / distributed.local_world_size(), is_gpu=False)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device by purpose, and problems that more memory does not solve."""

    stage: str
    shape: Shape
    devices: Devices
    halves: dict[str, dict[str, float]]
    """Where the engine sleeps, or has GPUs of its own: "training" and "sampling", of which a device
    needs the larger."""
    problems: list[str]
    traffic: str = ""
    """What each device sends, in words."""

    @property
    def parts(self) -> dict[str, float]:
        return {name: size for half in self.halves.values() for name, size in half.items()}

    @property
    def total(self) -> float:
        return max(sum(half.values()) for half in self.halves.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.devices.size and not self.problems

    @property
    def is_hopeless(self) -> bool:
        """Does not fit even without the estimated parts."""
        counted = max(
            sum(size for name, size in half.items() if name not in ESTIMATED)
            for half in self.halves.values()
        )
        return counted > self.devices.size or bool(self.problems)

    def __str__(self) -> str:
        parameters = self.shape.parameters
        size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
        verdict = "; ".join(["fits" if self.fits else "DOES NOT FIT", *self.problems])
        return (
            f"{self.stage}: {size} parameters on {self.devices.count} x "
            f"{self.devices.size / GIB:.1f} GiB: about "
            f"{', '.join(map(describe_half, self.halves, self.halves.values()))}{self.traffic}: "
            f"{verdict}"
        )


def describe_half(name: str, parts: dict[str, float]) -> str:
    sizes = [f"{part} {format_size(size).removesuffix(' GiB')}" for part, size in parts.items()]
    when = f" in {name}" if name else ""
    return f"{format_size(sum(parts.values()))} each{when} ({', '.join(sizes)})"


def estimate_shape(stage: Stage, recipe: Recipe, shape: Shape, devices: Devices) -> Estimate:
    """For a stage that trains a model of this shape: trainer, reference, teacher and the engines of
    models that it samples from share every device; at different times if the engine sleeps."""
    element = 2 if recipe.dtype == "bfloat16" else 4
    is_on_policy = isinstance(stage, OnPolicy)
    context = shape.config.max_position_embeddings
    if is_on_policy:
        context = recipe.engine.max_model_len or context
    longest = min(context, stage.longest_sequence or context)
    count = devices.count if stage.optimization.sharding == "full" else 1
    sharers = replace(devices, count=count)
    parts = trainer_parts(shape, sharers, longest, element, stage.optimization)
    if is_on_policy and stage.keeps_reference:
        parts["reference"] = element * shape.parameters / count
    if is_on_policy and stage.taught_by:
        teachers = [Shape.of(find_config(name, recipe)) for name in stage.taught_by]
        parts["teacher"] = teacher_bytes(teachers, devices, element)
        parts["logits"] *= 1 + TEACHER_LOGIT_COPIES / LOGIT_COPIES
    engines: dict[str, float] = {}
    problems = []
    for name, _ in stage.samplings():
        is_own = name == stage.weights_from
        sampled = shape if is_own else Shape.of(find_config(name, recipe))
        sampler, problems = engine_parts(recipe, sampled, devices)
        engines |= sampler
    halves = {"": parts | engines}
    if devices.is_gpu and recipe.sleep_level(stage, "cuda"):
        resident = resident_parts(stage, shape, parts, sharers, element)
        parts["vLLM asleep"] = ENGINE_WORKSPACE
        halves = {"training": parts, "sampling": resident | engines}
    elif devices.is_gpu and recipe.sampler.kind == "fleet" and engines:
        halves = {"training": parts, "sampling": engines}
    traffic = describe_traffic(shape, devices, longest, element, stage.optimization)
    return Estimate(stage.name, shape, devices, halves, problems, traffic)


def describe_traffic(
    shape: Shape, devices: Devices, longest: int, element: int, settings: Optimization
) -> str:
    if devices.count == 1 or settings.adapter:
        return ""
    if settings.sharding == "none":
        sent = 2 * MASTER * shape.parameters * (devices.count - 1) / devices.count
        return f"; each sends {format_size(sent)} for an optimizer step"
    num_tokens = count_tokens(settings, devices, longest)
    sent = estimate_traffic(shape, devices.count, num_tokens, element, settings)
    return f"; each sends {format_size(sent)} for a micro-batch of {num_tokens} tokens"


def count_tokens(settings: Optimization, devices: Devices, longest: int) -> int:
    """Of the largest micro-batch on each device."""
    num_tokens = max(settings.tokens_per_micro_batch(on_gpu=devices.is_gpu), longest)
    return -(-num_tokens // settings.sequence_parallel)


def resident_parts(
    stage: Stage, shape: Shape, parts: dict[str, float], devices: Devices, element: int
) -> dict[str, float]:
    """What stays of a trainer's parts while its engine samples, and the probe of a sync."""
    if not isinstance(stage, OnPolicy):  # it samples before it loads what it trains
        return {"process": parts["process"]}
    settings = stage.optimization
    offloads_base = bool(settings.adapter and settings.adapter.offload_base) and devices.count == 1
    stays = {"process", "weights", "reference", "teacher"}
    stays |= set() if offloads_base else {"base"}
    stays |= set() if settings.offload_optimizer else {"optimizer"}
    # A forward pass of a few tokens: two layers gathered, or one lent, and what is outside.
    layer = shape.gathered_layer(settings.expert_parallel)
    whole = (1 if offloads_base else 2) * layer + shape.outside_layers
    num_logits = PROBE_PROMPTS * PROBE_TOKENS * shape.config.vocab_size
    logits = min(parts["logits"], 4 * LOGIT_COPIES * num_logits)
    resident = {name: size for name, size in parts.items() if name in stays}
    return resident | {"probe": element * whole + logits}


def teacher_bytes(shapes: list[Shape], devices: Devices, element: int) -> float:
    """Frozen weights of all teachers; sharded: with the whole head and one gathered layer of the
    one whose turn it is."""
    share = sum(shape.parameters for shape in shapes) / devices.count
    if devices.count == 1:
        return element * share
    whole = (
        shape.largest_layer
        + shape.outside_layers
        + shape.config.vocab_size * shape.config.hidden_size
        for shape in shapes
    )
    return element * (share + max(whole))


def engine_parts(
    recipe: Recipe, shape: Shape, devices: Devices
) -> tuple[dict[str, float], list[str]]:
    """vLLM's share of each device, and why it would not start."""
    element = 2 if recipe.dtype == "bfloat16" else 4
    engine, size = recipe.engine, recipe.engine.tensor_parallel_size
    context = engine.max_model_len or shape.config.max_position_embeddings
    num_weights = shape.main.parameters
    kv_bytes = shape.kv_bytes_per_token(element, size)
    speculative = choose_speculation(engine, shape.config)
    if speculative and speculative.model:
        drafter = Shape.of(find_config(speculative.model, recipe))
        num_weights += drafter.parameters
        kv_bytes += drafter.kv_bytes_per_token(element, size)
    elif speculative:
        num_weights = shape.parameters
        kv_bytes *= 1 + 1 / shape.num_layers
    weights = element * num_weights / size
    if devices.is_gpu:
        weights += ENGINE_WORKSPACE
    one_sequence = context * kv_bytes
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
    count = 1 if devices.is_gpu else max(1, recipe.sampler.engines // devices.count)
    parts = {"vLLM": count * weights, "KV cache": count * max(0.0, room)}
    if recipe.sampler.kind == "fleet" and not devices.is_gpu:
        parts["engines' processes"] = count * CPU_PROCESS
    return parts, problems


def trainer_parts(
    shape: Shape, devices: Devices, longest: int, element: int, settings: Optimization
) -> dict[str, float]:
    """`longest`: tokens of the longest sequence, a micro-batch of its own if need be."""
    from r1pipe.trainer.head import MAX_LOGITS

    num_tokens = count_tokens(settings, devices, longest)
    sharded, checkpointing = devices.count > 1, settings.gradient_checkpointing
    adapter = settings.adapter and AdapterShape.of(shape.config, settings.adapter)
    trained = adapter.parameters if adapter else shape.parameters
    share = MASTER * trained / devices.count
    parts = {"weights": share, "gradients": share, "optimizer": 2 * share}
    if settings.offload_optimizer and devices.is_gpu:
        largest = min(shape.largest, trained)
        parts["optimizer"] = 2 * MASTER * largest / devices.count
    if adapter:
        parts = {"base": element * shape.parameters / devices.count, **parts}
    if sharded:
        # Parameters outside the layers stay gathered during all layers, and so do the gradients of
        # those that are trained.
        copies = 2 * element if adapter else LAYER_COPIES * element + MASTER
        outside = element if adapter else 2 * element
        layer = shape.gathered_layer(settings.expert_parallel)
        parts["whole layers"] = copies * layer + outside * shape.outside_layers
    predicting = settings.mtp is not None
    parts["activations"] = shape.activations(
        num_tokens, element, checkpointing, predicting=predicting
    )
    if settings.expert_parallel > 1:
        # Rows sent, received and returned, where experts are chosen evenly.
        rows = num_tokens * shape.num_chosen() * (1 if checkpointing else shape.num_moe_layers)
        parts["activations"] += element * 3 * rows * shape.config.hidden_size
    if adapter:
        # Merged experts, which autograd keeps, and their gradient in the layer that is computed.
        kept = adapter.merged_layer if checkpointing else adapter.merged
        parts["activations"] += element * (kept + adapter.merged_layer)
    elif element == 2 and not sharded:
        # Autograd keeps a bf16 copy of each matrix for the backward pass.
        copied = shape.largest_layer if checkpointing else shape.parameters
        parts["activations"] += element * copied
    if settings.trains_in_fp8:
        # And a rounded one, which is whole in several processes, too.
        parts["activations"] += element * (
            shape.largest_layer if checkpointing else shape.parameters
        )
    max_logits = MAX_LOGITS["cuda" if devices.is_gpu else "cpu"]
    parts["logits"] = 4 * LOGIT_COPIES * min(max_logits, num_tokens * shape.config.vocab_size)
    if predicting and not devices.is_gpu:
        parts["logits"] *= 2  # on a GPU they are computed again in the backward pass
    parts["process"] = GPU_PROCESS if devices.is_gpu else CPU_PROCESS
    return parts


def estimate_stage(stage: Stage, recipe: Recipe, devices: Devices) -> str | None:
    """One line about a training stage; None for others. Never raises for a model that cannot be
    read: the hub may be out of reach."""
    estimate = make_estimate(stage, recipe, devices)
    return (
        describe_estimate(estimate, stage, recipe) if isinstance(estimate, Estimate) else estimate
    )


def make_estimate(stage: Stage, recipe: Recipe, devices: Devices) -> Estimate | str | None:
    """For a training stage, or why there is none; None for other stages."""
    if stage.optimization is None:
        return None
    try:
        return estimate_shape(stage, recipe, Shape.of(find_stage_config(stage, recipe)), devices)
    except (OSError, ValueError, UserError) as error:
        return f"{stage.name}: no memory estimate: {error}"
    except Exception as error:  # the formulas only know configs of decoders
        return f"{stage.name}: no memory estimate: {first_line(error, with_type=True)}"


def describe_estimate(estimate: Estimate, stage: Stage, recipe: Recipe) -> str:
    """The estimate, and if it does not fit, how many such devices it takes."""
    if estimate.fits:
        return str(estimate)
    for factor in (2, 4, 8, 16, 32):
        more = replace(estimate.devices, count=estimate.devices.count * factor)
        with contextlib.suppress(UserError):
            if estimate_shape(stage, recipe, estimate.shape, more).fits:
                return f"{estimate}; {more.count} such devices would do"
    return str(estimate)


class Files(NamedTuple):
    """Bytes on disk of a stage's result, and of its checkpoints while it runs."""

    kept: float
    meanwhile: float


def estimate_files(stage: Stage, recipe: Recipe) -> Files:
    """Raises what `find_stage_config` does."""
    if not stage.makes_checkpoint:
        return Files(0, 0)
    config = find_stage_config(stage, recipe)
    model = trained = MASTER * Shape.of(config).parameters
    settings = stage.optimization
    if settings is None:
        return Files(model, 0)
    if settings.adapter:
        trained = MASTER * AdapterShape.of(config, settings.adapter).parameters
        model = model * (2 if recipe.dtype == "bfloat16" else 4) / MASTER + trained
    is_on_policy = isinstance(stage, OnPolicy)
    # Weights, two moments, reference; the newest checkpoints, the best, and one being written.
    state = trained * (4 if is_on_policy and stage.keeps_reference else 3)
    count = settings.save_total_limit + is_on_policy + 1
    return Files(model, state * (count if settings.save_steps else 1))
