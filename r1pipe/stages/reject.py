"""The reject stage: traces for a later sft stage, sampled from a policy or a teacher.

Run it with `r1pipe reject configs/r1.yaml`.
"""

import random
from collections.abc import Callable
from typing import Any

from r1pipe.config.traces import Mix, Reject
from r1pipe.context import StageContext
from r1pipe.envs.driver import choose_source
from r1pipe.rollout.sampling import SampleSource, identify_weights
from r1pipe.rollout.teacher import TeacherClient
from r1pipe.sft.rejection import collect_traces
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_jsonl
from r1pipe.utils.progress import log_line


def run(stage: Reject, context: StageContext) -> dict[str, Any]:
    """Write traces.jsonl: problems with a kept sample as solution, and the rows mixed in."""
    problems = context.load_training_problems(stage)
    origin, open_source = find_source(stage, context, problems)
    traces, facts = collect_traces(context, origin, open_source, problems, stage.traces, stage.name)
    if not traces:
        raise UserError(f'stage "{stage.name}": no sample was kept; look at the rewards')
    if stage.mix is not None:
        mixed_in = draw_mix(stage.mix, len(traces), context)
        facts["mixed_in"] = len(mixed_in)
        traces += mixed_in
    write_jsonl(context.folder / "traces.jsonl", traces)
    return facts


def find_source(
    stage: Reject, context: StageContext, problems: list[Problem]
) -> tuple[object, Callable[[], SampleSource]]:
    """The source's identity, for the sample journal, and a function that opens it."""
    if stage.teacher is not None:
        teacher = TeacherClient(stage.teacher)
        return stage.teacher.model_dump(
            include={"base_url", "model", "extra_body"}
        ), lambda: teacher
    checkpoint = context.checkpoint(stage.from_)

    def open_source() -> SampleSource:
        sampler = context.engines.open(checkpoint)
        return choose_source(sampler, stage.traces.environment, problems)

    return identify_weights(checkpoint, context.recipe.dtype), open_source


def draw_mix(mix: Mix, num_traces: int, context: StageContext) -> list[Problem]:
    """Rows that make up `share` of the result: 200k of R1's 800k are not reasoning."""
    rows = context.load_problems(mix.data)
    for row in rows:
        if not row.solution:
            raise UserError(f'mix: row "{row.id}" ({row.source}) has no "solution" to train on')
    wanted = round(num_traces * mix.share / (1 - mix.share))
    count = min(wanted, len(rows))
    short = f", of {wanted} wanted" if count < wanted else ""
    log_line(f"{context.stage_name}: {count} rows of {mix.data.label} mixed in{short}")
    return random.Random(f"{context.recipe.seed}/{context.stage_name}/mix").sample(rows, count)
