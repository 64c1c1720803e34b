"""Updates in two processes, with samples balanced by tokens and without.

    .venv/bin/python benchmarks/balance.py

Each group of 8 samples has lengths around its own mean; means differ 10 times between the 10th and
the 90th percentile. On CPU, with gloo. Both ways alternate; prints medians over steps and their
ratio. One thread per process: needs as many free cores.
"""

import argparse
import os
import random
import socket
import statistics
import time

import torch
from torch.multiprocessing import start_processes

from r1pipe.config.rl import Grpo
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.pipeline import silence_libraries
from r1pipe.rl import update
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.trainer.fsdp import shard
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout
from r1pipe.utils import distributed

CPU = torch.device("cpu")
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
}
SAMPLES = 8
"""Of a prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="the first is not counted")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a completion")
    options = parser.parse_args()
    silence_libraries()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start_processes(be_rank, (port, options), options.processes, start_method="fork")


def be_rank(rank: int, port: int, options: argparse.Namespace) -> None:
    place = {"RANK": rank, "WORLD_SIZE": options.processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        measure(options.steps, options.prompts, options.longest)


def measure(num_steps: int, num_prompts: int, longest: int) -> None:
    tokenizer = build_tokenizer(["1 + 1 = 2"], 300)
    model = build_model(MODEL, tokenizer, seed=0)
    policy = shard(Policy(model), model, CPU, dtype="float32")
    settings = Grpo.model_validate(
        {
            "kind": "grpo",
            "from": "random weights",
            "data": {"recipe": "arithmetic"},
            "rewards": [{"function": "rewards.math_correct"}],
            "max_steps": num_steps,
            "prompts_per_step": num_prompts,
            "num_generations": SAMPLES,
            "max_completion_length": longest,
        }
    )
    updater = GrpoUpdater(policy, None, settings, dtype="float32", seed=0)
    ways = {
        "as sampled": lambda samples, costs, minibatches, team_size: samples,
        "by tokens": update.share_out,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    uneven: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(1, num_steps + 1):
        for way, share_out in ways.items():
            update.share_out = share_out
            samples = make_samples(step, num_prompts, longest)
            plan = updater.plan_minibatches(samples, step)
            shares = updater.share_out(samples, plan).values()
            loads = distributed.gather(sum(sample.num_tokens for sample in shares))
            started = time.perf_counter()
            updater.step(samples, step, lambda metrics: None)
            distributed.barrier()
            if step > 1:
                seconds[way].append(time.perf_counter() - started)
                uneven[way].append(max(loads) / statistics.mean(loads))
    if distributed.is_first():
        print("| samples | most tokens of a rank / mean, median | step, s, median | ratio |")
        print("|---|---|---|---|")
        first = statistics.median(seconds["as sampled"])
        for way in ways:
            median = statistics.median(seconds[way])
            ratio = f"{first / median:.2f}"
            print(f"| {way} | {statistics.median(uneven[way]):.2f} | {median:.2f} | {ratio} |")


def make_samples(step: int, num_prompts: int, longest: int) -> list[Sample]:
    """This rank's groups."""
    rng = random.Random(step)
    samples = []
    for _ in range(num_prompts):
        # 10 times (2.3 nats) between percentiles 2.56 standard deviations apart.
        typical = rng.gauss(4.6, 0.85)
        for _ in range(SAMPLES):
            length = max(8, min(longest, round(2.718 ** rng.gauss(typical, 0.3))))
            ids = [rng.randrange(8, 300) for _ in range(length + 16)]
            rollout = Rollout("", 0, ids[:16], ids[16:], [-6.0] * length, "", "stop")
            samples.append(Sample(rollout, rng.choice([-1.0, 1.0])))
    part = distributed.cut(num_prompts, distributed.rank(), distributed.world_size())
    return samples[part.start * SAMPLES : part.stop * SAMPLES]


if __name__ == "__main__":
    main()
