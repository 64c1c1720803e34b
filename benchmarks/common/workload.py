"""One workload for r1pipe's trainer and for others': a model from random weights whose completions
end at random, problems, and made-up rollouts of the lengths of sampled ones."""

import math
import os
import random
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from r1pipe.config.base import ProblemSet
from r1pipe.config.recipe import Engine, Recipe, SamplerPlace
from r1pipe.config.rl import Grpo
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.pipeline import open_run, run_stages
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.runs.logs import read_metrics
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.policy import Policy
from r1pipe.types import Problem, Rollout

if TYPE_CHECKING:
    from r1pipe.rollout.engines import Engines

DATA = {"recipe": "arithmetic", "options": {"size": 500}}
MADE_UP_IDS = (10, 250)
ATTENTION = Recipe.model_fields["attn_implementation"].default


@dataclass
class Workload:
    """`folder`: of the checkpoint. `settings`: as for `build_model`."""

    folder: str
    settings: dict[str, Any] = field(repr=False)
    device: torch.device
    prompts: int
    generations: int
    max_completion_length: int
    steps: int
    mean_length: int = 80
    """Of completions: geometric, 10 times apart between the 10th and 90th percentile."""
    micro_batch_tokens: int | None = None
    kv_cache_gib: float = 1.0
    learning_rate: float = 1e-6
    fp8: str | None = None
    processes: int = 1
    max_staleness: int = 0
    """In flight, if above 1. On CPU an engine samples ahead in a process, and on a core, of its
    own."""
    trl_batch: int = 8
    """Completions in a micro-batch of TRL's."""
    trl_eager: bool = False
    """Without torch.compile, like our engine on CPU."""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device.type == "cuda" else "float32"

    @property
    def num_samples(self) -> int:
        return self.prompts * self.generations

    @property
    def engine(self) -> Engine:
        context = self.max_completion_length + 128
        return Engine(max_model_len=context, max_num_seqs=256, kv_cache_gib=self.kv_cache_gib)

    @property
    def sampler(self) -> SamplerPlace:
        beside = self.max_staleness and self.device.type == "cpu"
        return SamplerPlace(kind="fleet") if beside else SamplerPlace()

    @property
    def stage(self) -> Grpo:
        return Grpo.model_validate(
            {
                "kind": "grpo",
                "from": self.folder,
                "data": DATA,
                "rewards": [{"function": f"{reward_parity.__module__}.reward_parity"}],
                "max_steps": self.steps,
                "prompts_per_step": self.prompts,
                "num_generations": self.generations,
                "max_completion_length": self.max_completion_length,
                "micro_batch_tokens": self.micro_batch_tokens,
                "loss_type": "dapo",
                "sharding": "full" if self.device.type == "cuda" else "none",
                # A figure, here: no reason to end the run.
                "breaker": {"logprob_diff": {"action": "ignore"}},
                "learning_rate": self.learning_rate,
                "fp8": self.fp8,
                "max_staleness": self.max_staleness,
                "in_flight": self.max_staleness > 1,
                "verify_sync": False,
            }
        )

    def make_checkpoint(self) -> None:
        """Random weights whose completions end with probability 1 / mean_length at each token."""
        problems = load_rows()
        texts = (f"{p.question}\n{p.solution}" for p in problems)
        tokenizer = build_tokenizer(texts, min(512, self.settings.get("vocab_size", 512)))
        with self.device:
            model = build_model({**self.settings, "pad_token_id": 0}, tokenizer, seed=0)
        end_at_random(model, tokenizer.eos_token_id, self.mean_length)
        save_checkpoint(model, tokenizer, Path(self.folder))


@torch.no_grad()
def end_at_random(model: PreTrainedModel, end_id: int, mean_length: float) -> None:
    """Make one coordinate of the hidden states a constant, which no layer writes and only the end
    token's logit reads: its bias. A bias that all embeddings share would be drowned by 28 layers,
    and where the head is tied raise all logits to where bf16 is coarse."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:  # [D, I], or [E, D, I] of experts
            parameter.select(-2, 0).zero_()
    head[:, 0] = 0
    embedding[:, 0] = 1
    model.base_model.norm.weight[0] = 0.1
    head[end_id] = 0
    ids_1N = torch.randint(*MADE_UP_IDS, (1, 64), device=embedding.device)
    hidden_ND = model.base_model(ids_1N, use_cache=False).last_hidden_state[0].float()
    others = (hidden_ND @ head.T).logsumexp(-1).mean()
    head[end_id, 0] = (others - math.log(mean_length)) / hidden_ND[:, 0].mean()


def load_rows() -> list[Problem]:
    return load_problems(ProblemSet.model_validate(DATA))


def reward_parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Costs nothing, and groups without spread are rare."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_rollouts(work: Workload, step: int) -> list[Rollout]:
    """Made-up rollouts with the lengths of sampled ones."""
    rng = random.Random(step)
    rollouts = []
    for number in range(work.prompts):
        prompt = [rng.randrange(*MADE_UP_IDS) for _ in range(rng.randint(20, 40))]
        for sample in range(work.generations):
            length = math.ceil(rng.expovariate(1 / work.mean_length))
            length = max(2, min(work.max_completion_length, length))
            ids = [rng.randrange(*MADE_UP_IDS) for _ in range(length)]
            rollouts.append(make_rollout(prompt, ids, str(number), sample))
    return rollouts


def make_rollout(
    prompt: list[int], completion: list[int], problem_id: str = "", sample: int = 0
) -> Rollout:
    logprobs = [-math.log(MADE_UP_IDS[1])] * len(completion)
    return Rollout(problem_id, sample, prompt, completion, logprobs, "", "stop")


def load_updater(work: Workload, attn_implementation: str = ATTENTION) -> GrpoUpdater:
    """As a stage makes it."""
    source = (work.folder, work.device, attn_implementation, Policy)
    policy = load_sharded(*source, dtype=work.dtype)
    return GrpoUpdater(policy, None, work.stage, dtype=work.dtype, seed=0)


def time_update(updater: Any, rollouts: list[Rollout], step: int) -> dict[str, float]:
    samples = [Sample(rollout, (-1.0) ** i) for i, rollout in enumerate(rollouts)]
    synchronize()
    started = time.perf_counter()
    metrics = updater.step(samples, step, lambda metrics: None)
    synchronize()
    elapsed = time.perf_counter() - started
    return {"step": elapsed, "update": elapsed, "tokens_trained": metrics["tokens_trained"]}


def run_ours(work: Workload, engines: "Engines | None" = None) -> list[dict[str, Any]]:
    """A grpo stage, run as its command runs it; the rows of its metrics.jsonl. `engines`: stay
    open."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")  # the same on all ranks
    recipe = Recipe(
        name="r1pipe",
        runs_dir=f"{work.folder}/{launch}" if launch else tempfile.mkdtemp(dir=work.folder),
        dtype=work.dtype,
        device=work.device.type,
        engine=work.engine,
        sampler=work.sampler,
        phase_timeout_s=None,
        stages=[work.stage],
    )
    with open_run(recipe) as run:
        run_stages(run, recipe.stages, skip_doctor=True, engines=engines)
        return read_metrics(run.stage_dir("grpo"))


def describe_step(metrics: dict[str, float]) -> dict[str, float]:
    """A row of metrics.jsonl, as `list_figures` wants it."""
    seconds = {p: metrics[f"seconds/{p}"] for p in ("step", "sample", "score", "update", "sync")}
    sampled = metrics["tokens_per_s/sample"] * seconds["sample"]
    return {**seconds, "tokens_sampled": sampled, "tokens_trained": metrics["tokens_trained"]}


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


def measure_matmul(device: torch.device, size: int) -> float:
    """Floating-point operations a second of one large product."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(times)[len(times) // 2]
