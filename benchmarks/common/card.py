"""What the checks of gpu_check.py share: the device, sizes, folders, and one engine at a time."""

import contextlib
import dataclasses
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common.checks import free_memory
from common.workload import Workload, load_updater

from r1pipe.config.recipe import Engine
from r1pipe.models.model import pick_device
from r1pipe.pipeline import silence_libraries
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rollout.engines import Engines

PARITY = {"float32": 1e-4, "bfloat16": 0.02}
"""Goals for mean |log-prob of the sampler - of the trainer|."""
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B's shape."""
MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
"""3.8B parameters, of which a token meets 1.0B."""
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
}


@dataclass
class Sizes:
    demo_sft_steps: int = 20
    demo_prompts: int = 64
    demo_generations: int = 8
    replay_models: tuple[str, ...] = ("DeepSeek-V3", "Qwen3-MoE")
    sleep_rounds: int = 10
    """At each of two levels."""
    dense: dict[str, Any] = field(default_factory=lambda: DENSE)
    row_tokens: int = 16_384
    """Of a micro-batch."""
    rows: int = 4
    """Micro-batches in an update."""
    prompts: int = 32
    generations: int = 8
    mean_length: int = 200
    max_completion_length: int = 512
    steps: int = 3
    """GRPO steps, the first not counted."""
    kv_cache_gib: float = 16.0
    trl_batch: int = 16
    mixture: dict[str, Any] = field(default_factory=lambda: MIXTURE)
    mixture_row_tokens: int = 8_192
    ahead_steps: int = 4
    matmul: int = 8192


QUICK = Sizes(
    demo_sft_steps=2,
    demo_prompts=4,
    demo_generations=2,
    replay_models=("Qwen3-MoE",),
    dense={**DENSE, **TINY, "intermediate_size": 128},
    row_tokens=128,
    rows=2,
    prompts=2,
    generations=2,
    mean_length=8,
    max_completion_length=16,
    steps=2,
    sleep_rounds=2,
    kv_cache_gib=0.25,
    trl_batch=4,
    mixture={**MIXTURE, **TINY, "num_experts": 4, "num_experts_per_tok": 2},
    mixture_row_tokens=64,
    ahead_steps=2,
    matmul=256,
)


class Card:
    """One device. `folder` is temporary, and gone after `close`."""

    def __init__(self, *, on_cpu: bool, quick: bool):
        silence_libraries()
        self.device = pick_device("cpu" if on_cpu else "cuda")
        self.sizes = QUICK if quick else Sizes()
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.kept: dict[str, Any] = {}
        """Results that a later check compares with."""
        self._engines: Engines | None = None
        self._key: tuple | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def low_dtype(self) -> str:
        """What large models compute in; on a CPU float32, which compiles no kernels."""
        return "bfloat16" if self.on_gpu else "float32"

    def engines(self, settings: Engine, dtype: str) -> Engines:
        """The last ones if they are alike; others are closed."""
        key = (settings.model_dump_json(), dtype)
        if self._key != key:
            self.close_engines()
            self._engines, self._key = Engines(settings, dtype, self.device), key
        return self._engines

    def make_room(self) -> None:
        """The engine sleeps, if there is one: the card is the trainer's."""
        if self._engines is not None:
            self._engines.make_room()

    def close_engines(self) -> None:
        engines, self._engines, self._key = self._engines, None, None
        if engines is not None:
            engines.close()

    @cached_property
    def dense(self) -> Workload:
        """The dense model's GRPO steps; its checkpoint is written."""
        sizes = self.sizes
        folder = self.folder / "dense"
        work = Workload(
            folder=str(folder),
            settings=sizes.dense,
            device=self.device,
            prompts=sizes.prompts,
            generations=sizes.generations,
            max_completion_length=sizes.max_completion_length,
            steps=sizes.steps,
            mean_length=sizes.mean_length,
            kv_cache_gib=sizes.kv_cache_gib,
            trl_batch=sizes.trl_batch,
            trl_eager=not self.on_gpu,
        )
        if not folder.exists():
            work.make_checkpoint()
        return work

    @cached_property
    def updater(self) -> GrpoUpdater:
        """The dense model's. It learns fast: old weights in the engine would be noticed."""
        return load_updater(dataclasses.replace(self.dense, learning_rate=1e-4))

    def free(self, *, engines: bool = True) -> None:
        self.__dict__.pop("updater", None)
        if engines:
            self.close_engines()
        free_memory()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.close_engines()
        shutil.rmtree(self.folder, ignore_errors=True)


def held_gib(device: torch.device) -> float:
    """Of the whole card, by all that this process and others hold."""
    if device.type == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30
