"""Supervised training on traces: the cold start and the students.

The loss is the mean negative log-likelihood of the completions' tokens, over all rows and ranks of
an optimizer step. Rows are packed like GRPO's samples: no padding, attention within each.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1pipe.config.sft import Supervised
from r1pipe.context import StageContext
from r1pipe.models.adapter import describe
from r1pipe.models.tokenizer import (
    list_ids,
)
from r1pipe.runs.logs import read_metrics
from r1pipe.sft.encode import Trace, encode_traces
from r1pipe.trainer.breaker import EventLog, stop_unless_finite
from r1pipe.trainer.checkpoints import Checkpoints
from r1pipe.trainer.packed import PackedTrainer, as_policy, sum_second
from r1pipe.trainer.packing import PackedBatch, assign
from r1pipe.trainer.policy import Policy
from r1pipe.types import Problem
from r1pipe.utils import distributed
from r1pipe.utils.phases import phase
from r1pipe.utils.progress import Interrupt


class SupervisedTrainer(PackedTrainer):
    """Trains a policy on traces, one optimizer step per step."""

    def __init__(
        self, policy: Policy | PreTrainedModel, settings: Supervised, *, num_steps: int, dtype: str
    ):
        super().__init__(
            policy,
            settings,
            num_optimizer_steps=num_steps,
            num_warmup_steps=settings.warmup_steps,
            dtype=dtype,
        )
        self.num_tokens = 0
        """Prompt and completion tokens since the stage began."""
        self.model.train()

    @phase("update")
    def take_step(self, traces: list[Trace], step: int, label: str, events: EventLog) -> dict:
        """One optimizer step on these rows, shared out among the ranks. Returns its metrics.

        Raises Tripped if the gradient is not finite.
        """
        started = time.perf_counter()
        size = self.settings.sequence_parallel
        lengths = [trace.num_tokens for trace in traces]
        shares = assign(range(len(traces)), lengths, distributed.world_size() // size)
        team = distributed.rank() // size
        own = [traces[n].make_sample() for n, other in shares.items() if other == team]
        num_targets = sum(trace.num_targets for trace in traces)
        sums = {"loss": 0.0, "entropy": 0.0}
        for batch in self.batches(own):
            if batch is None:
                self.run_dummy_pass()
                continue
            with self.kernels(), self.counting(batch, len(traces)):
                means = self.backward(batch, num_targets)
            if self.speaks_for_team:
                sums = {name: sums.get(name, 0.0) + value for name, value in means.items()}
        grad_norm = self.clip_gradient()
        stop_unless_finite(label, step, grad_norm, events)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.apply_gradient()
        self.close_gradient(applied=True)
        self.utilization.add(own if self.speaks_for_team else [])
        self.wait_for_device()
        seconds = time.perf_counter() - started
        num_tokens = sum(trace.num_tokens for trace in traces)
        self.num_tokens += num_tokens
        return {
            **distributed.sum_counts(sums),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": self.num_tokens,
            "tokens_trained": num_tokens,
            "seconds/step": seconds,
            **self.utilization.take(seconds),
            **self.model_metrics(),
        }

    def backward(self, batch: PackedBatch, num_targets: int) -> dict[str, float]:
        """Add the batch's gradient. Returns its share of the step's means over tokens."""
        now = self.policy(batch, 1.0)
        loss = -now.logprobs_C.sum() / num_targets
        (loss + self.mtp_loss(now, num_targets)).backward()
        sums = {"entropy": float(now.entropy_C.sum()), **sum_second(now)}
        means = {name: value / num_targets for name, value in sums.items()}
        return {"loss": float(loss.detach()), **means}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.num_tokens = state["num_tokens"]


def draw_batches(num_rows: int, batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """Row numbers of each step's batch, from step `start` (0 is the first). Each epoch has its own
    order; a batch may reach into the next epoch."""
    epoch, order = -1, []
    for position in itertools.count(start * batch_size, batch_size):
        numbers = []
        for place in range(position, position + batch_size):
            if place // num_rows != epoch:
                epoch = place // num_rows
                order = random.Random(f"{seed}/traces/{epoch}").sample(range(num_rows), num_rows)
            numbers.append(order[place % num_rows])
        yield numbers


def train_on_traces(
    policy: Policy | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: Supervised,
    context: StageContext,
    label: str,
) -> dict[str, float]:
    """Train `policy` in place on the problems' solutions. Returns facts for stage.json."""
    policy = as_policy(policy)
    end_ids = list_ids(policy.model.generation_config)
    traces = encode_traces(problems, tokenizer, settings.max_length, end_ids)
    rows, batch_size = traces.rows, settings.batch_size
    num_steps = settings.max_steps or math.ceil(settings.num_train_epochs * len(rows) / batch_size)
    trainer = SupervisedTrainer(policy, settings, num_steps=num_steps, dtype=context.recipe.dtype)
    log, events = context.open_log(), EventLog(context.folder)
    checkpoints = Checkpoints(
        context.shared_folder,
        settings,
        label,
        parts={"trainer": trainer},
        logs={"metrics": log, "events": events},
    )
    with (
        Interrupt.deferred(settings.save_grace_s),
        context.open_progress(label, num_steps) as progress,
    ):
        done = checkpoints.restore_last_good()
        progress.start_at(done)
        batches = draw_batches(len(rows), batch_size, context.recipe.seed, done)
        for step in range(done + 1, num_steps + 1):
            metrics = trainer.take_step([rows[n] for n in next(batches)], step, label, events)
            log.write({"step": step, "epoch": step * batch_size / len(rows), **metrics})
            progress.advance(**{name: metrics[name] for name in ("loss", "mfu") if name in metrics})
            checkpoints.end_step(step)
    trainer.model.eval()
    return {
        "train_rows": len(rows),
        "rows_too_long": traces.num_too_long,
        "optimizer_steps": num_steps,
        "train_loss": fmean(row["loss"] for row in read_metrics(context.shared_folder)),
        **describe(policy.model),
        **checkpoints.facts(),
    }
