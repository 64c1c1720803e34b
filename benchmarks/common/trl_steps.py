"""Steps of TRL's GRPOTrainer on a Workload.

TRL 1.16 with colocated vLLM does not run on CPU. The smallest repair, made here: its engine gets
r1pipe's arguments (float32, eager, a KV cache that fits), and its weight sync passes
`named_parameters()` to vLLM's layer-wise reload in one call instead of calling `load_weights` per
tensor, which raises there.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common.workload import (
    Workload,
    load_rows,
    make_rollouts,
    reward_parity,
    synchronize,
)

from r1pipe.models.model import load_model
from r1pipe.models.tokenizer import load_tokenizer
from r1pipe.types import Rollout


def run_trl(work: Workload, *, update_only: bool = False) -> list[dict]:
    """Each step's seconds and tokens. Its engine is gone afterwards."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = PhaseClock()

    class StepTimes(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    def reward(completion_ids: list[list[int]], prompts: list, **columns: object) -> list[float]:
        completions = sum(len(ids) for ids in completion_ids)
        prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        clock.count(completions, completions + sum(len(ids) for ids in prompt_ids))
        return reward_parity(completion_ids)

    tokenizer = load_tokenizer(work.folder)
    config = GRPOConfig(
        output_dir=str(Path(work.folder) / "trl"),
        use_cpu=work.device.type == "cpu",
        bf16=work.device.type == "cuda",
        per_device_train_batch_size=work.trl_batch,
        gradient_accumulation_steps=work.num_samples // work.trl_batch // work.processes,
        num_generations=work.generations,
        max_completion_length=work.max_completion_length,
        max_steps=work.steps,
        loss_type="dapo",
        learning_rate=1e-6,
        gradient_checkpointing=False,
        use_vllm=not update_only,
        vllm_mode="colocate",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = Dataset.from_list([{"prompt": p.prompt} for p in load_rows()])
    model = load_model(work.folder, work.device)
    with contextlib.nullcontext() if update_only else repaired(work, clock):
        trainer = GRPOTrainer(
            model, reward, config, rows, processing_class=tokenizer, callbacks=[StepTimes()]
        )
        if update_only:
            return [time_trl_update(work, trainer, step) for step in range(work.steps)]
        try:
            trainer.train()
        finally:
            trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
        return clock.steps


@contextlib.contextmanager
def repaired(work: Workload, clock: "PhaseClock") -> Iterator[None]:
    """Within it, the repair in the module's docstring, and `clock` times the phases. Afterwards the
    environment is as before: TRL's RANK and WORLD_SIZE would make a run of several processes."""
    from transformers import AutoConfig
    from trl.generation import vllm_generation

    from r1pipe.rollout.vllm_args import engine_arguments, set_environment
    from r1pipe.rollout.weight_sync import drop_expert_kernels

    architecture = AutoConfig.from_pretrained(work.folder)
    engine, generation = vllm_generation.LLM, vllm_generation.VLLMGeneration

    def make_engine(model: str, **theirs: Any) -> Any:
        return engine(model, **engine_arguments(architecture, work.engine, "float32", work.device))

    def sync(self: Any) -> None:
        self.llm.apply_model(drop_expert_kernels)
        weights = iter(list(self._iter_named_params()))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    on_cpu = work.device.type == "cpu"
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(vllm_generation, "LLM", make_engine if on_cpu else engine),
        mock.patch.object(
            generation,
            "sync_weights",
            clock.timed("sync", sync if on_cpu else generation.sync_weights),
        ),
        mock.patch.object(generation, "generate", clock.timed("sample", generation.generate)),
    ):
        set_environment(architecture, work.device, work.dtype)
        if not work.trl_eager:  # TRL leaves torch.compile on
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
            torch.compiler.set_stance("default")
        yield


class PhaseClock:
    """Times of TRL's steps. Its sync runs inside its generation, and is subtracted from that."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self.started = time.perf_counter()
        self.phases = {"sample": 0.0, "sync": 0.0, "tokens_sampled": 0, "tokens_trained": 0}

    def end(self) -> None:
        synchronize()
        step = time.perf_counter() - self.started
        rest = step - self.phases["sample"] - self.phases["sync"]
        counts_2 = torch.tensor([self.phases["tokens_sampled"], self.phases["tokens_trained"]])
        if dist.is_initialized():
            dist.all_reduce(counts_2)
        sampled, trained = counts_2.tolist()
        self.phases |= {"tokens_sampled": sampled, "tokens_trained": trained}
        self.steps.append({"step": step, **self.phases, "update": rest, "score": 0.0})

    def count(self, sampled: int, trained: int) -> None:
        self.phases["tokens_sampled"] += sampled
        self.phases["tokens_trained"] += trained

    def timed(self, phase: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.phases[phase] += time.perf_counter() - started
            return result

        return call


def time_trl_update(work: Workload, trainer: Any, step: int) -> dict[str, float]:
    """What TRL's trainer does with a batch from vLLM: log-probabilities of the old policy, loss and
    gradient of each micro-batch, optimizer step."""
    rollouts = make_rollouts(work, step)
    tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    parts = work.num_samples // work.trl_batch
    optimizer = trainer.create_optimizer() if trainer.optimizer is None else trainer.optimizer
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    whole = pad_rollouts(rollouts, trainer.accelerator.device)
    started = time.perf_counter()
    with torch.no_grad(), trainer.accelerator.autocast():
        ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
        mask = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
        old, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, whole["completion_ids"].shape[1], work.trl_batch
        )
    whole["old_per_token_logps"] = old
    for part in range(parts):
        rows = slice(part * work.trl_batch, (part + 1) * work.trl_batch)
        inputs = {k: v if k == "num_items_in_batch" else v[rows] for k, v in whole.items()}
        with trainer.accelerator.autocast():
            loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    elapsed = time.perf_counter() - started
    return {"step": elapsed, "update": elapsed, "tokens_trained": tokens}


def pad_rollouts(rollouts: list[Rollout], device: torch.device) -> dict[str, torch.Tensor]:
    def pad(rows: list[list], side: str, dtype: torch.dtype = torch.long) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
        return padded.to(device)

    prompts, completions = (
        [getattr(r, f"{p}_ids") for r in rollouts] for p in ("prompt", "completion")
    )
    mask = pad([[1] * len(ids) for ids in completions], "right")
    return {
        "prompt_ids": pad(prompts, "left"),
        "prompt_mask": pad([[1] * len(ids) for ids in prompts], "left"),
        "completion_ids": pad(completions, "right"),
        "completion_mask": mask,
        "advantages": torch.tensor([(-1.0) ** i for i in range(len(rollouts))], device=device),
        "num_items_in_batch": mask.sum(),
    }
