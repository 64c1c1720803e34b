"""The GRPO stage: reinforcement learning on the policy's own samples.

Run it with `r1pipe grpo configs/demo.yaml`. The algorithm is in rl/loop.py.
"""

from pathlib import Path
from typing import Any

from r1pipe.config.rl import Grpo
from r1pipe.context import StageContext
from r1pipe.envs.driver import choose_source
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.difficulty import measure_difficulty
from r1pipe.rl.grpo_collect import GrpoCollector
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.loop import BestMetric, run_steps
from r1pipe.rl.replay import replay_steps
from r1pipe.rollout.reward_workers import open_scorer
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.policy import Policy

BEST = BestMetric("reward")


def run(stage: Grpo, context: StageContext) -> dict[str, Any]:
    """Train the policy; write its checkpoint, metrics.jsonl and rollouts."""
    environment = stage.environment
    scorer = open_scorer(stage, context.recipe.sampler)
    problems = context.load_training_problems(stage)
    checkpoint = context.checkpoint(stage.from_)
    sleep = context.recipe.sleep_level(stage, context.device.type)
    sampler = context.engines.open(
        checkpoint, with_routes=stage.routing_replay, sleep=sleep, adapter=stage.adapter
    )
    source = choose_source(sampler, environment, problems)
    if source is sampler:
        sampler.encode(problems, stage.max_completion_length)
    difficulty_log = measure_difficulty(stage, context, problems, lambda: source)
    rates = difficulty_log.measured_rates if difficulty_log else None
    prompts = Prompts(problems, context.recipe.seed, stage.difficulty, rates)
    collector = GrpoCollector(stage, source, scorer, prompts, difficulty_log)
    sampler.sleep()
    return run_steps(stage, context, make_updater(stage, context), collector, BEST)


def replay(stage: Grpo, context: StageContext, source: Path, steps: range) -> dict[str, Any]:
    """See `replay_steps`."""
    return replay_steps(stage, context, make_updater(stage, context), BEST, source, steps)


def make_updater(stage: Grpo, context: StageContext) -> GrpoUpdater:
    checkpoint = context.checkpoint(stage.from_)
    source = (checkpoint, context.device, context.recipe.attn_implementation, Policy)
    dtype, groups = context.recipe.dtype, stage.parallel
    adapter = context.new_adapter(stage.adapter)
    policy = load_sharded(*source, dtype=dtype, adapter=adapter, **groups)
    reference = policy if stage.beta else None
    if stage.keeps_reference:
        reference = load_sharded(*source, dtype=dtype, trained=False, **groups)
    return GrpoUpdater(
        policy,
        reference,
        stage,
        dtype=dtype,
        seed=context.recipe.seed,
    )
