"""Shared by supervised training and RL: packed micro-batches and the optimizer step.

With several processes each rank has its share of the samples, and all take every step together: the
loss divides by sizes summed over the ranks, and gradients are summed. So the ranks' losses add up
to the loss of one process with all samples.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from r1pipe.config.base import Optimization
from r1pipe.models.expert_load import ExpertLoad, number_packed
from r1pipe.models.fp8 import add_fp8, multiplies_in_fp8
from r1pipe.models.model import fast_training_kernels
from r1pipe.models.mtp import find_mtp_layer, require_mtp_layer
from r1pipe.models.sparse_attention import IndexerTraining, require_indexer
from r1pipe.trainer.fsdp import put_optimizer, put_weights, take_optimizer, take_weights
from r1pipe.trainer.optimizer import (
    OffloadedAdamW,
    clip_gradient,
    find_schedule,
    group_by_mesh,
    sum_gradients,
)
from r1pipe.trainer.packing import PackedBatch, Sample, cut_batches, pack
from r1pipe.trainer.policy import LogProbs, Policy
from r1pipe.trainer.sequence_parallel import cut_tokens
from r1pipe.trainer.utilization import Utilization
from r1pipe.types import Rollout
from r1pipe.utils import distributed
from r1pipe.utils.phases import heartbeat
from r1pipe.utils.progress import log_line


class PackedTrainer:
    """Owns the policy's optimizer and schedule, and tracks its experts' load."""

    mtp: Literal["joint", "detached"] = "joint"
    """How the prediction layer is trained, if the settings ask for that."""

    def __init__(
        self,
        policy: Policy | PreTrainedModel,
        settings: Optimization,
        *,
        num_optimizer_steps: int,
        num_warmup_steps: int,
        dtype: str,
    ):
        self.settings, self.dtype = settings, dtype
        self.policy = as_policy(policy)
        self.model = model = self.policy.model
        self.device = model.device
        if settings.mtp:
            require_mtp_layer(model.config)
            self.policy.mtp = self.mtp
        detached = find_mtp_layer(model) if self.policy.mtp == "detached" else None
        self.detached = dict.fromkeys(detached.parameters() if detached else ())
        """Parameters whose gradient has nothing to do with the others'."""
        self.indexer = self.open_indexer() if settings.indexer else None
        if settings.fp8:
            count = add_fp8(model, is_on=settings.trains_in_fp8)
            own = settings.trains_in_fp8 and multiplies_in_fp8(self.device, getattr(torch, dtype))
            how = "trained by the device" if own else "emulated"
            log_line(f"fp8 ({settings.fp8}), {how}: {count} matrices in e4m3, 128 x 128 blocks")
        self.load = ExpertLoad(
            model,
            bias_update_rate=0.0 if self.learns_in_part else settings.bias_update_rate,
            seq_aux_loss_coef=settings.seq_aux_loss_coef,
        )
        make_optimizer = OffloadedAdamW if settings.offload_optimizer else torch.optim.AdamW
        self.optimizer = make_optimizer(
            self.group_parameters(),
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        schedule, arguments = find_schedule(settings)
        self.scheduler = get_scheduler(
            schedule, self.optimizer, num_warmup_steps, num_optimizer_steps, arguments
        )
        self.utilization = Utilization(
            model.config,
            model.device,
            dtype,
            frozen=self.learns_in_part,
            mtp=self.policy.mtp,
        )
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def speaks_for_team(self) -> bool:
        """Whether this rank's samples count: not if another has the same ones."""
        return self.policy.team is None or self.policy.team.rank() == 0

    @property
    def learns_in_part(self) -> bool:
        """Whether the model stays as it is, beside an adapter or its indexers."""
        indexer = self.settings.indexer
        return bool(self.settings.adapter or (indexer and indexer.is_alone))

    def open_indexer(self) -> IndexerTraining:
        require_indexer(self.model.config)
        settings = self.settings.indexer
        indexer = IndexerTraining(self.model, dense=settings.is_dense)
        if settings.is_alone:
            self.model.requires_grad_(False)
            for parameter in indexer.parameters:
                parameter.requires_grad_(True)
        return indexer

    def group_parameters(self) -> list[dict[str, Any]]:
        """The optimizer's groups: what the loss trains, and what the indexers' own does."""
        own = dict.fromkeys(self.indexer.parameters if self.indexer else ())
        rest = [p for p in self.model.parameters() if p.requires_grad and p not in own]
        groups = group_by_mesh(rest)
        if self.indexer:
            rate = self.settings.indexer.learning_rate
            groups += [{**group, "lr": rate} for group in group_by_mesh(own)]
        return groups

    def kernels(self) -> contextlib.AbstractContextManager:
        return fast_training_kernels(self.device, self.dtype)

    def batches(self, samples: list[Sample]) -> Iterator[PackedBatch | None]:
        """The same number on every rank, because each forward gathers sharded layers: a rank with
        fewer batches gets None for the rest."""
        on_gpu = self.device.type == "cuda"
        parts = cut_batches(samples, self.settings.tokens_per_micro_batch(on_gpu=on_gpu))
        num_batches = max(distributed.gather(len(parts)))
        for number in range(num_batches):
            yield pack(parts[number], self.device) if number < len(parts) else None
            heartbeat()

    def run_dummy_pass(self) -> None:
        """Zero-weight forward and, with gradients, backward pass, so that collectives match on a
        rank that has no samples left."""
        rollout = Rollout("", 0, [0], [0], [0.0], "", "stop")
        with self.kernels():
            loss = self.compute_dummy_loss(pack([Sample(rollout, 0.0)], self.device))
            if torch.is_grad_enabled():
                loss.backward()

    def compute_dummy_loss(self, batch: PackedBatch) -> Tensor:
        now = self.policy(batch, 1.0)
        return (now.logprobs_C.sum() + self.mtp_loss(now, 1)) * 0

    def mtp_loss(self, now: LogProbs, num_tokens: int) -> Tensor | float:
        """The batch's share of the prediction layer's weighted loss (eq. 24 and 25 of DeepSeek-V3,
        over completions), a mean over `num_tokens`; 0 if it is not trained."""
        if now.second is None or self.settings.mtp is None:
            return 0.0
        return -self.settings.mtp.loss_weight * now.second.logprobs_C.sum() / max(1, num_tokens)

    @contextlib.contextmanager
    def counting(self, batch: PackedBatch, num_sequences: int) -> Iterator[None]:
        """Count the experts' load and the indexers' loss in one forward and backward of this batch;
        `num_sequences`: of the whole optimizer step, over all ranks."""
        sequences_N = number_packed(batch.lengths, batch.ids_N.device)
        sequences_N = cut_tokens(sequences_N, self.policy.team, -1)
        own = self.indexer.counting(batch.lengths) if self.indexer else contextlib.nullcontext()
        with self.load.counting(sequences_N, num_sequences), own:
            yield

    def model_metrics(self) -> dict[str, float]:
        """What the model's own parts counted since the last call."""
        return {**self.load.metrics(), **(self.indexer.metrics() if self.indexer else {})}

    def clip_gradient(self) -> float:
        """Returns the gradient's norm over all ranks before clipping. A detached prediction layer
        and the indexers are clipped by themselves: the others' gradient is what it is without."""
        sum_gradients(self.model.parameters())
        clip_gradient(self.detached, self.settings.max_grad_norm)
        own_norm, apart = 0.0, self.detached
        if self.indexer:
            self.indexer.average_gradient()
            own_norm = clip_gradient(self.indexer.parameters, self.settings.max_grad_norm)
            if self.learns_in_part:
                return own_norm
            apart = apart | dict.fromkeys(self.indexer.parameters)
        others = [p for p in self.model.parameters() if p not in apart]
        return clip_gradient(others, self.settings.max_grad_norm) + 0 * own_norm  # NaN shows

    def apply_gradient(self) -> None:
        self.optimizer.step()
        self.scheduler.step()

    def wait_for_device(self) -> None:
        """Until the step's last kernel has run: the step is timed."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def close_gradient(self, *, applied: bool) -> None:
        """After each optimizer step, or instead of it."""
        self.load.balance(move_bias=applied)
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; this rank's part of sharded models."""
        return {
            "policy": take_weights(self.policy),
            "optimizer": take_optimizer(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        put_weights(self.policy, state["policy"])
        put_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def sum_second(now: LogProbs) -> dict[str, float]:
    """Sums over the batch's tokens of what the log has about the prediction layer, by the name of
    their mean; empty if it is not trained."""
    if now.second is None:
        return {}
    loss, num_right = -now.second.logprobs_C.sum(), now.second.is_likeliest_C.sum()
    return {"mtp/loss": float(loss.detach()), "mtp/accuracy": float(num_right)}


def as_policy(model: Policy | PreTrainedModel) -> Policy:
    return model if isinstance(model, Policy) else Policy(model)
