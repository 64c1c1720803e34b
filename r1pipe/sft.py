"""The cold start: supervised training on written-out reasoning.

Run it with `r1pipe sft configs/demo.yaml`.
"""

from typing import Any

from r1pipe.config import Sft
from r1pipe.grpo.logprobs import Policy
from r1pipe.models import save_checkpoint
from r1pipe.rejection import drop_flawed
from r1pipe.sharding import load_sharded
from r1pipe.stage import StageContext
from r1pipe.supervised import train_on_traces


def run(stage: Sft, context: StageContext) -> dict[str, Any]:
    """Train the checkpoint of `from` on the problems' solutions."""
    problems = drop_flawed(context.training_problems(stage), stage.filters, context)
    checkpoint = context.checkpoint(stage.from_)
    tokenizer = context.tokenizer(checkpoint)
    policy = load_sharded(
        checkpoint,
        context.device,
        context.recipe.attn_implementation,
        Policy,
        dtype=context.recipe.dtype,
    )
    facts = train_on_traces(policy, tokenizer, problems, stage.train, context, stage.name)
    save_checkpoint(policy.model, tokenizer, context.folder)
    return facts
