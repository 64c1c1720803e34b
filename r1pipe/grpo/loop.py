"""The GRPO stage: roll out -> score -> advantage -> update -> sync.

Run it with `r1pipe grpo configs/demo.yaml`.
"""

import copy
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from r1pipe.config import Grpo, Sampling
from r1pipe.errors import UserError
from r1pipe.grpo.advantage import compute_advantages, share_of_silent_groups
from r1pipe.grpo.packing import Sample
from r1pipe.grpo.update import Updater
from r1pipe.models import export_weights, load_model, save_checkpoint
from r1pipe.progress import StageProgress, say
from r1pipe.records import Problem, Rollout, Score, describe_rollout, dump_row
from r1pipe.rollout import Sampler
from r1pipe.runs import MetricsLog
from r1pipe.scoring import Scorer, mean, reward_metrics
from r1pipe.stage import StageContext


def run(stage: Grpo, context: StageContext) -> dict[str, Any]:
    """Train the policy; write its checkpoint, metrics.jsonl and rollouts.jsonl."""
    scorer = Scorer(stage.rewards)
    problems = context.training_problems(stage)
    checkpoint = context.checkpoint(stage.from_)
    sampler = context.engines.open(checkpoint)
    sampler.encode(problems, stage.max_completion_length)

    model = load_model(checkpoint, context.device, context.recipe.attn_implementation)
    updater = Updater(
        model,
        copy.deepcopy(model).requires_grad_(False) if stage.beta else None,
        stage,
        dtype=context.recipe.dtype,
        seed=context.recipe.seed,
    )
    log = MetricsLog(context.folder)
    with (
        (context.folder / "rollouts.jsonl").open("w", encoding="utf-8") as rollouts_file,
        StageProgress(stage.name, stage.max_steps) as progress,
    ):
        for metrics, records in train(
            stage, updater, sampler, scorer, problems, context.recipe.seed
        ):
            log.write(metrics)
            rollouts_file.writelines(f"{dump_row(record)}\n" for record in records)
            progress.advance(
                reward=metrics["reward"],
                length=metrics["completions/mean_length"],
                dlogp=metrics["sampler/logprob_diff_mean"],
            )
    final = check_last_sync(stage, updater, sampler, problems, context.recipe.seed)
    save_checkpoint(model, sampler.tokenizer, context.folder)
    return {"train_rows": len(problems), "optimizer_steps": stage.max_steps, **final}


def train(
    stage: Grpo,
    updater: Updater,
    sampler: Sampler,
    scorer: Scorer,
    problems: list[Problem],
    seed: int,
) -> Iterator[tuple[dict[str, Any], list[dict]]]:
    """The algorithm. Yields each step's metrics and rollout records, its weights synced."""
    prompts = draw_prompts(problems, seed)
    for step in range(1, stage.max_steps + 1):
        clock = Clock()
        group = [next(prompts) for _ in range(stage.prompts_per_step)]
        rollouts = sampler.generate(
            group, stage.num_generations, stage_sampling(stage), (seed, stage.name, step)
        )
        clock.lap("sample")

        owners = [problem for problem in group for _ in range(stage.num_generations)]
        scores = scorer.score(owners, rollouts)
        rewards_NG = rewards_by_group(scores, stage.num_generations)
        advantages_NG = compute_advantages(rewards_NG, stage.scale_rewards)
        clock.lap("score")

        samples = [
            Sample(rollout, advantage)
            for rollout, advantage in zip(rollouts, advantages_NG.flatten().tolist(), strict=True)
        ]
        metrics = {"step": step, **reward_metrics(scores)}
        stop_if_unjudged(stage, metrics, step)
        metrics |= updater.step(samples, step, partial(stop_if_apart, stage, step))
        if stage.reference_refresh_steps and step % stage.reference_refresh_steps == 0:
            updater.refresh_reference()
        clock.lap("update")

        sampler.load_weights(export_weights(updater.model))
        clock.lap("sync")
        metrics |= {
            "groups_without_spread": share_of_silent_groups(rewards_NG),
            **measure_lengths(rollouts),
            **clock.metrics(rollouts),
        }
        yield metrics, list_records(step, owners, rollouts, scores, samples)


def draw_prompts(problems: list[Problem], seed: int) -> Iterator[Problem]:
    """Endless epochs, each in an order of its own that depends on the seed only."""
    epoch = 0
    while True:
        order = list(problems)
        random.Random(f"{seed}/prompts/{epoch}").shuffle(order)
        yield from order
        epoch += 1


def rewards_by_group(scores: list[Score], num_generations: int) -> torch.Tensor:
    """Totals as `[N, G]`, NaN where no reward could judge."""
    totals = [float("nan") if score.total is None else score.total for score in scores]
    return torch.tensor(totals).view(-1, num_generations)


def stage_sampling(stage: Grpo) -> Sampling:
    return Sampling(
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
        max_completion_length=stage.max_completion_length,
    )


def stop_if_apart(stage: Grpo, step: int, metrics: dict[str, float]) -> None:
    """Raises UserError, before the update, when sampler and trainer disagree."""
    diff = metrics["sampler/logprob_diff_mean"]
    if not diff <= stage.max_logprob_diff:
        raise UserError(
            f"{stage.name}, step {step}: sampler and trainer disagree: mean |log-prob difference| "
            f"{diff:.2e} > max_logprob_diff {stage.max_logprob_diff:.0e} (in float32 an error of "
            "the weight sync or of the model's code in vLLM; in bf16 raise the limit)"
        )


def stop_if_unjudged(stage: Grpo, metrics: dict[str, float], step: int) -> None:
    """Raises UserError when the rewards cannot judge too many of the rollouts."""
    if metrics["reward_unjudged"] > stage.max_unjudged_share:
        raise UserError(
            f"{stage.name}, step {step}: the rewards could not judge "
            f"{metrics['reward_unjudged']:.0%} of the rollouts (max_unjudged_share "
            f"{stage.max_unjudged_share:.0%}); look at the problems' answers"
        )


def check_last_sync(
    stage: Grpo, updater: Updater, sampler: Sampler, problems: list[Problem], seed: int
) -> dict[str, float]:
    """Compare sampler and trainer once more, on the weights of the last sync."""
    group = problems[: stage.prompts_per_step]
    rollouts = sampler.generate(group, 1, stage_sampling(stage), (seed, stage.name, "last"))
    metrics = updater.evaluate([Sample(rollout, 0.0) for rollout in rollouts]).metrics()
    stop_if_apart(stage, stage.max_steps, metrics)
    diff = metrics["sampler/logprob_diff_mean"]
    say(f"{stage.name}: sampler = trainer after the last sync: mean |dlogp| {diff:.1e}")
    return {"last_sync/logprob_diff_mean": diff}


def measure_lengths(rollouts: list[Rollout]) -> dict[str, float]:
    return {
        "completions/mean_length": mean([len(r.completion_ids) for r in rollouts]),
        "completions/truncated": mean([float(r.truncated) for r in rollouts]),
    }


def list_records(
    step: int,
    problems: list[Problem],
    rollouts: list[Rollout],
    scores: list[Score],
    samples: list[Sample],
) -> list[dict]:
    """A step's lines of rollouts.jsonl."""
    return [
        {"step": step, **described, "advantage": round(sample.advantage, 4)}
        for described, sample in zip(
            map(describe_rollout, problems, rollouts, scores), samples, strict=True
        )
    ]


class Clock:
    """Wall time of a step's phases."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    def metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Seconds per phase; tokens per second: sampled ones, and prompt + completion trained."""
        sampled = sum(len(r.completion_ids) for r in rollouts)
        trained = sampled + sum(len(r.prompt_ids) for r in rollouts)
        return {
            **{f"seconds/{phase}": value for phase, value in self.seconds.items()},
            "tokens_per_s/sample": sampled / self.seconds["sample"],
            "tokens_per_s/update": trained / self.seconds["update"],
        }
