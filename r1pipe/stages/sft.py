"""The sft stage: supervised training on traces, such as a cold start.

Run it with `r1pipe sft configs/demo.yaml`.
"""

from typing import Any

from r1pipe.config.sft import Sft
from r1pipe.context import StageContext
from r1pipe.models.weights import save_checkpoint
from r1pipe.sft.rejection import drop_flawed
from r1pipe.sft.trainer import train_on_traces
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.policy import Policy


def run(stage: Sft, context: StageContext) -> dict[str, Any]:
    """Train the checkpoint of `from` on the problems' solutions."""
    problems = drop_flawed(context.load_training_problems(stage), stage.filters, context)
    checkpoint = context.checkpoint(stage.from_)
    tokenizer = context.tokenizer(checkpoint)
    context.engines.make_room()
    policy = load_sharded(
        checkpoint,
        context.device,
        context.recipe.attn_implementation,
        Policy,
        dtype=context.recipe.dtype,
        adapter=context.new_adapter(stage.train.adapter),
        **stage.train.parallel,
    )
    facts = train_on_traces(policy, tokenizer, problems, stage.train, context, stage.name)
    save_checkpoint(policy.model, tokenizer, context.folder)
    return facts
