"""On-policy distillation: a student learns from its teacher on its own samples. Run it with:

    r1pipe on_policy_distill configs/on_policy.yaml

The student samples with vLLM, the teacher reads every sample, and at each token the student's
distribution is pulled to the teacher's: GKD with lambda = 1, by the reverse KL unless `beta` says
otherwise (papers and equation: trainer/divergence.py).

TRL's DistillationTrainer (1.16) has the same loss, but pads, takes vocabularies of equal size for
equal, and has no bit-equal resume, comparison of sampler and trainer, or routing replay.
"""

from pathlib import Path
from typing import Any

from r1pipe.config.rl import OnPolicyDistill
from r1pipe.context import StageContext
from r1pipe.models.tokenizer import (
    check_length,
    join_end_ids,
    read_end_ids,
    require_same_vocabulary,
)
from r1pipe.rl.collect import Collector
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel
from r1pipe.rl.loop import BestMetric, run_steps
from r1pipe.rl.replay import replay_steps
from r1pipe.rollout.scoring import Scorer
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.policy import Policy

BEST = BestMetric("divergence", is_cost=True)


def run(stage: OnPolicyDistill, context: StageContext) -> dict[str, Any]:
    """Train the student; write its checkpoint, metrics.jsonl and rollouts."""
    scorer = Scorer(stage.rewards)
    problems = context.load_training_problems(stage)
    check_vocabularies(stage, context)
    sleep = context.recipe.sleep_level(stage, context.device.type)
    sampler = context.engines.open(
        context.checkpoint(stage.student), with_routes=stage.routing_replay, sleep=sleep
    )
    prompts = sampler.encode(problems, stage.max_completion_length)

    sampler.sleep()
    updater = make_updater(stage, context)
    context_size = updater.teacher.model.config.get_text_config().max_position_embeddings
    for problem, ids in zip(problems, prompts, strict=True):
        check_length(problem, len(ids), stage.max_completion_length, context_size)
    collector = Collector(stage, sampler, scorer, Prompts(problems, context.recipe.seed))
    return run_steps(stage, context, updater, sampler, collector, BEST)


def replay(
    stage: OnPolicyDistill, context: StageContext, source: Path, steps: range
) -> dict[str, Any]:
    """See `replay_steps`."""
    check_vocabularies(stage, context)
    return replay_steps(stage, context, make_updater(stage, context), BEST, source, steps)


def check_vocabularies(stage: OnPolicyDistill, context: StageContext) -> None:
    teacher, student = context.checkpoint(stage.from_), context.checkpoint(stage.student)
    tokenizers = [context.tokenizer(place) for place in (teacher, student)]
    end_ids = [
        join_end_ids(tokenizer, read_end_ids(place))
        for tokenizer, place in zip(tokenizers, (teacher, student))
    ]
    require_same_vocabulary(stage, *tokenizers, *end_ids)


def make_updater(stage: OnPolicyDistill, context: StageContext) -> DistillUpdater:
    place = (context.device, context.recipe.attn_implementation)
    dtype = context.recipe.dtype
    return DistillUpdater(
        load_sharded(context.checkpoint(stage.student), *place, Policy, dtype=dtype),
        load_sharded(
            context.checkpoint(stage.from_), *place, TeacherModel, dtype=dtype, trained=False
        ),
        stage,
        dtype=dtype,
        seed=context.recipe.seed,
    )
