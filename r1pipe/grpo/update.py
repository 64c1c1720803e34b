"""The trainer's half of a step: log-probabilities of rollouts, and the policy's update."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_scheduler

from r1pipe.config import Grpo
from r1pipe.grpo.losses import LossInputs, Totals, compute_loss
from r1pipe.models import fast_training_kernels
from r1pipe.records import Rollout

LENGTH_BUCKET = 8
"""Padded lengths are multiples of this, so that few matrix shapes occur."""


@dataclass
class Sample:
    """A rollout on its way through the trainer. Log-probs are of its completion's tokens, `[T]`."""

    rollout: Rollout
    advantage: float
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts padded to one length, prompts and completions flush left.

    Column t of a `_BT` tensor predicts token `start + t` of the sequence: `[B, T]` covers every
    completion of the batch, and `mask_BT` is 1 where a row has a completion token there.
    """

    ids_BL: Tensor
    attention_mask_BL: Tensor
    mask_BT: Tensor
    start: int
    samples: list[Sample]

    def spread(self, values: list[Tensor]) -> Tensor:
        """Per-completion rows `[len]` laid out as `[B, T]`, zeros elsewhere."""
        out_BT = torch.zeros_like(self.mask_BT)
        for row, (sample, value) in enumerate(zip(self.samples, values, strict=True)):
            begin = len(sample.rollout.prompt_ids) - self.start
            out_BT[row, begin : begin + len(value)] = value.to(out_BT.device)
        return out_BT

    def gather(self, values_BT: Tensor) -> list[Tensor]:
        """The inverse of `spread`, on the CPU."""
        rows = []
        for row, sample in enumerate(self.samples):
            begin = len(sample.rollout.prompt_ids) - self.start
            rows.append(values_BT[row, begin : begin + len(sample.rollout.completion_ids)].cpu())
        return rows


def make_micro_batches(
    samples: list[Sample], token_budget: int, pad_token_id: int, device: torch.device
) -> list[MicroBatch]:
    """Cut samples, similar lengths together, so that no batch has more padded tokens than the
    budget (one sample may)."""
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: s.num_tokens, reverse=True):
        # Sorted by falling length: the batch's first sample is its longest.
        if batches and (len(batches[-1]) + 1) * padded_length(batches[-1][0]) <= token_budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return [pad_batch(batch, pad_token_id, device) for batch in batches]


def padded_length(sample: Sample) -> int:
    return -(-sample.num_tokens // LENGTH_BUCKET) * LENGTH_BUCKET


def pad_batch(samples: list[Sample], pad_token_id: int, device: torch.device) -> MicroBatch:
    length = max(padded_length(sample) for sample in samples)
    start = min(len(sample.rollout.prompt_ids) for sample in samples)
    ids_BL = torch.full((len(samples), length), pad_token_id)
    attention_mask_BL = torch.zeros(len(samples), length, dtype=torch.long)
    mask_BL = torch.zeros(len(samples), length)
    for row, sample in enumerate(samples):
        prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
        end = len(prompt) + len(completion)
        ids_BL[row, :end] = torch.tensor(prompt + completion)
        attention_mask_BL[row, :end] = 1
        mask_BL[row, len(prompt) : end] = 1
    return MicroBatch(
        ids_BL.to(device),
        attention_mask_BL.to(device),
        mask_BL[:, start:].to(device),
        start,
        samples,
    )


def compute_logprobs(
    model: PreTrainedModel, batch: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the batch's completion tokens at the sampling temperature, and the
    entropy (nats, no gradient) of the distributions that they come from; both `[B, T]`.

    Logits are computed from `start - 1` on only: prompts need none.
    """
    num_columns = batch.mask_BT.shape[1]
    logits_BTV = model(
        input_ids=batch.ids_BL,
        attention_mask=batch.attention_mask_BL,
        logits_to_keep=num_columns + 1,
        use_cache=False,
    ).logits[:, :-1]
    logits_BTV = logits_BTV.float() / temperature
    all_logprobs_BTV = logits_BTV.log_softmax(-1)
    targets_BT1 = batch.ids_BL[:, batch.start :].unsqueeze(-1)
    logprobs_BT = all_logprobs_BTV.gather(-1, targets_BT1).squeeze(-1)
    with torch.no_grad():
        entropy_BT = -(all_logprobs_BTV.exp() * all_logprobs_BTV).sum(-1)
    return logprobs_BT, entropy_BT


class Updater:
    """Owns the policy's optimizer and, if `beta` asks for it, the reference policy."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        settings: Grpo,
        *,
        dtype: str,
        seed: int,
        pad_token_id: int,
    ):
        self.policy, self.reference, self.settings = policy, reference, settings
        self.dtype, self.seed, self.pad_token_id = dtype, seed, pad_token_id
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        self.scheduler = get_scheduler(
            settings.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=settings.warmup_steps * settings.steps_per_generation,
            num_training_steps=settings.max_steps * settings.steps_per_generation,
        )
        # Without dropout on either side: the sampler has none.
        policy.eval()
        if settings.gradient_checkpointing:
            policy.train()
            policy.gradient_checkpointing_enable()

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        device = self.policy.device
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=self.dtype == "bfloat16", cache_enabled=False
        )
        with fast_training_kernels(device, self.dtype), autocast:
            yield

    def batches(self, samples: list[Sample]) -> list[MicroBatch]:
        return make_micro_batches(
            samples, self.settings.micro_batch_tokens, self.pad_token_id, self.policy.device
        )

    @torch.no_grad()
    def evaluate(self, samples: list[Sample]) -> dict[str, float]:
        """Fill in `old_logprobs` (and `ref_logprobs`), and compare with the sampler's.

        `sampler/logprob_diff_mean` and `_max` are of |sampler - trainer| over all completion
        tokens; `entropy` is the policy's mean, in nats.
        """
        diffs, entropies = [], []
        with self.kernels():
            for batch in self.batches(samples):
                logprobs_BT, entropy_BT = compute_logprobs(
                    self.policy, batch, self.settings.temperature
                )
                for sample, old in zip(batch.samples, batch.gather(logprobs_BT), strict=True):
                    sample.old_logprobs = old
                    diffs.append((old - torch.tensor(sample.rollout.logprobs)).abs())
                entropies.extend(batch.gather(entropy_BT))
                if self.reference is not None:
                    ref_BT, _ = compute_logprobs(self.reference, batch, self.settings.temperature)
                    for sample, ref in zip(batch.samples, batch.gather(ref_BT), strict=True):
                        sample.ref_logprobs = ref
        all_diffs = torch.cat(diffs)
        return {
            "sampler/logprob_diff_mean": float(all_diffs.mean()),
            "sampler/logprob_diff_max": float(all_diffs.max()),
            "entropy": float(torch.cat(entropies).mean()),
        }

    def update(self, samples: list[Sample], step: int) -> dict[str, float]:
        """`steps_per_generation` optimizer steps over the samples, `evaluate`d before.

        Returns means over the step's tokens and optimizer steps.
        """
        settings = self.settings
        if settings.mask_truncated_completions:
            samples = [sample for sample in samples if not sample.rollout.truncated]
        order = list(samples)
        random.Random(f"{self.seed}/minibatches/{step}").shuffle(order)
        sums: dict[str, float] = {}
        num_tokens = num_steps = 0
        for part in range(settings.steps_per_generation):
            minibatch = order[part :: settings.steps_per_generation]
            # A sample of advantage 0 moves nothing but the normaliser, unless a KL term is asked.
            active = [s for s in minibatch if s.advantage != 0 or settings.beta]
            if not active:
                continue
            totals = Totals(
                num_completions=len(minibatch),
                num_tokens=sum(len(s.rollout.completion_ids) for s in minibatch),
                max_completion_length=settings.max_completion_length,
            )
            for batch in self.batches(active):
                with self.kernels():
                    part_loss = self.backward(batch, totals)
                for name, value in part_loss.items():
                    sums[name] = sums.get(name, 0.0) + value
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + float(
                clip_grad_norm_(self.policy.parameters(), settings.max_grad_norm)
            )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.scheduler.step()
            num_tokens += sum(len(s.rollout.completion_ids) for s in active)
            num_steps += 1
        per_step = ("loss", "grad_norm")
        metrics = {
            name: value / max(1, num_steps if name in per_step else num_tokens)
            for name, value in sums.items()
        }
        return {**metrics, "learning_rate": self.scheduler.get_last_lr()[0]}

    def backward(self, batch: MicroBatch, totals: Totals) -> dict[str, float]:
        logprobs_BT, _ = compute_logprobs(self.policy, batch, self.settings.temperature)
        reference = None
        if self.reference is not None:
            reference = batch.spread([s.ref_logprobs for s in batch.samples])
        inputs = LossInputs(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=batch.spread([s.old_logprobs for s in batch.samples]),
            advantages_B=torch.tensor([s.advantage for s in batch.samples]).to(logprobs_BT),
            mask_BT=batch.mask_BT,
            ref_logprobs_BT=reference,
        )
        settings = self.settings
        loss = compute_loss(
            inputs,
            totals,
            loss_type=settings.loss_type,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            beta=settings.beta,
        )
        loss.loss.backward()
        return {"loss": float(loss.loss.detach()), **loss.sums}

    def refresh_reference(self) -> None:
        """Make the reference, if there is one, the current policy (R1: every 400 updates)."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())
