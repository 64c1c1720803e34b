"""Checks with models of real sizes, from random weights: memory, speed, TRL beside it."""

import dataclasses
import random
import statistics
import time
from typing import Any

import torch
from common.card import PARITY, Card, held_gib
from common.checks import Check, free_memory
from common.trl_steps import run_trl
from common.workload import (
    MADE_UP_IDS,
    describe_step,
    load_rows,
    load_updater,
    make_rollout,
    peak_gib,
    run_ours,
    synchronize,
    time_update,
)

from r1pipe.models.flops import peak_flops, train_flops
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.loop import draw_samples, measure_mismatch
from r1pipe.trainer.fsdp import shard
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout

PRIME_RL = {"RL": (16_450, 0.153), "SFT": (25_486, 0.237)}
"""Tokens a second and MFU of Qwen3-0.6B on one H100, full fine-tuning, sequences of 16k tokens, all
activations recomputed: PrimeIntellect-ai/prime-rl, benchmarks/baselines, January 2026. That is 9.2
GFLOP a token: it counts FLOPs as `train_flops` does."""
PROMPT_TOKENS = 64


def check_sleep(card: Card, check: Check) -> None:
    """Sample, sleep, update, wake with the new weights, compare; at both levels."""
    work, updater = card.dense, card.updater
    sampler = card.engines(work.engine, work.dtype).open(work.folder, sleep=1)
    sampling = {"max_completion_length": min(16, work.max_completion_length)}
    sampling = work.stage.sampling.model_copy(update=sampling)
    problems, rollouts = load_rows()[:8], make_sequences([card.sizes.row_tokens // 4])
    held: list[float] = []
    for level in (1, 2):
        sampler.sleep_level, asleep, diffs, seconds = level, [], [], []
        for number in range(card.sizes.sleep_rounds):
            sampler.sleep()
            free_memory()
            asleep.append(held_gib(card.device))
            time_update(updater, rollouts, number)
            started = time.perf_counter()
            sampler.load_weights(export_weights(updater.model))
            synchronize()
            seconds.append(time.perf_counter() - started)
            samples = draw_samples(work.stage, sampler, problems, sampling, ("check", number))
            held.append(held_gib(card.device))
            diffs.append(measure_mismatch(updater, samples))
        rounds = f"level {level}, {len(diffs)} rounds"
        if card.on_gpu:
            check.add(f"{rounds}: card, while sampling", max(held[-len(asleep) :]), "GiB")
            check.add(f"{rounds}: card, the engine asleep", max(asleep), "GiB")
        goal = PARITY[work.dtype]
        check.add(f"{rounds}: mean abs dlogp after waking, largest", max(diffs), at_most=goal)
        check.add(f"{rounds}: waking with new weights", statistics.median(seconds), "s")
    if not card.on_gpu:
        check.add("memory", "sleeping frees nothing on a CPU")
        return
    grown = 1024 * (held[-1] - held[1])
    check.add(f"memory that {len(held)} rounds have added to the second", grown, "MiB", at_most=64)


def check_dense(card: Card, check: Check) -> None:
    """The update alone, and whole GRPO steps."""
    work, sizes = card.dense, card.sizes
    card.make_room()
    updater = card.updater
    parameters = sum(p.numel() for p in updater.model.parameters())
    check.add("parameters", parameters / 1e6, "M")
    whole = [sizes.row_tokens] * sizes.rows
    rng = random.Random(0)
    mixed = [
        rng.randint(sizes.row_tokens // 16, sizes.row_tokens // 4) for _ in range(6 * sizes.rows)
    ]
    long, short = f"sequences of {sizes.row_tokens:,} tokens", "shorter sequences, packed"
    measure_update(card, check, updater, long, whole)
    for kind, (speed, mfu) in PRIME_RL.items():
        check.add(f"  prime-rl's published {kind} row (H100)", f"{speed:,} tokens/s, MFU {mfu:.1%}")
    measure_update(card, check, updater, short, mixed)
    del updater
    card.free(engines=False)

    steps = card.kept["ours"] = run_ours(work, card.engines(work.engine, work.dtype))[1:]
    size = f"{work.num_samples} sequences of at most {work.max_completion_length} tokens"
    check.add(f"whole GRPO step, {size}", median(steps, "seconds/step"), "s")
    check.add("sampled a second of sampling", median(steps, "tokens_per_s/sample"), "tokens")
    check.add("trained a second of updating", median(steps, "tokens_per_s/update"), "tokens")
    if "mfu" in steps[0]:
        check.add("MFU of updating", 100 * median(steps, "mfu"), "%")
    limit = 0.3 if card.on_gpu else None
    check.add("weight sync", median(steps, "seconds/sync"), "s", at_most=limit)


def measure_update(
    card: Card,
    check: Check,
    updater: GrpoUpdater,
    what: str,
    lengths: list[int],
) -> None:
    """Rows for optimizer steps on sequences of these lengths, the first of three not counted."""
    rollouts = make_sequences(lengths)
    other = held_by_others(updater)
    times = [time_update(updater, rollouts, step)["update"] for step in range(3)]
    seconds = statistics.median(times[1:])
    goal = PRIME_RL["RL"][0] if card.on_gpu and not is_mixture(updater) else None
    check.add(f"update, {what}", sum(lengths) / seconds, "tokens/s", at_least=goal)
    num_logits = sum(len(rollout.completion_ids) for rollout in rollouts)
    flops = train_flops(updater.model.config, lengths, num_logits)
    peak = peak_flops(card.device, updater.dtype)
    if peak is None:
        check.add(f"  MFU, {what}", "no peak known: not a GPU, or not one in models/flops.py")
    else:
        goal = None if is_mixture(updater) else 40
        check.add(f"  MFU, {what}", 100 * flops / seconds / peak, "%", at_least=goal)
    check.add(f"  peak memory, {what}", peak_gib() - other, "GiB")


def held_by_others(updater: GrpoUpdater) -> float:
    """GiB that torch has allocated for others, on a GPU: an engine that sleeps counts there. Begins
    a new peak."""
    if updater.model.device.type == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    parameters = list(updater.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    moments = [t for state in updater.optimizer.state.values() for t in state.values()]
    own = sum(tensor.nbytes for tensor in (*parameters, *gradients, *moments))
    return (torch.cuda.memory_allocated() - own) / 2**30


def is_mixture(updater: GrpoUpdater) -> bool:
    return "moe" in updater.model.config.model_type


def make_sequences(lengths: list[int]) -> list[Rollout]:
    rng = random.Random(0)
    rollouts = []
    for length in lengths:
        ids = [rng.randrange(*MADE_UP_IDS) for _ in range(length)]
        cut = min(PROMPT_TOKENS, length // 2)
        rollouts.append(make_rollout(ids[:cut], ids[cut:]))
    return rollouts


def check_beside_trl(card: Card, check: Check) -> None:
    """The same model, problems and batch in TRL's GRPOTrainer, its vLLM colocated."""
    work = card.dense
    if "ours" not in card.kept:
        card.kept["ours"] = run_ours(work, card.engines(work.engine, work.dtype))[1:]
    ours = [describe_step(row) for row in card.kept["ours"]]
    card.free()
    theirs = run_trl(work)[1:]
    goal = 1.5 if card.on_gpu else None
    step, their_step = median(ours, "step"), median(theirs, "step")
    check.add("TRL: whole step", their_step, "s")
    check.add("r1pipe: whole step", step, "s")
    check.add("whole step, TRL's time / r1pipe's", their_step / step, at_least=goal)
    for phase, tokens in (("update", "tokens_trained"), ("sample", "tokens_sampled")):
        own, other = (
            statistics.median(row[tokens] / row[phase] for row in rows) for rows in (ours, theirs)
        )
        check.add(f"{phase}: TRL", other, "tokens/s")
        check.add(f"{phase}: r1pipe", own, "tokens/s")
        check.add(f"{phase}: r1pipe's tokens/s / TRL's", own / other)


def check_mixture(card: Card, check: Check) -> None:
    """Experts by grouped products and one by one. No optimizer step: AdamW's moments would fill
    most of a card of 80 GiB."""
    card.free()
    sizes = card.sizes
    work = dataclasses.replace(card.dense, micro_batch_tokens=sizes.mixture_row_tokens)
    tokenizer = build_tokenizer(["0 1 2 3 4 5 6 7 8 9"], 300)
    with card.device:
        model = build_model({**sizes.mixture, "pad_token_id": 0}, tokenizer, seed=0)
    root = shard(Policy(model), model, card.device, dtype=card.low_dtype)
    updater = GrpoUpdater(root, None, work.stage, dtype=card.low_dtype, seed=0)
    updater.apply_gradient = lambda: None
    count = sum(p.numel() for p in model.parameters())
    check.add("parameters", count / 1e9, "B")
    lengths = [sizes.mixture_row_tokens // 4] * 4 * sizes.rows
    for experts in ("grouped_mm", "eager"):
        model.set_experts_implementation(experts)
        measure_update(card, check, updater, f"experts {experts}", lengths)


def check_fp8(card: Card, check: Check) -> None:
    """Rollouts in vLLM's FP8 beside those in bf16, and updates in it; on a CPU with rounded weights
    beside float32. Distances are from a trainer that rounds nothing."""
    work, updater = card.dense, card.updater
    problems = load_rows()[: work.prompts]
    for in_fp8 in (False, True):
        quantization = "fp8_per_block" if in_fp8 and card.on_gpu else None
        settings = work.engine.model_copy(update={"quantization": quantization})
        sampler = card.engines(settings, work.dtype).open(work.folder)
        emulated = in_fp8 and not card.on_gpu
        sampler.load_weights(export_weights(updater.model, fp8=emulated))
        speeds = []
        for number in range(3):
            started = time.perf_counter()
            rollouts = sampler.generate(problems, work.generations, work.stage.sampling, (number,))
            seconds = time.perf_counter() - started
            speeds.append(sum(rollout.num_tokens for rollout in rollouts) / seconds)
        found = updater.evaluate([Sample(rollout, 0.0) for rollout in rollouts]).metrics()
        name = ("FP8, emulated" if emulated else "FP8") if in_fp8 else work.dtype
        check.add(f"{name}: sampled", statistics.median(speeds[1:]), "tokens/s")
        goal = None if in_fp8 else PARITY[work.dtype]
        check.add(f"{name}: mean abs dlogp", found["sampler/logprob_diff_mean"], at_most=goal)
        check.add(f"{name}: KL (k3)", found["sampler/kl"])
        check.add(f"{name}: effective sample size", found["sampler/ess"])
    del updater, sampler
    card.free()
    whole = [card.sizes.row_tokens] * card.sizes.rows
    measure_update(card, check, load_updater(work), work.dtype, whole)
    free_memory()
    updater = load_updater(dataclasses.replace(work, fp8="update"))
    measure_update(card, check, updater, name, whole)


def median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)
