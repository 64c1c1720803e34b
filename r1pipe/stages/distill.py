"""The distill stage: the policy's correct samples teach a dense student. Run it with:

    r1pipe distill configs/demo.yaml

As in R1 (Guo et al. 2025, arXiv:2501.12948, section 2.4): supervised training on samples that pass
rejection, no reinforcement learning of the student.
"""

from typing import Any

from r1pipe.config.traces import Distill
from r1pipe.context import StageContext
from r1pipe.envs.driver import choose_source
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import join_end_ids, read_end_ids
from r1pipe.models.weights import save_checkpoint
from r1pipe.rollout.sampling import SampleSource, identify_weights
from r1pipe.sft.rejection import collect_traces
from r1pipe.sft.trainer import train_on_traces
from r1pipe.trainer.attention import find_implementation
from r1pipe.trainer.fsdp import load_sharded, shard
from r1pipe.trainer.policy import Policy
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_jsonl
from r1pipe.utils.progress import log_line


def run(stage: Distill, context: StageContext) -> dict[str, Any]:
    """Sample from the teacher `from`, keep what the rewards accept, train the student on it."""
    problems = context.load_training_problems(stage)
    teacher = context.checkpoint(stage.from_)
    sleep = context.recipe.sleep_level(stage, context.device.type)

    def open_source() -> SampleSource:
        sampler = context.engines.open(teacher, sleep=sleep)
        return choose_source(sampler, stage.traces.environment, problems)

    traces, facts = collect_traces(
        context,
        identify_weights(teacher, context.recipe.dtype),
        open_source,
        problems,
        stage.traces,
        f"{stage.name}: samples",
    )
    traces = context.keep_out_heldout(traces, "traces")
    if not traces:
        raise UserError(f'stage "{stage.name}": no sample of {teacher} was accepted')
    write_jsonl(context.folder / "traces.jsonl", traces)

    context.engines.make_room()
    dtype, groups = context.recipe.dtype, stage.train.parallel
    if isinstance(stage.student, str):
        base = context.checkpoint(stage.student)
        tokenizer = context.tokenizer(base)
        source = (base, context.device, context.recipe.attn_implementation, Policy)
        adapter = context.new_adapter(stage.train.adapter)
        policy = load_sharded(*source, dtype=dtype, adapter=adapter, **groups)
        student = policy.model
    else:
        tokenizer = context.tokenizer(teacher)
        student = build_model(stage.student, tokenizer, context.recipe.seed).to(context.device)
        student.generation_config.eos_token_id = join_end_ids(tokenizer, read_end_ids(teacher))
        how = find_implementation(context.recipe.attn_implementation, context.device, dtype)
        student.set_attn_implementation(how)
        policy = Policy(student)
        shard(policy, student, context.device, dtype=dtype, **groups)
    num_parameters = sum(p.numel() for p in student.parameters())
    architecture = student.config.model_type
    log_line(
        f"{stage.name}: {len(traces)} traces for a {architecture} student of {num_parameters:,}"
    )
    facts |= train_on_traces(
        policy, tokenizer, traces, stage.train, context, f"{stage.name}: student"
    )
    save_checkpoint(student, tokenizer, context.folder)
    return {**facts, "num_parameters": num_parameters}
