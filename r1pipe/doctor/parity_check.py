"""The parity check: sampler and trainer give the same log-probs. Starts an engine."""

from collections.abc import Iterator

from r1pipe.config.base import Stage
from r1pipe.config.rl import OnPolicy
from r1pipe.doctor.golds import spread
from r1pipe.doctor.inputs import Inputs
from r1pipe.doctor.machine import Diagnosis
from r1pipe.envs.driver import choose_source
from r1pipe.models.adapter import NewAdapter
from r1pipe.models.model import pick_device
from r1pipe.rl.loop import draw_samples, measure_mismatch
from r1pipe.rl.update import Updater
from r1pipe.rollout.engines import Engines
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.policy import Policy

NUM_PROMPTS, NUM_TOKENS = 8, 16


def examine_parity(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    """The breaker's `logprob_diff` of a stage that trains on its samples, measured on a few tokens
    of the checkpoint that it starts from."""
    if not isinstance(stage, OnPolicy):
        return
    recipe = inputs.recipe
    place = inputs.find_checkpoint(stage.policy)
    if place is None:
        yield Diagnosis("", "skipped", f'"{stage.policy}" is not here yet')
        return
    problems = [problem for _, some in inputs.load_problems(stage) for problem in some]
    if not problems:
        yield Diagnosis("", "skipped", "its data is not here")
        return
    device = pick_device(recipe.device)
    engines = Engines.of(recipe, device)
    try:
        sampler = engines.open(place, with_routes=stage.routing_replay)
        length = min(NUM_TOKENS, stage.max_completion_length)
        sampling = stage.sampling.model_copy(update={"max_completion_length": length})
        some = spread(problems, NUM_PROMPTS)
        seed_parts = (recipe.seed, stage.name, "doctor")
        source = choose_source(sampler, stage.environment, some)
        samples = draw_samples(stage, source, some, sampling, seed_parts)
        engines.close()  # a GPU may not hold both
        origin = (place, device, recipe.attn_implementation, Policy)
        adapter = stage.adapter and NewAdapter(stage.adapter, recipe.seed)
        model = load_sharded(*origin, dtype=recipe.dtype, adapter=adapter)
        # In full precision: the engine has the checkpoint's own weights.
        plain = stage.model_copy(update={"fp8": None})
        updater = Updater(model, plain, dtype=recipe.dtype, seed=recipe.seed)
        diff = measure_mismatch(updater, samples, sampler.num_engines)
    finally:
        engines.close()
    if diff is None:
        yield Diagnosis("", "FAIL", f"environment {stage.environment.name}: no episode could begin")
        return
    line = f"sampler = trainer on {len(some)} x {length} tokens: mean |dlogp| {diff:.1e}"
    gate = stage.breaker.logprob_diff
    if diff <= gate.limit:
        yield Diagnosis("", "ok", line)
    else:
        what = f"{line} > breaker.logprob_diff.limit {gate.limit:.0e}"
        yield Diagnosis("", "warn" if gate.action == "warn" else "FAIL", what)
