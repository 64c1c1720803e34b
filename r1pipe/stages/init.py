"""The init stage: a policy from random weights and a tokenizer built for the data.

Run it with `r1pipe init configs/demo.yaml`.
"""

from typing import Any

from r1pipe.config.base import Init
from r1pipe.context import StageContext
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.utils.progress import log_line


def run(stage: Init, context: StageContext) -> dict[str, Any]:
    """Write a checkpoint with random weights."""
    problems = [p for source in stage.tokenizer.data for p in context.load_problems(source)]
    texts = (f"{p.question}\n{p.trace_text}" for p in problems)
    calls_tools = any(p.tools for p in problems)
    tokenizer = build_tokenizer(texts, stage.tokenizer.vocab_size, calls_tools=calls_tools)
    model = build_model(stage.model, tokenizer, context.recipe.seed)
    save_checkpoint(model, tokenizer, context.folder)
    num_parameters = sum(p.numel() for p in model.parameters())
    log_line(f"{stage.name}: {type(model).__name__}, {num_parameters:,} parameters")
    return {"num_parameters": num_parameters, "vocab_size": len(tokenizer)}
