"""The reject stage: traces for a later sft stage, sampled from a policy.

Run it with `r1pipe reject configs/r1.yaml`.
"""

from typing import Any

from r1pipe.config import Reject
from r1pipe.errors import UserError
from r1pipe.records import write_jsonl
from r1pipe.rejection import collect_traces
from r1pipe.stage import StageContext


def run(stage: Reject, context: StageContext) -> dict[str, Any]:
    """Write traces.jsonl: problems with an accepted sample as their solution."""
    problems = context.training_problems(stage)
    checkpoint = context.checkpoint(stage.from_)
    traces, facts = collect_traces(context, checkpoint, problems, stage.traces, stage.name)
    if not traces:
        raise UserError(f'stage "{stage.name}": no sample was accepted; look at the rewards')
    write_jsonl(context.folder / "traces.jsonl", traces)
    return facts
