"""On-policy distillation: a student learns from its teacher on its own samples. Run it with:

    r1pipe on_policy_distill configs/on_policy.yaml

The student samples with vLLM, the teacher (of several: the problem's own) reads every sample, and
at each token the student's distribution is pulled to the teacher's: GKD with lambda = 1, by the
reverse KL unless `beta` says otherwise (papers and equation: trainer/divergence.py).

TRL's DistillationTrainer (1.16) has the same loss, but pads, takes vocabularies of equal size for
equal, and has no bit-equal resume, comparison of sampler and trainer, or routing replay.
"""

from pathlib import Path
from typing import Any

from r1pipe.config.rl import OnPolicyDistill
from r1pipe.context import StageContext
from r1pipe.envs.driver import choose_source
from r1pipe.models.tokenizer import (
    check_length,
    join_end_ids,
    read_end_ids,
    require_same_vocabulary,
)
from r1pipe.rl.collect import Collector
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel, route_problems
from r1pipe.rl.loop import BestMetric, run_steps
from r1pipe.rl.replay import replay_steps
from r1pipe.rollout.reward_workers import open_scorer
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.policy import Policy
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

BEST = BestMetric("divergence", is_cost=True)


def run(stage: OnPolicyDistill, context: StageContext) -> dict[str, Any]:
    """Train the student; write its checkpoint, metrics.jsonl and rollouts."""
    environment = stage.environment
    scorer = open_scorer(stage, context.recipe.sampler)
    problems = context.load_training_problems(stage)
    route_problems(stage, problems)  # before an engine starts
    check_vocabularies(stage, context)
    sleep = context.recipe.sleep_level(stage, context.device.type)
    sampler = context.engines.open(
        context.checkpoint(stage.student),
        with_routes=stage.routing_replay,
        sleep=sleep,
        adapter=stage.adapter,
    )
    source = choose_source(sampler, environment, problems)
    prompts = sampler.encode(problems, stage.max_completion_length) if source is sampler else []

    sampler.sleep()
    updater = make_updater(stage, context, problems)
    context_size = min(
        teacher.model.config.get_text_config().max_position_embeddings
        for teacher in updater.teachers.values()
    )
    for problem, ids in zip(problems, prompts):
        check_length(problem, len(ids), stage.max_completion_length, context_size)
    if environment and context_size < sampler.max_model_len:
        raise UserError(
            f'stage "{stage.name}": an episode may be as long as the engine\'s context, '
            f"{sampler.max_model_len}, and a teacher reads {context_size} tokens: set "
            "engine.max_model_len to that"
        )
    collector = Collector(stage, source, scorer, Prompts(problems, context.recipe.seed))
    return run_steps(stage, context, updater, collector, BEST)


def replay(
    stage: OnPolicyDistill, context: StageContext, source: Path, steps: range
) -> dict[str, Any]:
    """See `replay_steps`."""
    check_vocabularies(stage, context)
    # The rollouts do not say who taught them.
    problems = context.load_training_problems(stage) if stage.teachers else []
    updater = make_updater(stage, context, problems)
    return replay_steps(stage, context, updater, BEST, source, steps)


def check_vocabularies(stage: OnPolicyDistill, context: StageContext) -> None:
    for name in stage.taught_by:
        places = context.checkpoint(name), context.checkpoint(stage.student)
        tokenizers = [context.tokenizer(place) for place in places]
        end_ids = [
            join_end_ids(tokenizer, read_end_ids(place))
            for tokenizer, place in zip(tokenizers, places)
        ]
        require_same_vocabulary(stage, name, *tokenizers, *end_ids)


def make_updater(
    stage: OnPolicyDistill, context: StageContext, problems: list[Problem]
) -> DistillUpdater:
    place = (context.device, context.recipe.attn_implementation)
    dtype = context.recipe.dtype
    adapter = context.new_adapter(stage.adapter)
    source = (context.checkpoint(stage.student), *place, Policy)
    student = load_sharded(*source, dtype=dtype, adapter=adapter, **stage.parallel)
    models = {
        name: load_sharded(
            context.checkpoint(name), *place, TeacherModel, dtype=dtype, trained=False
        )
        for name in stage.taught_by
    }
    return DistillUpdater(
        student,
        {value: models[name] for value, name in (stage.teachers or {"": stage.from_}).items()},
        stage,
        dtype=dtype,
        seed=context.recipe.seed,
        routes=route_problems(stage, problems),
    )
