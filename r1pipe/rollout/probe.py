"""Does a reloaded engine compute what transformers computes? A few tokens' log-probabilities."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from r1pipe.config.adapter import Adapter
from r1pipe.config.base import Sampling
from r1pipe.models.adapter import add_adapter, initialize, save_adapter
from r1pipe.models.model import fast_training_kernels, load_model
from r1pipe.models.weights import list_weights
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import cover_engines
from r1pipe.rollout.vllm_args import available_memory
from r1pipe.types import Problem, Rollout
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError

PROBE_PROBLEMS = [
    Problem(str(n), "", [{"role": "user", "content": text}])
    for n, text in enumerate(
        ("What is 3 + 4?", "Count to 5.", "Why is the sky blue?", "x + 2 = 9. x = ?")
    )
]
PROBE_TOKENS = 16
PROBE_STD = 0.02
"""Of the numbers in an adapter's B, which are zero before it has learnt anything."""
PROBE_LIMITS = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean |log-probability difference| above which a reload counts as failed. In bf16 two correct
engines differ by about 1e-2; the wrong ones seen so far by 0.2 to 5.6."""


def probe_adapter(sampler: Sampler, checkpoint: str, settings: Adapter) -> float | None:
    """`probe` with an adapter that is not zero. Raises what vLLM raises for one that it does not
    take."""

    def adapt(model: PreTrainedModel) -> None:
        add_adapter(model, settings)
        initialize(model, seed=0, std_b=PROBE_STD)

    with TemporaryDirectory() as folder:
        model = load_model(checkpoint, torch.device("cpu"), dtype=getattr(torch, sampler.dtype))
        adapt(model)
        save_adapter(model, Path(folder))
        del model
        sampler.load_adapter(folder)
        try:
            return probe(sampler, checkpoint, adapt)
        finally:
            sampler.lora = None


def probe(
    sampler: Sampler, checkpoint: str, adapt: Callable[[PreTrainedModel], None] | None = None
) -> float | None:
    """Mean |log-probability in vLLM - in transformers| of a few tokens from every engine;
    None if transformers cannot load the checkpoint or memory does not suffice."""
    length = min(PROBE_TOKENS, sampler.max_model_len // 2)
    try:
        sampling = Sampling(max_completion_length=length)
        asked = cover_engines(PROBE_PROBLEMS, sampler.num_engines)
        seed_parts = ("probe", distributed.rank() // sampler.num_ranks)
        own = sampler.generate(asked, 1, sampling, seed_parts)
    except UserError:  # a context too short for these prompts
        own = []
    by_rank = distributed.gather_to_first(own)
    count = sampler.num_engines
    by_engine = [part[place::count] for part in by_rank for place in range(count) if part]
    settings = (sampler.dtype, sampler.device, adapt)
    return distributed.on_first_rank(lambda: measure_difference(checkpoint, by_engine, *settings))


@torch.no_grad()
def measure_difference(
    checkpoint: str,
    by_engine: list[list[Rollout]],
    dtype: str,
    device: torch.device,
    adapt: Callable[[PreTrainedModel], None] | None = None,
) -> float | None:
    """Mean |sampler - transformers| log-probability of the engine that is furthest off."""
    size = sum(file.stat().st_size for file in list_weights(Path(checkpoint)))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.5 * size:
        device = torch.device("cpu")
    if not by_engine or (device.type == "cpu" and available_memory() < 2 * size):
        return None
    try:
        model = load_model(checkpoint, device, dtype=getattr(torch, dtype)).eval()
    except UserError:
        return None
    if adapt:
        adapt(model)
        model.to(getattr(torch, dtype))

    def compare(rollout: Rollout) -> torch.Tensor:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=device)
        logits_NV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logprobs_N = logits_NV.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        sampled_C = torch.tensor(rollout.logprobs, device=device)
        return (logprobs_N[-len(sampled_C) :] - sampled_C).abs()

    with fast_training_kernels(device, dtype):
        return max(float(torch.cat([*map(compare, own)]).mean()) for own in by_engine)
