"""The update of on-policy distillation: the student's log-probabilities beside its teachers'.

With several teachers, as in DeepSeek-V4's last stage, each teaches its own problems. They take
turns: a micro-batch is of one teacher, and only its head is there in full.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from r1pipe.config.rl import OnPolicyDistill
from r1pipe.rl.losses import Totals
from r1pipe.rl.update import COUNT, SamplerMismatch, Updater
from r1pipe.trainer.divergence import TeacherStates
from r1pipe.trainer.packed import sum_second
from r1pipe.trainer.packing import PackedBatch, Sample
from r1pipe.trainer.policy import LogProbs, Policy, compute_hidden, prepare
from r1pipe.types import Problem
from r1pipe.utils.distributed import full_tensor
from r1pipe.utils.errors import UserError


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
        return compute_hidden(self.model, batch)[batch.predictor_C]


class DistillUpdater(Updater):
    """An Updater whose loss is the divergence from the teacher, a mean over the minibatch's tokens.
    There is no ratio to an old policy.

    There is one pass over a batch. `teachers`: by value of the settings' `teacher_field`, or a
    single one as "". `routes`: that value for each problem's id.
    """

    settings: OnPolicyDistill
    head: Callable[[Tensor], Tensor]
    """The teacher's whose turn it is, `[C, D] -> [C, V]`: full on every rank."""

    def __init__(
        self,
        policy: Policy | PreTrainedModel,
        teachers: Mapping[str, TeacherModel],
        settings: OnPolicyDistill,
        *,
        dtype: str,
        seed: int,
        routes: Mapping[str, str] | None = None,
    ):
        super().__init__(policy, settings, dtype=dtype, seed=seed)
        self.teachers, self.routes = teachers, routes or {}
        self.name, self.teacher = next(iter(teachers.items()))
        self.head = gather_head(self.teacher)

    def batches(self, samples: list[Sample]) -> Iterator[PackedBatch | None]:
        """One teacher's after another's, in the same order and number on every rank: each forward
        of a sharded teacher gathers its layers."""
        if not torch.is_grad_enabled():  # nobody teaches
            yield from super().batches(samples)
            return
        for name in self.teachers:
            for batch in super().batches([s for s in samples if self.find_route(s) == name]):
                self.turn_to(name)
                yield batch

    def find_route(self, sample: Sample) -> str:
        if "" in self.teachers:
            return ""
        name = sample.rollout.problem_id
        if name not in self.routes:
            raise UserError(
                f'stage "{self.settings.name}": problem "{name}" is not in its data, so no '
                "teacher_field says who teaches it: replay with the data that it was sampled from"
            )
        return self.routes[name]

    def turn_to(self, name: str) -> None:
        teacher, self.name = self.teachers[name], name
        if teacher is not self.teacher:
            del self.head  # before the next one is gathered
            self.teacher, self.head = teacher, gather_head(teacher)

    def compute_dummy_loss(self, batch: PackedBatch) -> Tensor:
        if torch.is_grad_enabled():
            now = self.measure_divergence(batch)
            return (sum_divergence(now) + self.mtp_loss(now, 1)) * 0
        return super().compute_dummy_loss(batch)

    def backward(
        self, batch: PackedBatch, totals: Totals, mismatch: SamplerMismatch | None
    ) -> dict[str, float]:
        now = self.measure_divergence(batch)
        if mismatch is not None:
            mismatch.add(batch, now)
        divergence = sum_divergence(now)
        loss = divergence / max(1, totals.num_tokens)
        (loss + self.mtp_loss(now, totals.num_tokens)).backward()
        sums = {"loss": float(loss.detach()), "divergence": float(divergence.detach())}
        sums |= sum_second(now)
        if self.name:
            own = f"divergence/{self.name}"
            sums |= {own: sums["divergence"], COUNT + own: len(batch.target_C)}
        return sums

    def measure_divergence(self, batch: PackedBatch) -> LogProbs:
        with torch.no_grad():
            states = TeacherStates(self.teacher(batch), self.head, self.settings.beta)
        return self.policy(batch, self.settings.temperature, teacher=states)


def gather_head(teacher: TeacherModel) -> Callable[[Tensor], Tensor]:
    head = teacher.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return partial(
        linear,
        weight=full_tensor(head.weight),
        bias=None if bias is None else full_tensor(bias),
    )


def route_problems(stage: OnPolicyDistill, problems: Iterable[Problem]) -> dict[str, str]:
    """The value of `teacher_field` by problem id; empty with a single teacher. Raises UserError for
    the first problem that nobody teaches."""
    return {p.id: find_value(stage, p) for p in problems} if stage.teachers else {}


def find_value(stage: OnPolicyDistill, problem: Problem) -> str:
    column = cast("str", stage.teacher_field)
    is_ours = column in ("kind", "source", "category")
    value = getattr(problem, column) if is_ours else (problem.extra or {}).get(column)
    if str(value) not in stage.teachers:
        what = f"no {column}" if value in (None, "") else f"no teacher for {column} {str(value)!r}"
        raise UserError(
            f'stage "{stage.name}": problem "{problem.id}": {what}; teachers has '
            f"{', '.join(stage.teachers)}: add one, or leave the row out"
        )
    return str(value)


def sum_divergence(now: LogProbs) -> Tensor:
    return cast("Tensor", now.divergence_C).sum()
