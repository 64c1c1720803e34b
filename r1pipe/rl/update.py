"""The trainer's half of a step: log-probabilities of rollouts, and the policy's update."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.config.rl import OnPolicy
from r1pipe.models.fp8 import computing_as_sampler
from r1pipe.models.routing import OWN, pack_routes, replaying
from r1pipe.rl.balance import share_out
from r1pipe.rl.losses import Totals
from r1pipe.trainer.fsdp import put_weights, take_weights
from r1pipe.trainer.offload import FrozenWeights
from r1pipe.trainer.packed import PackedTrainer
from r1pipe.trainer.packing import PackedBatch, Sample
from r1pipe.trainer.policy import LogProbs, Policy, Truncation
from r1pipe.trainer.sequence_parallel import cut_tokens
from r1pipe.utils import distributed
from r1pipe.utils.phases import phase

Check = Callable[[dict[str, float]], bool | None]
"""Whether to skip the update, by its metrics; raises if the run must end."""

COUNT = "tokens of "
"""See `UpdateLog.metrics`."""


class Updater(PackedTrainer):
    """Updates a policy, sharded or not, on its own samples, and compares it with the sampler.
    Subclasses define the loss: GrpoUpdater, DistillUpdater."""

    settings: OnPolicy
    mtp = "detached"
    num_passes = 1
    """Over each batch of rollouts."""

    def __init__(
        self, policy: Policy | PreTrainedModel, settings: OnPolicy, *, dtype: str, seed: int
    ):
        self.num_updates = settings.steps_per_generation * self.num_passes
        super().__init__(
            policy,
            settings,
            num_optimizer_steps=settings.max_steps * self.num_updates,
            num_warmup_steps=settings.warmup_steps * self.num_updates,
            dtype=dtype,
        )
        self.seed = seed
        whole = distributed.alone() or settings.sharding == "none"
        offloads = whole and settings.adapter and settings.adapter.offload_base
        self.frozen = FrozenWeights(self.policy) if offloads else None
        self.truncation = Truncation(settings.sampling.top_p, settings.sampling.top_k)
        # Evaluation mode, without dropout, as the sampler; but layers are checkpointed in training
        # mode only.
        self.model.train(settings.gradient_checkpointing)

    def leave_device(self) -> None:
        """Leave the GPU's memory to the engine that wakes up, if the settings ask for that."""
        if self.frozen:
            self.frozen.leave()

    def enter_device(self) -> None:
        if self.frozen:
            self.frozen.enter()

    # What the loss decides

    @property
    def needs_old_policy(self) -> bool:
        """Whether the loss needs log-probs of the policy before the first optimizer step."""
        return False

    def select(self, samples: list[Sample]) -> list[Sample]:
        """The samples that count in the minibatch's size."""
        return samples

    def is_informative(self, sample: Sample) -> bool:
        """Whether the sample has a gradient; if not, it counts but is not computed."""
        return True

    def remember(self, batch: PackedBatch, now: LogProbs) -> None:
        """Called with the log-probs of the policy before the first optimizer step."""

    def backward(
        self, batch: PackedBatch, totals: Totals, mismatch: "SamplerMismatch | None"
    ) -> dict[str, float]:
        """Add the batch's share of the gradient; returns sums over its tokens, and the `loss`.
        Adds to `mismatch`, which is given while the policy is still the sampler's."""
        raise NotImplementedError

    def end_step(self, step: int) -> None:
        """Called after all optimizer steps of a batch."""

    # What all losses share

    @contextlib.contextmanager
    def replaying(self, batch: PackedBatch) -> Iterator[None]:
        """Within it the policy takes the sampler's routes, if the settings ask for that; covers
        forward and backward. The reference chooses its own."""
        routes_NLK = None
        if self.settings.routing_replay:
            routes = [sample.rollout.routes for sample in batch.samples]
            routes_NLK = cut_tokens(pack_routes(routes, self.device), self.policy.team, OWN)
        with replaying(self.model, routes_NLK):
            yield

    def informative(self, samples: list[Sample]) -> list[Sample]:
        return [sample for sample in samples if self.is_informative(sample)]

    @phase("update")
    def step(self, samples: list[Sample], step: int, check: Check) -> dict[str, float]:
        """`steps_per_generation` x `num_passes` optimizer steps over the samples.

        `check` is given `sampler/logprob_diff_mean` and `_max`, of |sampler - trainer| over
        completion tokens, and the policy's `entropy` (mean, nats), before the first optimizer step;
        and before each one its own loss, gradient norm and figures. All are of the informative
        samples: others are not computed.

        Returns these, and means over the step's tokens and the optimizer steps that were applied.
        """
        samples = self.select(samples)
        plan = self.plan_minibatches(samples, step)
        own = self.share_out(samples, plan[: self.settings.steps_per_generation])
        mismatch = self.compare(list(own.values()))
        compared = mismatch is not None
        mismatch = mismatch or SamplerMismatch()
        if compared and (metrics := mismatch.metrics()) and check(metrics):
            return {**metrics, "updates_skipped": self.num_updates, "tokens_trained": 0}
        log = UpdateLog()
        for numbers in plan:
            minibatch = [own[number] for number in numbers if number in own]
            # After the first optimizer step the policy is another than the sampler's.
            taken = self.take_optimizer_step(minibatch, None if compared else mismatch, check, log)
            compared = compared or taken
        self.wait_for_device()
        return {
            **mismatch.metrics(),
            **log.metrics(),
            **self.model_metrics(),
            **({"updates_skipped": log.num_skipped} if log.num_skipped else {}),
            "learning_rate": self.scheduler.get_last_lr()[0],
        }

    def compare(self, samples: list[Sample]) -> "SamplerMismatch | None":
        """Policy and sampler, on this rank's samples, before the first optimizer step; None if that
        step computes the policy's log-probabilities anyway."""
        informative = self.informative(samples)
        if not any(distributed.gather(bool(informative))):
            return self.evaluate(samples)
        return self.evaluate(informative) if self.needs_old_policy else None

    def take_optimizer_step(
        self,
        minibatch: list[Sample],
        mismatch: "SamplerMismatch | None",
        check: Check,
        log: "UpdateLog",
    ) -> bool:
        """One optimizer step on this rank's part of a minibatch, unless `check` says to skip it;
        False if no rank has a gradient."""
        informative = self.informative(minibatch)
        totals, num_informative = self.measure_size(minibatch, informative)
        if not num_informative:
            return False
        part = UpdateLog()
        for batch in self.batches(informative):
            if batch is None:
                self.run_dummy_pass()
                continue
            with self.kernels(), self.replaying(batch), self.counting(batch, num_informative):
                sums = self.backward(batch, totals, mismatch)
            part.add_sums(sums if self.speaks_for_team else {})
        part.add_step(self.clip_gradient(), informative if self.speaks_for_team else [])
        skipped = check({**(mismatch.metrics() if mismatch else {}), **part.metrics()})
        if skipped:
            log.num_skipped += 1
        else:
            self.apply_gradient()
            log.add(part)
            self.utilization.add(informative if self.speaks_for_team else [])
        self.close_gradient(applied=not skipped)
        return True

    def measure_size(
        self, minibatch: list[Sample], informative: list[Sample]
    ) -> tuple[Totals, int]:
        """Sizes of the whole minibatch, and how many of its samples have a gradient: over all
        ranks."""
        if not self.speaks_for_team:
            minibatch, informative = [], []
        sizes = distributed.sum_counts(
            {
                "completions": len(minibatch),
                "tokens": sum(s.rollout.num_tokens for s in minibatch),
                "informative": len(informative),
            }
        )
        totals = Totals(
            num_completions=sizes["completions"],
            num_tokens=sizes["tokens"],
            max_completion_length=self.settings.max_completion_length,
        )
        return totals, sizes["informative"]

    def plan_minibatches(self, samples: list[Sample], step: int) -> list[list[int]]:
        """Sample numbers of each optimizer step: every pass has its own order, cut into
        `steps_per_generation` minibatches.

        Numbers count through all ranks' samples, so the number of ranks does not change a
        minibatch.
        """
        plan, count = [], sum(distributed.gather(len(samples)))
        for number in range(self.num_passes):
            order = list(range(count))
            random.Random(f"{self.seed}/minibatches/{step}/{number}").shuffle(order)
            parts = self.settings.steps_per_generation
            plan += [order[part::parts] for part in range(parts)]
        return plan

    def share_out(self, samples: list[Sample], minibatches: list[list[int]]) -> dict[int, Sample]:
        """This rank's samples by number, balanced: the same number of tokens on each rank in the
        first pass's minibatches, about the same in later ones."""
        first = sum(distributed.gather(len(samples))[: distributed.rank()])
        numbered = dict(enumerate(samples, first))
        costs = {n: s.num_tokens * self.is_informative(s) for n, s in numbered.items()}
        return share_out(numbered, costs, minibatches, self.settings.sequence_parallel)

    def share_in_team(self, samples: list[Sample]) -> list[Sample]:
        """Samples of each rank's own, as a team computes them: all of its ranks the same."""
        if self.settings.sequence_parallel == 1:
            return samples
        numbers = range(sum(distributed.gather(len(samples))))
        return [*self.share_out(samples, [[*numbers]]).values()]

    @torch.no_grad()
    def evaluate(self, samples: list[Sample]) -> "SamplerMismatch":
        """Compare the policy with the sampler, and `remember` its log-probs."""
        mismatch = SamplerMismatch()
        with self.kernels():
            for batch in self.batches(samples):
                if batch is None:
                    self.run_dummy_pass()
                    continue
                with self.replaying(batch):
                    now = self.measure(batch)
                mismatch.add(batch, now)
                self.remember(batch, now)
        return mismatch

    def computing_as_sampler(self) -> contextlib.AbstractContextManager[None]:
        """Within it the policy rounds what the sampler's was rounded, no more."""
        return computing_as_sampler(self.model, weights=self.settings.samples_in_fp8)

    def copy_weights(self) -> dict[str, Tensor]:
        """This rank's part of the policy, in CPU memory."""
        return {
            name: tensor.to("cpu", copy=True) for name, tensor in take_weights(self.policy).items()
        }

    def evaluate_with(self, weights: dict[str, Tensor], samples: list[Sample]) -> "SamplerMismatch":
        """`evaluate` with other weights of the policy, from `copy_weights`."""
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


class SamplerMismatch:
    """Difference of sampler and trainer on the same tokens, and the policy's entropy."""

    def __init__(self) -> None:
        self._diff_sum = self._diff_max = self._entropy_sum = 0.0
        self._kl_sum = self._ratio_sum = self._square_sum = 0.0
        self._num_tokens = 0

    def add(self, batch: PackedBatch, now: LogProbs) -> None:
        diff_C = (now.logprobs_C.detach() - batch.sampler_logprobs_C).abs()
        self._diff_sum += float(diff_C.sum(dtype=torch.float64))
        # Not max(): a NaN must stay one.
        self._diff_max = float(torch.maximum(diff_C.max(), diff_C.new_tensor(self._diff_max)))
        self._entropy_sum += float(now.entropy_C.sum(dtype=torch.float64))
        log_ratio_C = (now.logprobs_C.detach() - batch.sampler_logprobs_C).double()
        ratio_C = log_ratio_C.exp()
        self._kl_sum += float((ratio_C - 1 - log_ratio_C).sum())
        self._ratio_sum += float(ratio_C.sum())
        self._square_sum += float(ratio_C.square().sum())
        self._num_tokens += len(diff_C)

    def metrics(self) -> dict[str, float]:
        """Over all ranks, which must all call it; empty if there was nothing to compare.

        `kl`: KL(sampler || trainer) per token by Schulman's k3 estimator. `ess`: effective sample
        size of the tokens' importance weights, as a share of the tokens (Kong 1992)."""
        sums = (self._kl_sum, self._ratio_sum, self._square_sum)
        own = (self._diff_sum, self._diff_max, self._entropy_sum, *sums, self._num_tokens)
        diff_sums, diff_maxima, entropy_sums, kls, ratios, squares, counts = zip(
            *distributed.gather(own)
        )
        num_tokens = sum(counts)
        if not num_tokens:
            return {}
        mean_ratio = sum(ratios) / num_tokens
        return {
            "sampler/logprob_diff_mean": sum(diff_sums) / num_tokens,
            "sampler/logprob_diff_max": float(torch.tensor(diff_maxima).amax()),
            "sampler/kl": sum(kls) / num_tokens,
            "sampler/ess": mean_ratio * mean_ratio / (sum(squares) / num_tokens or math.nan),
            "entropy": sum(entropy_sums) / num_tokens,
        }


class UpdateLog:
    """Sums over a batch's optimizer steps."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._grad_norm_sum = 0.0
        self._num_steps = self._num_tokens = self._num_model_tokens = self.num_skipped = 0

    def add_sums(self, sums: dict[str, float]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def add_step(self, grad_norm: float, samples: list[Sample]) -> None:
        self._grad_norm_sum += grad_norm
        self._num_steps += 1
        self._num_tokens += sum(s.rollout.num_tokens for s in samples)
        self._num_model_tokens += sum(s.num_tokens for s in samples)

    def add(self, other: "UpdateLog") -> None:
        self.add_sums(other._sums)
        self._grad_norm_sum += other._grad_norm_sum
        self._num_steps += other._num_steps
        self._num_tokens += other._num_tokens
        self._num_model_tokens += other._num_model_tokens

    def metrics(self) -> dict[str, float]:
        """Means over completion tokens, of loss and gradient norm over optimizer steps; and the
        number of prompt and completion tokens trained on. A sum over some of the tokens has their
        number beside it, named `COUNT` + its own name. Over all ranks, which must all call it."""
        own = (self._num_tokens, self._num_model_tokens, self._grad_norm_sum)
        counts, model_counts, grad_norm_sums = zip(*distributed.gather(own))
        num_tokens, num_model_tokens = sum(counts), sum(model_counts)
        sums = distributed.sum_counts(self._sums)
        counts_by_name = {"loss": self._num_steps}
        for name in [name for name in sums if name.startswith(COUNT)]:
            counts_by_name[name.removeprefix(COUNT)] = int(sums.pop(name))
        metrics = {
            name: value / max(1, counts_by_name.get(name, num_tokens))
            for name, value in sums.items()
        }
        if self._num_steps:
            metrics["grad_norm"] = grad_norm_sums[0] / self._num_steps
        return {**metrics, "tokens_trained": num_model_tokens}
