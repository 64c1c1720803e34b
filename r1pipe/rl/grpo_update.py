"""The update of GRPO: clipped policy gradient by advantages, and a KL term to a reference."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.config.rl import Grpo
from r1pipe.models.adapter import without_adapter
from r1pipe.models.fp8 import add_fp8
from r1pipe.rl.losses import LossInputs, Totals, compute_loss
from r1pipe.rl.update import SamplerMismatch, Updater
from r1pipe.trainer.fsdp import put_weights, take_weights
from r1pipe.trainer.packed import as_policy, sum_second
from r1pipe.trainer.packing import PackedBatch, Sample, Support
from r1pipe.trainer.policy import LogProbs, Policy


class GrpoUpdater(Updater):
    """An Updater whose loss is that of `losses.compute_loss`; also owns the reference policy, if
    `beta` asks for it; the policy given as `reference` is it without its adapter."""

    settings: Grpo

    def __init__(
        self,
        policy: Policy | PreTrainedModel,
        reference: Policy | PreTrainedModel | None,
        settings: Grpo,
        *,
        dtype: str,
        seed: int,
    ):
        self.num_passes = settings.num_iterations
        super().__init__(policy, settings, dtype=dtype, seed=seed)
        self.reference = None if reference is None else as_policy(reference)
        if self.reference is not None and settings.trains_in_fp8:
            add_fp8(self.reference.model, is_on=True)  # otherwise the KL would begin above 0

    @property
    def needs_old_policy(self) -> bool:
        return self.num_updates > 1 and self.settings.old_policy == "trainer"

    def select(self, samples: list[Sample]) -> list[Sample]:
        if self.settings.mask_truncated_completions:
            return [sample for sample in samples if not sample.rollout.truncated]
        return samples

    def is_informative(self, sample: Sample) -> bool:
        return bool(self.settings.beta) or sample.advantage != 0

    def compute_dummy_loss(self, batch: PackedBatch) -> Tensor:
        loss = super().compute_dummy_loss(batch)
        # The other ranks ask the reference before the first optimizer step, or in it.
        if self.reference is not None and not (self.needs_old_policy and torch.is_grad_enabled()):
            self.measure_reference(batch, None)
        return loss

    @torch.no_grad()
    def measure_reference(self, batch: PackedBatch, support: Support | None) -> Tensor | None:
        if self.reference is None:
            return None
        if self.reference is self.policy:
            with without_adapter(self.model):
                return self.policy(batch, self.settings.temperature, support=support).logprobs_C
        return self.reference(batch, self.settings.temperature, support=support).logprobs_C

    def remember(self, batch: PackedBatch, now: LogProbs) -> None:
        """Keep what later optimizer steps ask for with the samples, on the CPU."""
        for sample, old in zip(batch.samples, batch.split(now.logprobs_C), strict=True):
            sample.old_logprobs = old
        if now.support is not None:
            supports = now.support.cpu().split(batch.completion_lengths)
            for sample, support in zip(batch.samples, supports, strict=True):
                sample.support = support
        ref_C = self.measure_reference(batch, now.support)
        if ref_C is not None:
            for sample, ref in zip(batch.samples, batch.split(ref_C), strict=True):
                sample.ref_logprobs = ref

    def backward(
        self, batch: PackedBatch, totals: Totals, mismatch: SamplerMismatch | None
    ) -> dict[str, float]:
        if not self.needs_old_policy:
            now = self.measure(batch)
            if mismatch is not None:  # the first optimizer step, whose policy is the sampler's
                mismatch.add(batch, now)
            by_sampler = self.settings.old_policy == "sampler"
            old_C = batch.sampler_logprobs_C if by_sampler else now.logprobs_C.detach()
            ref_C = self.measure_reference(batch, now.support)
        else:
            old_C = cast("Tensor", batch.join("old_logprobs"))  # `remember` has set it
            ref_C = batch.join("ref_logprobs")
            support = None
            if self.truncation.cuts:
                supports = [s.support for s in batch.samples if s.support]
                support = Support.join(supports, old_C.device)
            now = self.policy(batch, self.settings.temperature, support=support)
        inputs = LossInputs(
            logprobs_C=now.logprobs_C,
            old_logprobs_C=old_C,
            sampler_logprobs_C=batch.sampler_logprobs_C,
            advantages_B=batch.advantages_B,
            sequence_C=batch.sequence_C,
            ref_logprobs_C=ref_C,
        )
        loss = compute_loss(inputs, totals, self.settings)
        (loss.loss + self.mtp_loss(now, totals.num_tokens)).backward()
        return {"loss": float(loss.loss.detach()), **loss.sums, **sum_second(now)}

    def end_step(self, step: int) -> None:
        every = self.settings.reference_refresh_steps
        if every and step % every == 0:
            self.refresh_reference()

    def refresh_reference(self) -> None:
        """Make the reference, if there is one, the current policy (R1: every 400 updates)."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """A reference that is never refreshed is the checkpoint that the stage starts from."""
        state = super().state_dict()
        if self.reference is not None and self.settings.reference_refresh_steps:
            state["reference"] = take_weights(self.reference)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.reference is not None and "reference" in state:
            put_weights(self.reference, state["reference"])
