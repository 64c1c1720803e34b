"""DeepSeek Sparse Attention: memory and time against length, and what the phases of training do.

    .venv/bin/python benchmarks/sparse_attention.py
    .venv/bin/python benchmarks/sparse_attention.py --longest 0 --learn 500

First table: forward and backward of one layer's attention over one sequence, between projections;
dense by torch's SDPA, sparse by `models/sparse_attention.py`, its indexer (forward) apart. CPU time
of one thread, each in a process of its own; memory is the peak above what it began with. The
exponents are of a line through the points of 2,048 tokens and more, on logarithmic axes.

Second table: the demo's policy as a deepseek_v32 on the demo's sums, 16 rows a step, steps of
`--learn`: the model with dense attention; its indexer alone; both with the selected tokens.
"""

import argparse
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.config.base import Init, ProblemSet
from r1pipe.config.load import load_recipe
from r1pipe.config.sft import Supervised
from r1pipe.data.problems import load_problems
from r1pipe.models import sparse_attention
from r1pipe.models.model import build_model, fast_training_kernels
from r1pipe.models.sparse_attention import Index, attend_sequence, find_attentions
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.sft.encode import Trace, encode_traces
from r1pipe.sft.trainer import SupervisedTrainer, draw_batches
from r1pipe.trainer.attention import compute_attention
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.packing import cut_batches, pack
from r1pipe.trainer.policy import Policy

CPU = torch.device("cpu")
HEADS, HEAD, ROTARY, LATENT = 4, 32, 16, 32
"""Queries and keys have HEAD + ROTARY numbers, values HEAD."""
INDEX_HEADS, INDEX_HEAD = 2, 16
SHORTEST, FITTED = 1024, 2048
TOPK = 16
"""Of the second table; sequences have up to 80 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=32768, help="0: no first table")
    parser.add_argument("--dense", type=int, default=8192, help="longest; GiB go by its square")
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--learn", type=int, default=0, help="steps of each phase")
    options = parser.parse_args()
    torch.set_num_threads(1)  # also before the fork: OpenMP's threads would not be there after it
    if options.longest:
        measure_lengths(options.longest, options.dense, options.topk)
    if options.learn:
        with fast_training_kernels(CPU, "float32"):
            measure_phases(options.learn)


# --- Lengths ------------------------------------------------------------------------------------


def measure_lengths(longest: int, longest_dense: int, topk: int) -> None:
    lengths = [SHORTEST * 2**n for n in range(int(math.log2(longest / SHORTEST)) + 1)]
    print(
        f"{HEADS} heads of {HEAD} + {ROTARY}, latent {LATENT}, indexer {INDEX_HEADS} x "
        f"{INDEX_HEAD}, top-{topk}; float32, one thread"
    )
    print("| tokens | dense, s | dense, MiB | sparse, s | its indexer, s | sparse, MiB |")
    print("|---|---|---|---|---|---|")
    points: list[list[tuple[int, float]]] = [[] for _ in range(5)]
    for length in lengths:
        sparse = run_apart(time_sparse, length, topk)
        row = [None, None, sparse[0] - sparse[1], *sparse[1:]]
        if length <= longest_dense:
            row[0], _, row[1] = run_apart(time_dense, length)
        cells = ["" if value is None else f"{value:.3g}" for value in row]
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)
        for column, value in zip(points, row):
            if value is not None and length >= min(FITTED, lengths[-2]):
                column.append((length, value))
    print(f"| exponent | {' | '.join(f'{fit(column):.2f}' for column in points)} |")


def fit(points: list[tuple[int, float]]) -> float:
    """The exponent of a power of the length."""
    logs = [[math.log(max(value, 1e-9)) for value in row] for row in zip(*points)]
    return statistics.linear_regression(*logs).slope


def run_apart(measure: Callable, *arguments: int) -> tuple[float, float, float]:
    """Seconds, those of the indexer, and the peak of memory in MiB, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_measure, args=(sender, measure, *arguments))
    process.start()
    try:
        return receiver.recv()
    finally:
        process.join()


def send_measure(sender: Connection, measure: Callable, *arguments: int) -> None:
    measure(256, *arguments[1:])  # what only the first call costs
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds, of_indexer = measure(*arguments)
    sender.send((seconds, of_indexer, read_memory("VmHWM") - before))


def read_memory(name: str) -> float:
    """MiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def time_dense(length: int) -> tuple[float, float]:
    shapes = [(1, HEADS, length, size) for size in (HEAD + ROTARY, HEAD + ROTARY, HEAD)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    started = time.process_time()
    compute_attention("sdpa", *states, [length]).square().sum().backward()
    return time.process_time() - started, 0.0


def time_sparse(length: int, topk: int) -> tuple[float, float]:
    query_LHS = torch.randn(length, HEADS, LATENT + ROTARY) / (LATENT + ROTARY)
    key_LS = torch.randn(length, LATENT + ROTARY)
    own = Index(
        torch.randn(length, INDEX_HEADS, INDEX_HEAD),
        torch.randn(length, INDEX_HEADS),
        torch.randn(length, INDEX_HEAD),
    )
    seconds = 0.0
    select_keys = sparse_attention.select_keys

    def timed(*arguments: object) -> Tensor:
        nonlocal seconds
        started = time.process_time()
        places = select_keys(*arguments)
        seconds += time.process_time() - started
        return places

    states = [state.requires_grad_() for state in (query_LHS, key_LS)]
    with patch.object(sparse_attention, "select_keys", timed):
        started = time.process_time()
        output, _ = attend_sequence(*states, own, min(topk, length), LATENT, learns=False)
        output.square().sum().backward()
        return time.process_time() - started, seconds


# --- Phases -------------------------------------------------------------------------------------


def measure_phases(num_steps: int) -> None:
    stage = load_recipe("configs/demo.yaml").stages[0]
    assert isinstance(stage, Init)
    problems = load_problems(ProblemSet(recipe="arithmetic", options={"size": 4000}))
    heldout = load_problems(ProblemSet(recipe="arithmetic", split="test", options={"size": 200}))
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 512)
    own = {"index_topk": TOPK, "index_n_heads": 4, "index_head_dim": 32, "q_lora_rank": 64}
    settings = {k: v for k, v in stage.model.items() if k != "num_mtp_layers"}
    model = build_model({**settings, "model_type": "deepseek_v32", **own}, tokenizer, seed=0)
    rows, others = (encode_traces(some, tokenizer, None).rows for some in (problems, heldout))
    lengths = [row.num_tokens for row in others]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, top-{TOPK} of "
        f"{min(lengths)} to {max(lengths)} tokens (mean {statistics.mean(lengths):.0f}), "
        f"{num_steps} steps a phase"
    )
    print("| after | attention | held-out loss, nats a token | indexer/kl | indexer/coverage | s |")
    print("|---|---|---|---|---|---|")
    model.config.index_topk = 10**6
    metrics = train(model, rows, None, num_steps, 3e-3)
    show("dense training", "dense", model, others, metrics)
    model.config.index_topk = TOPK
    show("dense training", "sparse, random indexer", model, others, {})
    metrics = train(model, rows, {"phase": "warmup", "learning_rate": 3e-3}, num_steps)
    show("warm-up of the indexer", "sparse", model, others, metrics)
    metrics = train(model, rows, {"phase": "sparse"}, num_steps, 1e-3)
    show("sparse training", "sparse", model, others, metrics)


def train(
    model: PreTrainedModel,
    rows: list[Trace],
    indexer: dict | None,
    num_steps: int,
    rate: float | None = None,
) -> dict[str, float]:
    values = {"max_steps": num_steps, "adam_beta2": 0.99, "indexer": indexer}
    values |= {"learning_rate": rate, "warmup_steps": num_steps // 20} if rate else {}
    values |= {} if rate else {"bias_update_rate": 1e-3}
    settings = Supervised.model_validate(values)
    trainer = SupervisedTrainer(model, settings, num_steps=num_steps, dtype="float32")
    started, metrics = time.process_time(), {}
    batches = draw_batches(len(rows), 16, 0, 0)
    with TemporaryDirectory() as folder:
        events = EventLog(Path(folder))
        for step in range(num_steps):
            metrics = trainer.take_step([rows[n] for n in next(batches)], step, "sft", events)
    model.requires_grad_(True).eval()
    for module in find_attentions(model):
        module.indexer_training = None
    return {**metrics, "seconds": time.process_time() - started}


def show(
    after: str, attention: str, model: PreTrainedModel, rows: list[Trace], metrics: dict
) -> None:
    loss = measure_loss(model, rows)
    more = [f"{metrics[name]:.3g}" if name in metrics else "" for name in COLUMNS]
    print(f"| {after} | {attention} | {loss:.4f} | {' | '.join(more)} |", flush=True)


COLUMNS = ("indexer/kl", "indexer/coverage", "seconds")


@torch.no_grad()
def measure_loss(model: PreTrainedModel, rows: list[Trace]) -> float:
    """Mean negative log-likelihood of the completions' tokens."""
    policy, total, count = Policy(model), 0.0, 0
    for part in cut_batches([row.make_sample() for row in rows], 2048):
        logprobs_C = policy(pack(part, CPU), 1.0).logprobs_C
        total -= float(logprobs_C.sum())
        count += len(logprobs_C)
    return total / count


if __name__ == "__main__":
    main()
