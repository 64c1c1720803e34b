"""GRPO steps of TRL's GRPOTrainer and of r1pipe, on the same model, problems and batch sizes.

    .venv/bin/python benchmarks/grpo_vs_trl.py                 # sampling and training
    .venv/bin/python benchmarks/grpo_vs_trl.py --update-only   # training alone, also without vLLM

Blocks of steps alternate between the two, each in its own process, so a drift of the machine's
speed slows both; the first step of a block is a warm-up and is not counted. Completion lengths are
geometric, 10 times apart between the 10th and 90th percentile, like a policy's. Both take one
optimizer step per batch, `loss_type` dapo, no KL term.

TRL 1.16 with colocated vLLM does not run on CPU. The smallest repair, made here: its engine gets
r1pipe's arguments (float32, eager, a KV cache that fits), and its weight sync passes
`named_parameters()` to vLLM's layer-wise reload in one call instead of calling `load_weights` per
tensor, which raises there.
"""

import argparse
import contextlib
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from r1pipe.config.base import ProblemSet
from r1pipe.config.recipe import Engine
from r1pipe.config.rl import Grpo
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model, load_model, pick_device
from r1pipe.models.tokenizer import build_tokenizer, load_tokenizer
from r1pipe.models.weights import save_checkpoint as save
from r1pipe.runs.logs import read_metrics
from r1pipe.types import Problem, Rollout

MODELS = {
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    },
}
VOCABULARY = 512
DATA = {"recipe": "arithmetic", "options": {"size": 500}}
MADE_UP_IDS = (10, 250)
MEAN_LENGTH = 80
SIDES = ("r1pipe", "TRL")


def main() -> None:
    options = parse_options()
    if options.side:
        run = {"r1pipe": run_ours, "TRL": run_trl}[options.side]
        print(json.dumps({"steps": run(options)[1:], "peak_gib": peak_gib()}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(options, Path(folder))
        blocks: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(options.blocks):
            # A B, B A, ...: neither always runs second.
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                blocks[side].append(run_block(options, side, folder))
                print(f"block {number + 1} of {options.blocks}: {side} done", file=sys.stderr)
    print_tables(options, blocks)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--update-only", action="store_true", help="made-up rollouts, no vLLM")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a block, the first not counted")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-completion-length", type=int, default=256)
    parser.add_argument("--trl-batch", type=int, default=8, help="completions in a TRL micro-batch")
    parser.add_argument("--micro-batch-tokens", type=int, help="of r1pipe; default: as in a recipe")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_block(options: argparse.Namespace, side: str, folder: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_checkpoint(options: argparse.Namespace, folder: Path) -> None:
    """Random weights whose completions end with probability 1 / MEAN_LENGTH at each token: a common
    direction in all embeddings acts as a bias on the end token's logit."""
    problems = load_rows(options)
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), VOCABULARY)
    model = build_model({**MODELS[options.model], "pad_token_id": 0}, tokenizer, seed=0)
    with torch.no_grad():
        size = model.config.hidden_size
        direction = torch.ones(size) / math.sqrt(size)
        model.get_input_embeddings().weight.add_(4 * direction)
        odds = len(tokenizer) / MEAN_LENGTH
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = (
            math.log(odds) / math.sqrt(size) * direction
        )
    save(model, tokenizer, folder)


def load_rows(options: argparse.Namespace) -> list[Problem]:
    return load_problems(ProblemSet.model_validate(DATA))


def reward_parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Costs nothing, and groups without spread are rare."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_stage(options: argparse.Namespace) -> Grpo:
    return Grpo.model_validate(
        {
            "kind": "grpo",
            "from": options.folder,
            "data": DATA,
            "rewards": [{"function": f"{Path(__file__).stem}.reward_parity"}],
            "max_steps": options.steps,
            "prompts_per_step": options.prompts,
            "num_generations": options.generations,
            "max_completion_length": options.max_completion_length,
            "micro_batch_tokens": options.micro_batch_tokens,
            "loss_type": "dapo",
            "learning_rate": 1e-6,
        }
    )


def engine_settings(options: argparse.Namespace) -> Engine:
    context = options.max_completion_length + 128
    return Engine(max_model_len=context, max_num_seqs=256, kv_cache_gib=1.0)


def make_rollouts(options: argparse.Namespace, step: int) -> list[list[Rollout]]:
    """Groups of made-up rollouts with the lengths of sampled ones."""
    rng = random.Random(step)
    groups = []
    for number in range(options.prompts):
        prompt = [rng.randrange(*MADE_UP_IDS) for _ in range(rng.randint(20, 40))]
        groups.append(
            [
                Rollout(
                    problem_id=str(number),
                    sample=sample,
                    prompt_ids=prompt,
                    completion_ids=[rng.randrange(*MADE_UP_IDS) for _ in range(length)],
                    logprobs=[-math.log(VOCABULARY)] * length,
                    completion="",
                    finish_reason="stop",
                )
                for sample in range(options.generations)
                for length in [draw_length(rng, options.max_completion_length)]
            ]
        )
    return groups


def draw_length(rng: random.Random, limit: int) -> int:
    return max(2, min(limit, math.ceil(rng.expovariate(1 / MEAN_LENGTH))))


# --- r1pipe -------------------------------------------------------------------------------------


def run_ours(options: argparse.Namespace) -> list[dict]:
    """The update alone, or a grpo stage run by its command."""
    if options.update_only:
        from r1pipe.rl.grpo_update import GrpoUpdater

        device = pick_device("auto")
        model = load_model(options.folder, device)
        updater = GrpoUpdater(model, None, make_stage(options), dtype=dtype_name(device), seed=0)
        return [time_update(options, updater, step) for step in range(options.steps)]
    from r1pipe.cli.main import main as r1pipe

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    recipe = {
        "name": "r1pipe",
        "runs_dir": str(folder),
        "dtype": dtype_name(pick_device("auto")),
        "engine": engine_settings(options).model_dump(exclude_unset=True),
        "stages": [make_stage(options).model_dump(by_alias=True, exclude_unset=True)],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with contextlib.redirect_stdout(sys.stderr):
        if code := r1pipe(["run", str(folder / "recipe.yaml"), "--skip-doctor"]):
            sys.exit(code)
    return [describe_step(metrics) for metrics in read_metrics(folder / "r1pipe" / "grpo")]


def describe_step(metrics: dict[str, float]) -> dict[str, float]:
    seconds = {p: metrics[f"seconds/{p}"] for p in ("step", "sample", "score", "update", "sync")}
    sampled = metrics["tokens_per_s/sample"] * seconds["sample"]
    return {**seconds, "tokens_sampled": sampled, "tokens_trained": metrics["tokens_trained"]}


def time_update(options: argparse.Namespace, updater: Any, step: int) -> dict[str, float]:
    from r1pipe.trainer.packing import Sample

    rollouts = [rollout for group in make_rollouts(options, step) for rollout in group]
    samples = [Sample(rollout, (-1.0) ** i) for i, rollout in enumerate(rollouts)]
    started = time.perf_counter()
    metrics = updater.step(samples, step, lambda metrics: None)
    synchronize()
    elapsed = time.perf_counter() - started
    return {"step": elapsed, "update": elapsed, "tokens_trained": metrics["tokens_trained"]}


# --- TRL ----------------------------------------------------------------------------------------


def run_trl(options: argparse.Namespace) -> list[dict]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    device = pick_device("auto")
    clock = PhaseClock()
    if not options.update_only:
        repair_trl(options, device, clock)

    class StepTimes(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    def reward(completion_ids: list[list[int]], prompts: list, **columns: object) -> list[float]:
        completions = sum(len(ids) for ids in completion_ids)
        prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        clock.count(completions, completions + sum(len(ids) for ids in prompt_ids))
        return reward_parity(completion_ids)

    tokenizer = load_tokenizer(options.folder)
    batch = options.prompts * options.generations
    config = GRPOConfig(
        output_dir=str(Path(options.folder) / "trl"),
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        per_device_train_batch_size=options.trl_batch,
        gradient_accumulation_steps=batch // options.trl_batch,
        num_generations=options.generations,
        max_completion_length=options.max_completion_length,
        max_steps=options.steps,
        loss_type="dapo",
        learning_rate=1e-6,
        gradient_checkpointing=False,
        use_vllm=not options.update_only,
        vllm_mode="colocate",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = Dataset.from_list([{"prompt": p.prompt} for p in load_rows(options)])
    model = load_model(options.folder, device)
    trainer = GRPOTrainer(
        model, reward, config, rows, processing_class=tokenizer, callbacks=[StepTimes()]
    )
    if options.update_only:
        return [time_trl_update(options, trainer, step) for step in range(options.steps)]
    trainer.train()
    return clock.steps


def repair_trl(options: argparse.Namespace, device: torch.device, clock: "PhaseClock") -> None:
    """The repair in the module's docstring; also times the phases."""
    from transformers import AutoConfig

    from r1pipe.rollout.vllm_args import engine_arguments, set_environment
    from r1pipe.rollout.weight_sync import drop_expert_kernels

    architecture = AutoConfig.from_pretrained(options.folder)
    if device.type == "cpu":
        set_environment(architecture, device, "float32")
    from trl.generation import vllm_generation

    engine = vllm_generation.LLM

    def make_engine(model: str, **theirs: Any) -> Any:
        if device.type != "cpu":
            return engine(model, **theirs)
        settings = engine_settings(options)
        return engine(model, **engine_arguments(architecture, settings, "float32", device))

    def sync(self: Any) -> None:
        self.llm.apply_model(drop_expert_kernels)
        weights = iter(list(self._iter_named_params()))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    generation = vllm_generation.VLLMGeneration
    vllm_generation.LLM = make_engine
    if device.type == "cpu":
        generation.sync_weights = sync
    generation.sync_weights = clock.timed("sync", generation.sync_weights)
    generation.generate = clock.timed("sample", generation.generate)


class PhaseClock:
    """Times of TRL's steps. Its sync runs inside its generation, and is subtracted from that."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self.started = time.perf_counter()
        self.phases = {"sample": 0.0, "sync": 0.0, "tokens_sampled": 0, "tokens_trained": 0}

    def end(self) -> None:
        synchronize()
        step = time.perf_counter() - self.started
        rest = step - self.phases["sample"] - self.phases["sync"]
        self.steps.append({"step": step, **self.phases, "update": rest, "score": 0.0})

    def count(self, sampled: int, trained: int) -> None:
        self.phases["tokens_sampled"] += sampled
        self.phases["tokens_trained"] += trained

    def timed(self, phase: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.phases[phase] += time.perf_counter() - started
            return result

        return call


def time_trl_update(options: argparse.Namespace, trainer: Any, step: int) -> dict[str, float]:
    """What TRL's trainer does with a batch from vLLM: log-probabilities of the old policy, loss and
    gradient of each micro-batch, optimizer step."""
    rollouts = [rollout for group in make_rollouts(options, step) for rollout in group]
    tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    parts = options.prompts * options.generations // options.trl_batch
    optimizer = trainer.create_optimizer() if trainer.optimizer is None else trainer.optimizer
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    whole = pad_rollouts(rollouts, trainer.accelerator.device)
    started = time.perf_counter()
    with torch.no_grad(), trainer.accelerator.autocast():
        ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
        mask = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
        old, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, whole["completion_ids"].shape[1], options.trl_batch
        )
    whole["old_per_token_logps"] = old
    for part in range(parts):
        rows = slice(part * options.trl_batch, (part + 1) * options.trl_batch)
        inputs = {k: v if k == "num_items_in_batch" else v[rows] for k, v in whole.items()}
        with trainer.accelerator.autocast():
            loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    elapsed = time.perf_counter() - started
    return {"step": elapsed, "update": elapsed, "tokens_trained": tokens}


def pad_rollouts(rollouts: list[Rollout], device: torch.device) -> dict[str, torch.Tensor]:
    def pad(rows: list[list], side: str, dtype: torch.dtype = torch.long) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
        return padded.to(device)

    prompts, completions = (
        [getattr(r, f"{p}_ids") for r in rollouts] for p in ("prompt", "completion")
    )
    mask = pad([[1] * len(ids) for ids in completions], "right")
    return {
        "prompt_ids": pad(prompts, "left"),
        "prompt_mask": pad([[1] * len(ids) for ids in prompts], "left"),
        "completion_ids": pad(completions, "right"),
        "completion_mask": mask,
        "advantages": torch.tensor([(-1.0) ** i for i in range(len(rollouts))], device=device),
        "num_items_in_batch": mask.sum(),
    }


# --- Figures ------------------------------------------------------------------------------------


def print_tables(options: argparse.Namespace, blocks: dict[str, list[dict]]) -> None:
    steps = {side: [s for block in blocks[side] for s in block["steps"]] for side in SIDES}
    what = "update only" if options.update_only else "whole steps"
    print(
        f"{options.model}, {what}, {options.prompts} prompts x {options.generations} samples of at "
        f"most {options.max_completion_length} tokens; {device_name()}; {options.blocks} blocks of "
        f"{options.steps - 1} steps\n"
    )
    rows = list(list_figures(options, steps, blocks))
    print("| figure, median over steps | r1pipe | TRL | ratio |\n|---|---|---|---|")
    for name, ours, theirs, more_is_better in rows:
        ratio = ours / theirs if more_is_better else theirs / ours
        print(f"| {name} | {ours:,.3g} | {theirs:,.3g} | {ratio:.2f} |")
    if not options.update_only:
        print("\n| share of the step | sample | score | update | sync |\n|---|---|---|---|---|")
        for side in SIDES:
            shares = [
                statistics.median(s[phase] / s["step"] for s in steps[side])
                for phase in ("sample", "score", "update", "sync")
            ]
            print(f"| {side} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    print_matmul_share(options, steps)


def list_figures(
    options: argparse.Namespace, steps: dict[str, list[dict]], blocks: dict[str, list[dict]]
) -> Iterator[tuple[str, float, float, bool]]:
    """Name, ours, theirs, whether more is better."""

    def median(figure: Callable[[dict], float]) -> tuple[float, float]:
        ours, theirs = (statistics.median(map(figure, steps[side])) for side in SIDES)
        return ours, theirs

    yield "step, s", *median(lambda s: s["step"]), False
    yield (
        "tokens trained a second of the step",
        *median(lambda s: s["tokens_trained"] / s["step"]),
        True,
    )
    if not options.update_only:
        yield (
            "tokens sampled a second of sampling",
            *median(lambda s: s["tokens_sampled"] / s["sample"]),
            True,
        )
        yield (
            "tokens trained a second of updating",
            *median(lambda s: s["tokens_trained"] / s["update"]),
            True,
        )
    peaks = (max(block["peak_gib"] for block in blocks[side]) for side in SIDES)
    yield "peak memory, GiB", *peaks, False


def print_matmul_share(options: argparse.Namespace, steps: dict[str, list[dict]]) -> None:
    """6 floating-point operations per weight and token, against the rate of a large product."""
    with torch.device("meta"):
        settings = {**MODELS[options.model], "vocab_size": VOCABULARY}
        weights = count_active_weights(settings)
    rate = measure_matmul()
    for side in SIDES:
        achieved = statistics.median(
            6 * weights * s["tokens_trained"] / s["update"] for s in steps[side]
        )
        print(
            f"\n{side}: the update achieves {achieved / 1e9:,.0f} GFLOP/s, {achieved / rate:.0%} "
            f"of the {rate / 1e9:,.0f} GFLOP/s of a large matrix product here"
        )


def count_active_weights(settings: dict) -> int:
    """Weights that multiply a token; in a mixture of experts, those of its experts."""
    size, layers = settings["hidden_size"], settings["num_hidden_layers"]
    heads = settings["num_attention_heads"] + settings["num_key_value_heads"]
    attention = 2 * size * heads * settings["head_dim"]
    experts = settings.get("num_experts_per_tok", 1)
    width = settings.get("moe_intermediate_size", settings["intermediate_size"])
    return layers * (attention + 3 * size * width * experts) + size * settings["vocab_size"]


def measure_matmul() -> float:
    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def dtype_name(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
