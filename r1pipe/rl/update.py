"""The trainer's half of a step: log-probabilities of rollouts, and the policy's update."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.config.rl import OnPolicy
from r1pipe.models.routing import pack_routes, replaying
from r1pipe.rl.balance import share_out
from r1pipe.rl.losses import LossInputs, Totals, compute_loss
from r1pipe.trainer.fsdp import put_weights, take_weights
from r1pipe.trainer.packed import PackedTrainer, as_policy
from r1pipe.trainer.packing import PackedBatch, Sample, Support
from r1pipe.trainer.policy import LogProbs, Policy, Truncation
from r1pipe.utils import distributed
from r1pipe.utils.phases import phase

Check = Callable[[dict[str, float]], bool | None]
"""Says, by these metrics, whether the update is to be skipped; raises if the run must end."""


class Updater(PackedTrainer):
    """GRPO's update: also owns the reference policy, if `beta` asks for it; sharded or not."""

    def __init__(
        self,
        policy: Policy | PreTrainedModel,
        reference: Policy | PreTrainedModel | None,
        settings: OnPolicy,
        *,
        dtype: str,
        seed: int,
    ):
        self.num_updates = settings.steps_per_generation * settings.num_iterations
        super().__init__(
            policy,
            settings,
            num_optimizer_steps=settings.max_steps * self.num_updates,
            num_warmup_steps=settings.warmup_steps * self.num_updates,
            dtype=dtype,
        )
        self.reference = as_policy(reference) if reference is not None else None
        self.seed = seed
        self.truncation = Truncation(settings.top_p, settings.top_k)
        # Without dropout on either side: the sampler has none. Layers are checkpointed in training
        # mode only.
        self.model.train(settings.gradient_checkpointing)

    @property
    def needs_old_policy(self) -> bool:
        """Whether later optimizer steps ask what the policy was before the first one."""
        return self.num_updates > 1

    @contextlib.contextmanager
    def replaying(self, batch: PackedBatch) -> Iterator[None]:
        """The policy takes the sampler's routes, if the settings ask for that; to be left after
        the backward pass. The reference has its own."""
        routes_NLK = None
        if self.settings.routing_replay:
            routes = [sample.rollout.routes for sample in batch.samples]
            routes_NLK = pack_routes(routes, self.model.device)
        with replaying(self.model, routes_NLK):
            yield

    def compute_dummy_loss(self, batch: PackedBatch, *, measure_reference: bool = False) -> Tensor:
        loss = super().compute_dummy_loss(batch)
        if measure_reference and self.reference is not None:
            self.measure_reference(batch, None)
        return loss

    def informative(self, samples: list[Sample]) -> list[Sample]:
        """Without those that move nothing: a sample of advantage 0, unless a KL term is asked."""
        return [sample for sample in samples if self.is_informative(sample)]

    def is_informative(self, sample: Sample) -> bool:
        return bool(self.settings.beta) or sample.advantage != 0

    @phase("update")
    def step(self, samples: list[Sample], step: int, check: Check) -> dict[str, float]:
        """`steps_per_generation` x `num_iterations` optimizer steps over the samples.

        `check` is given `sampler/logprob_diff_mean` and `_max`, of |sampler - trainer| over
        completion tokens, and the policy's `entropy` (mean, nats), before the first optimizer step;
        and before each one its own loss, gradient norm and figures. All are of the samples that
        take part: those of advantage 0 are not computed.

        Returns these, and means over the step's tokens and the optimizer steps that were applied.
        """
        if self.settings.mask_truncated_completions:
            samples = [sample for sample in samples if not sample.rollout.truncated]
        plan = self.plan_minibatches(samples, step)
        own = self.share_out(samples, plan[: self.settings.steps_per_generation])
        samples = list(own.values())
        active = self.informative(samples)
        any_active = any(distributed.gather(bool(active)))
        agreement = SamplerMismatch()
        # The policy before the first optimizer step is the policy in it, and is computed once.
        at_once = any_active and not self.needs_old_policy
        if not at_once:
            agreement = self.evaluate(active if any_active else samples)
            if (metrics := agreement.metrics()) and check(metrics):
                return {**metrics, "updates_skipped": self.num_updates, "tokens_trained": 0}
        log, num_skipped = UpdateLog(), 0
        for numbers in plan:
            minibatch = [own[number] for number in numbers if number in own]
            active = self.informative(minibatch)
            totals, num_active = self.measure_size(minibatch, active)
            if not num_active:
                continue
            part = UpdateLog()
            for batch in self.batches(active):
                if batch is None:
                    self.run_dummy_pass(measure_reference=not self.needs_old_policy)
                    continue
                counting = self.counting(batch, num_active)
                with self.kernels(), self.replaying(batch), counting:
                    # In later steps the policy is another than the sampler's.
                    part.add_sums(self.backward(batch, totals, agreement if at_once else None))
            part.add_step(self.clip_gradient(), active)
            skipped = check({**(agreement.metrics() if at_once else {}), **part.metrics()})
            at_once = False
            if skipped:
                num_skipped += 1
            else:
                self.apply_gradient()
                log.add(part)
            self.close_gradient(applied=not skipped)
        return {
            **agreement.metrics(),
            **log.metrics(),
            **self.load.metrics(),
            **({"updates_skipped": num_skipped} if num_skipped else {}),
            "learning_rate": self.scheduler.get_last_lr()[0],
        }

    def measure_size(self, minibatch: list[Sample], active: list[Sample]) -> tuple[Totals, int]:
        """The whole minibatch's sizes, and how many samples of it take part: over all ranks."""
        sizes = distributed.sum_counts(
            {
                "completions": len(minibatch),
                "tokens": sum(len(s.rollout.completion_ids) for s in minibatch),
                "active": len(active),
            }
        )
        totals = Totals(
            num_completions=sizes["completions"],
            num_tokens=sizes["tokens"],
            max_completion_length=self.settings.max_completion_length,
        )
        return totals, sizes["active"]

    def plan_minibatches(self, samples: list[Sample], step: int) -> list[list[int]]:
        """The optimizer steps' samples by number: each pass over them in an order of its own, cut
        into `steps_per_generation`.

        The numbers count all ranks' samples, one rank's after the other's. So a minibatch is the
        same however many ranks share it.
        """
        plan, count = [], sum(distributed.gather(len(samples)))
        for iteration in range(self.settings.num_iterations):
            order = list(range(count))
            random.Random(f"{self.seed}/minibatches/{step}/{iteration}").shuffle(order)
            parts = self.settings.steps_per_generation
            plan += [order[part::parts] for part in range(parts)]
        return plan

    def share_out(self, samples: list[Sample], minibatches: list[list[int]]) -> dict[int, Sample]:
        """What this rank trains on, by number: as many tokens as the others in each of the first
        pass's minibatches (and about as many in those of later passes)."""
        first = sum(distributed.gather(len(samples))[: distributed.rank()])
        numbered = dict(enumerate(samples, first))
        costs = {n: s.num_tokens * self.is_informative(s) for n, s in numbered.items()}
        return share_out(numbered, costs, minibatches)

    @torch.no_grad()
    def evaluate(self, samples: list[Sample]) -> "SamplerMismatch":
        """Fill in what later optimizer steps need of the policy as it is now, and of the
        reference; compare with the sampler."""
        agreement = SamplerMismatch()
        with self.kernels():
            for batch in self.batches(samples):
                if batch is None:
                    self.run_dummy_pass(measure_reference=True)
                    continue
                with self.replaying(batch):
                    now = self.measure(batch)
                agreement.add(batch, now)
                for sample, old in zip(batch.samples, batch.split(now.logprobs_C), strict=True):
                    sample.old_logprobs = old
                if now.support is not None:
                    supports = now.support.cpu().split(batch.completion_lengths)
                    for sample, support in zip(batch.samples, supports, strict=True):
                        sample.support = support
                if self.reference is not None:
                    ref_C = self.measure_reference(batch, now.support)
                    for sample, ref in zip(batch.samples, batch.split(ref_C), strict=True):
                        sample.ref_logprobs = ref
        return agreement

    def copy_weights(self) -> dict[str, Tensor]:
        """Of the policy, this rank's part, in the CPU's memory."""
        return {
            name: tensor.to("cpu", copy=True) for name, tensor in take_weights(self.policy).items()
        }

    def evaluate_with(self, weights: dict[str, Tensor], samples: list[Sample]) -> "SamplerMismatch":
        """`evaluate` by the policy of other weights, as `copy_weights` gave them."""
        own = self.copy_weights()
        put_weights(self.policy, weights)
        try:
            return self.evaluate(samples)
        finally:
            put_weights(self.policy, own)

    def measure(self, batch: PackedBatch) -> LogProbs:
        """The policy's log-probabilities, its distribution cut as the sampler cuts its own."""
        truncation = self.truncation if self.truncation.cuts else None
        return self.policy(batch, self.settings.temperature, truncation=truncation)

    @torch.no_grad()
    def measure_reference(self, batch: PackedBatch, support: Support | None) -> Tensor:
        return self.reference(batch, self.settings.temperature, support=support).logprobs_C

    def backward(
        self, batch: PackedBatch, totals: Totals, agreement: "SamplerMismatch | None"
    ) -> dict[str, float]:
        """Add the batch's share of the gradient; returns sums over its tokens. `agreement`, if the
        policy is still the sampler's, is to be told how it compares."""
        if agreement is not None:
            now = self.measure(batch)
            agreement.add(batch, now)
            old_C, support = now.logprobs_C.detach(), now.support
            ref_C = self.measure_reference(batch, support) if self.reference else None
        else:
            old_C, ref_C = batch.join("old_logprobs"), batch.join("ref_logprobs")
            support = None
            if self.truncation.cuts:
                support = Support.join([s.support for s in batch.samples], old_C.device)
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
        loss.loss.backward()
        return {"loss": float(loss.loss.detach()), **loss.sums}

    def state_dict(self) -> dict[str, Any]:
        """A reference that is never refreshed is the checkpoint that the stage starts from."""
        state = super().state_dict()
        if self.reference is not None and self.settings.reference_refresh_steps:
            state["reference"] = take_weights(self.reference)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "reference" in state:
            put_weights(self.reference, state["reference"])

    def refresh_reference(self) -> None:
        """Make the reference, if there is one, the current policy (R1: every 400 updates)."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())


class SamplerMismatch:
    """How far sampler and trainer are apart on the same tokens, and the policy's entropy."""

    def __init__(self) -> None:
        self._diff_sum = self._diff_max = self._entropy_sum = 0.0
        self._num_tokens = 0

    def add(self, batch: PackedBatch, now: LogProbs) -> None:
        diff_C = (now.logprobs_C.detach() - batch.sampler_logprobs_C).abs()
        self._diff_sum += float(diff_C.sum(dtype=torch.float64))
        # Not max(): a NaN must stay one.
        self._diff_max = float(torch.maximum(diff_C.max(), diff_C.new_tensor(self._diff_max)))
        self._entropy_sum += float(now.entropy_C.sum(dtype=torch.float64))
        self._num_tokens += len(diff_C)

    def metrics(self) -> dict[str, float]:
        """Over all ranks, which must all ask; empty if there was nothing to compare."""
        own = (self._diff_sum, self._diff_max, self._entropy_sum, self._num_tokens)
        diff_sums, diff_maxima, entropy_sums, counts = zip(*distributed.gather(own))
        num_tokens = sum(counts)
        if not num_tokens:
            return {}
        return {
            "sampler/logprob_diff_mean": sum(diff_sums) / num_tokens,
            "sampler/logprob_diff_max": float(torch.tensor(diff_maxima).amax()),
            "entropy": sum(entropy_sums) / num_tokens,
        }


class UpdateLog:
    """Adds up what a step's optimizer steps report."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._grad_norm_sum = 0.0
        self._num_steps = self._num_tokens = self._num_model_tokens = 0

    def add_sums(self, sums: dict[str, float]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def add_step(self, grad_norm: float, samples: list[Sample]) -> None:
        self._grad_norm_sum += grad_norm
        self._num_steps += 1
        self._num_tokens += sum(len(s.rollout.completion_ids) for s in samples)
        self._num_model_tokens += sum(s.num_tokens for s in samples)

    def add(self, other: "UpdateLog") -> None:
        self.add_sums(other._sums)
        self._grad_norm_sum += other._grad_norm_sum
        self._num_steps += other._num_steps
        self._num_tokens += other._num_tokens
        self._num_model_tokens += other._num_model_tokens

    def metrics(self) -> dict[str, float]:
        """Means: of the loss and the gradient's norm over optimizer steps, else over completion
        tokens; and the prompt and completion tokens that the optimizer steps took. Over all ranks,
        which must all ask."""
        own = (self._num_tokens, self._num_model_tokens, self._grad_norm_sum)
        counts, model_counts, grad_norm_sums = zip(*distributed.gather(own))
        num_tokens, num_model_tokens = sum(counts), sum(model_counts)
        metrics = {
            name: value / max(1, self._num_steps if name == "loss" else num_tokens)
            for name, value in distributed.sum_counts(self._sums).items()
        }
        if self._num_steps:
            metrics["grad_norm"] = grad_norm_sums[0] / self._num_steps
        return {**metrics, "tokens_trained": num_model_tokens}
