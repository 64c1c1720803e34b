"""Forward and backward of the demo's policy on CPU: oneDNN on or off, three ways to run experts.

    make bench

Each round runs all variants on batches of a new shape, as in training, so a drift of the machine's
speed slows all alike. Prints medians and ratios over rounds.
"""

import argparse
import random
import statistics
import time

import torch

from r1pipe.config.base import Init, ProblemSet
from r1pipe.config.load import load_recipe
from r1pipe.data.problems import load_problems
from r1pipe.models import experts
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    stage = load_recipe("configs/demo.yaml").stages[0]
    assert isinstance(stage, Init)
    problems = load_problems(ProblemSet(recipe="arithmetic", options={"size": 500}))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 512)
    model = build_model(stage.model, tokenizer, seed=0)
    ways = (experts.NAME, "eager", "grouped_mm")
    variants = [(way, onednn) for way in ways for onednn in (False, True)]
    seconds: dict[tuple[str, bool], list[float]] = {variant: [] for variant in variants}
    rng = random.Random(0)
    for _ in range(options.rounds):
        ids_BL = torch.randint(len(tokenizer), (BATCH, rng.randint(48, 80)))
        for way, onednn in rng.sample(variants, len(variants)):
            seconds[way, onednn].append(time_step(model, ids_BL, way, onednn) / ids_BL.numel())
    base = seconds[experts.NAME, False]
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds of {BATCH} x 48..80 tokens")
    print("| experts | oneDNN | tokens/s, median | time / first row, median |\n|---|---|---|---|")
    for (way, onednn), values in seconds.items():
        speed = 1 / statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(values, base))
        print(f"| {way} | {'on' if onednn else 'off'} | {speed:,.0f} | {ratio:.2f} |")


def time_step(model: torch.nn.Module, ids_BL: torch.Tensor, way: str, onednn: bool) -> float:
    model.set_experts_implementation(way)
    torch.backends.mkldnn.enabled = onednn
    started = time.perf_counter()
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    logits_BLV.logsumexp(-1).mean().backward()
    elapsed = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return elapsed


if __name__ == "__main__":
    main()
