"""The update of on-policy distillation: the student's log-probabilities beside its teacher's."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from r1pipe.config.rl import OnPolicyDistill
from r1pipe.models.weights import full_tensor
from r1pipe.rl.losses import Totals
from r1pipe.rl.update import SamplerMismatch, Updater
from r1pipe.trainer.divergence import TeacherStates
from r1pipe.trainer.packing import PackedBatch
from r1pipe.trainer.policy import LogProbs, Policy, compute_hidden, prepare


class TeacherModel(nn.Module):
    """A frozen causal language model, from packed batches to hidden states `[C, D]`.

    One module with one forward, so that FSDP has one root. The head is applied where the student's
    is, chunk by chunk.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        prepare(model)
        self.model = model.eval()

    def forward(self, batch: PackedBatch) -> Tensor:
        return compute_hidden(self.model, batch)


class DistillUpdater(Updater):
    """An Updater whose loss is the divergence from the teacher, a mean over the minibatch's tokens.
    There is no ratio to an old policy.

    There is one pass over a batch. Every rank holds the full head of a sharded teacher.
    """

    settings: OnPolicyDistill

    def __init__(
        self,
        policy: Policy | PreTrainedModel,
        teacher: TeacherModel,
        settings: OnPolicyDistill,
        *,
        dtype: str,
        seed: int,
    ):
        super().__init__(policy, settings, dtype=dtype, seed=seed)
        self.teacher = teacher
        head = teacher.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        self.head = partial(
            linear,
            weight=full_tensor(head.weight),
            bias=None if bias is None else full_tensor(bias),
        )

    def compute_dummy_loss(self, batch: PackedBatch) -> Tensor:
        if torch.is_grad_enabled():
            return sum_divergence(self.measure_divergence(batch)) * 0
        return super().compute_dummy_loss(batch)

    def backward(
        self, batch: PackedBatch, totals: Totals, mismatch: SamplerMismatch | None
    ) -> dict[str, float]:
        now = self.measure_divergence(batch)
        if mismatch is not None:
            mismatch.add(batch, now)
        divergence = sum_divergence(now)
        loss = divergence / max(1, totals.num_tokens)
        loss.backward()
        return {"loss": float(loss.detach()), "divergence": float(divergence.detach())}

    def measure_divergence(self, batch: PackedBatch) -> LogProbs:
        with torch.no_grad():
            states = TeacherStates(self.teacher(batch), self.head, self.settings.beta)
        return self.policy(batch, self.settings.temperature, teacher=states)


def sum_divergence(now: LogProbs) -> Tensor:
    return cast("Tensor", now.divergence_C).sum()
