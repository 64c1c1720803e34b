"""The GRPO stage: reinforcement learning on the policy's own samples.

Run it with `r1pipe grpo configs/demo.yaml`. The algorithm is in loop.py.
"""

from pathlib import Path
from typing import Any

from r1pipe.config.rl import Grpo
from r1pipe.context import StageContext
from r1pipe.rl.collect import Collector
from r1pipe.rl.difficulty import FILE as DIFFICULTY
from r1pipe.rl.difficulty import measure_difficulty
from r1pipe.rl.loop import BestMetric, run_steps
from r1pipe.rl.replay import replay_steps
from r1pipe.rl.update import Updater
from r1pipe.rollout.scoring import Scorer, mean
from r1pipe.runs.logs import JsonlLog
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.policy import Policy

BEST = BestMetric("reward")


def run(stage: Grpo, context: StageContext) -> dict[str, Any]:
    """Train the policy; write its checkpoint, metrics.jsonl and rollouts."""
    scorer = Scorer(stage.rewards)
    problems = context.load_training_problems(stage)
    checkpoint = context.checkpoint(stage.from_)
    sampler = context.engines.open(checkpoint, with_routes=stage.routing_replay)
    sampler.encode(problems, stage.max_completion_length)

    updater = make_updater(stage, context)
    rates, measured = measure_difficulty(stage, context, problems, stage.sampling, lambda: sampler)
    collector = Collector(stage, sampler, scorer, problems, context.recipe.seed, rates)
    halves = (updater, sampler, collector)
    if not stage.difficulty:
        return run_steps(stage, context, *halves, BEST)
    log = JsonlLog(context.folder / DIFFICULTY)

    def end_step(step: int) -> dict[str, float]:
        return refresh_difficulty(collector, step, log) if is_refresh_step(stage, step) else {}

    return run_steps(
        stage,
        context,
        *halves,
        BEST,
        logs={"difficulty": log},
        begin=lambda: log.write(*measured),
        end_step=end_step,
    )


def is_refresh_step(stage: Grpo, step: int) -> bool:
    every = stage.difficulty.refresh_steps
    return bool(every) and step % every == 0 and step < stage.max_steps


def refresh_difficulty(collector: Collector, step: int, log: JsonlLog) -> dict[str, float]:
    """Choose the next prompts by what the policy can do now. Nothing is being sampled meanwhile."""
    rates = collector.refresh_difficulty(step)
    log.write(*({"problem_id": i, "step": step, "pass_rate": rate} for i, rate in rates.items()))
    known = [rate for rate in rates.values() if rate is not None]
    return {
        "difficulty/prompts": collector.prompts.num_chosen,
        "difficulty/mean_pass_rate": mean(known),
    }


def replay(stage: Grpo, context: StageContext, source: Path, steps: range) -> dict[str, Any]:
    """Train on kept rollouts, as `loop.replay_steps` says."""
    return replay_steps(stage, context, make_updater(stage, context), BEST, source, steps)


def make_updater(stage: Grpo, context: StageContext) -> Updater:
    checkpoint = context.checkpoint(stage.from_)
    source = (checkpoint, context.device, context.recipe.attn_implementation, Policy)
    dtype = context.recipe.dtype
    return Updater(
        load_sharded(*source, dtype=dtype),
        load_sharded(*source, dtype=dtype, trained=False) if stage.beta else None,
        stage,
        dtype=dtype,
        seed=context.recipe.seed,
    )
