"""GRPO on r1pipe's parts: sample, score, advantages, clipped loss, weight sync. Run it with:

    python examples/minimal_grpo.py             # a tiny model after a short cold start: one minute
    python examples/minimal_grpo.py CHECKPOINT  # a folder or hub id

The cold start teaches two habits, working a problem out and guessing; the reward tells them apart,
and reward and length rise together, as in R1. Left out here and part of `r1pipe grpo`: a KL term,
sampling while training, resume, several processes.
"""

import math
import random
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from r1pipe.config.base import ProblemSet
from r1pipe.config.recipe import Engine
from r1pipe.config.rl import Grpo
from r1pipe.config.sft import Supervised
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model, fast_training_kernels, load_model, pick_device
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.pipeline import silence_libraries
from r1pipe.rl.advantages import compute_advantages
from r1pipe.rl.losses import LossInputs, Totals, compute_loss
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.scoring import Scorer
from r1pipe.sft.encode import encode_traces
from r1pipe.sft.trainer import SupervisedTrainer, draw_batches
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.packing import Sample, cut_batches, pack
from r1pipe.trainer.policy import Policy

DEVICE, DTYPE = pick_device("auto"), "float32"
STORIES = {"min_steps": 1, "max_steps": 2, "max_value": 12}
STAGE = Grpo(
    kind="grpo",
    from_="the cold start",
    data={"recipe": "arithmetic", "options": {**STORIES, "size": 500, "seed": 1}},
    rewards=[{"function": "rewards.math_correct"}],
    max_steps=15,
    prompts_per_step=32,
    num_generations=8,
    steps_per_generation=2,  # in the second optimizer step the ratio is not 1: it may be clipped
    max_completion_length=48,
    learning_rate=5e-4,
)


def train(checkpoint: str) -> None:
    problems = load_problems(STAGE.data[0])
    policy = Policy(load_model(checkpoint, DEVICE))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=STAGE.learning_rate, weight_decay=0.0)
    sampler = Sampler(checkpoint, Engine(max_model_len=256, kv_cache_gib=0.25), DTYPE, DEVICE)
    scorer = Scorer(STAGE.rewards)
    num_parts = STAGE.steps_per_generation
    for step in range(1, STAGE.max_steps + 1):
        rng = random.Random(step)
        prompts = rng.sample(problems, STAGE.prompts_per_step)
        rollouts = sampler.generate(prompts, STAGE.num_generations, STAGE.sampling, (step,))
        owners = [problem for problem in prompts for _ in range(STAGE.num_generations)]
        totals = [score.total for score in scorer.score(owners, rollouts)]
        rewards = [math.nan if total is None else total for total in totals]  # None: not judged
        rewards_NG = torch.tensor(rewards).view(-1, STAGE.num_generations)
        advantages_NG = compute_advantages(rewards_NG, STAGE.scale_rewards)

        samples = list(map(Sample, rollouts, advantages_NG.flatten().tolist()))
        rng.shuffle(samples)
        diffs = [update(policy, optimizer, samples[n::num_parts]) for n in range(num_parts)]
        sampler.load_weights(export_weights(policy.model))

        length = sum(rollout.num_tokens for rollout in rollouts) / len(rollouts)
        reward, diff = rewards_NG.nanmean(), diffs[0]
        print(f"{step=} {reward=:.2f} {length=:.1f} {diff=:.0e}", flush=True)


def update(policy: Policy, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> float:
    """One optimizer step. Returns mean |policy - sampler| log-probability, before it."""
    num_tokens, diff = sum(sample.rollout.num_tokens for sample in samples), 0.0
    totals = Totals(len(samples), num_tokens, STAGE.max_completion_length)
    for part in cut_batches(samples, token_budget=4096):
        batch = pack(part, DEVICE)
        with fast_training_kernels(DEVICE, DTYPE):
            logprobs_C = policy(batch, STAGE.temperature).logprobs_C
            # The sampler is the old policy: trainer and sampler give a token the same probability.
            old_C = batch.sampler_logprobs_C
            inputs = LossInputs(logprobs_C, old_C, old_C, batch.advantages_B, batch.sequence_C)
            compute_loss(inputs, totals, STAGE).loss.backward()
        diff += float((logprobs_C.detach() - old_C).abs().sum()) / num_tokens
    clip_grad_norm_(policy.parameters(), STAGE.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return diff


def cold_start(folder: str) -> str:
    """A small random model, trained on traces of which half guess the answer."""
    options = {**STORIES, "size": 1000, "guess_share": 0.5}
    problems = load_problems(ProblemSet(recipe="arithmetic", options=options))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.06}
    model = build_model({"model_type": "qwen3", **sizes, **heads}, tokenizer, seed=0)
    rates = {"learning_rate": 5e-3, "min_lr": 1.5e-3, "adam_beta2": 0.99}
    settings = Supervised(max_steps=400, per_device_train_batch_size=32, **rates)
    trainer = SupervisedTrainer(model, settings, num_steps=settings.max_steps, dtype=DTYPE)
    traces = encode_traces(problems, tokenizer, max_length=None).rows
    batches = draw_batches(len(traces), settings.batch_size, seed=0, start=0)
    for step, rows in enumerate(islice(batches, settings.max_steps), 1):
        trainer.take_step([traces[n] for n in rows], step, "cold start", EventLog(Path(folder)))
    save_checkpoint(model, tokenizer, folder)
    return folder


if __name__ == "__main__":
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        train(sys.argv[1] if len(sys.argv) > 1 else cold_start(folder))
