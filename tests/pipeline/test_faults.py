"""The circuit breaker in the real loop: a run goes well for some steps, then a fault is injected.

The engine is started once. Whatever the fault, the check that is made for it is the one that trips.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from grpo_settings import make_grpo
from test_engine import ARCHITECTURES, CPU, SETTINGS, make_model

from r1pipe.config.base import ProblemSet
from r1pipe.config.rl import Grpo
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model, load_model
from r1pipe.models.routing import find_routers
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rl.curriculum import Prompts
from r1pipe.rl.grpo_collect import GrpoCollector
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.loop import train
from r1pipe.rl.losses import LossInputs, TokenLosses, clip_tokens
from r1pipe.rl.prefetch import Prefetcher
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.scoring import Scorer
from r1pipe.trainer.breaker import Breaker, EventLog
from r1pipe.utils.errors import Tripped
from r1pipe.utils.jsonl import read_jsonl

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 40}))
GOOD_STEPS = 2
SHARP = 1e5
"""Times the logits: a policy that is as good as greedy."""


def judge_by_chance(ids: list[int]) -> float:
    return float(sum(ids) % 2)


judges = {"first": judge_by_chance, "second": judge_by_chance}
"""What the stage's two rewards say of a completion's tokens, until a fault changes it."""


def first(completion_ids: list[list[int]], **columns: object) -> list[float | None]:
    return [judges["first"](ids) for ids in completion_ids]


def second(completion_ids: list[list[int]], **columns: object) -> list[float | None]:
    return [judges["second"](ids) for ids in completion_ids]


@dataclass
class World:
    """A run in progress, for a fault to meddle with."""

    stage: Grpo
    updater: GrpoUpdater
    sampler: Sampler
    patch: pytest.MonkeyPatch

    def sync(self) -> None:
        self.sampler.load_weights(export_weights(self.updater.model))

    def judge(self, name: str, judge: Callable[[list[int]], float | None]) -> None:
        self.patch.setitem(judges, name, judge)


def save_mixture(folder: Path) -> Path:
    """A DeepSeek-V3 of random weights, large enough that a wrong one shows."""
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    save_checkpoint(make_model("deepseek_v3", tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(build_model(ARCHITECTURES["deepseek_v3"], tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def sampler(checkpoint: Path) -> Iterator[Sampler]:
    sampler = Sampler(str(checkpoint), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


# --- Faults -------------------------------------------------------------------------------------


def judge_with_nan(world: World) -> None:
    world.judge("first", lambda ids: math.nan if sum(ids) % 7 == 0 else 1.0)


def judge_nothing(world: World) -> None:
    for name in ("first", "second"):
        world.judge(name, lambda ids: None)


def judge_all_wrong(world: World) -> None:
    for name in ("first", "second"):
        world.judge(name, lambda ids: 0.0)


def judge_all_alike(world: World) -> None:
    for name in ("first", "second"):
        world.judge(name, lambda ids: 0.6)


def please_the_second(world: World) -> None:
    world.judge("second", lambda ids: 1.0)


def corrupt_the_sync(world: World) -> None:
    """The sampler gets other weights than the trainer has."""
    noisy = copy.deepcopy(world.updater.model)
    with torch.no_grad():
        noisy.lm_head.weight.mul_(1.5)
    world.sampler.load_weights(export_weights(noisy))


def break_the_loss(world: World) -> None:
    world.patch.setattr("test_faults.loss_factor", math.nan)


def explode_the_gradient(world: World) -> None:
    world.patch.setattr("test_faults.loss_factor", math.inf)


def leave_the_reference(world: World) -> None:
    with torch.no_grad():
        world.updater.reference.model.lm_head.weight.mul_(50.0)


def learn_too_fast(world: World) -> None:
    for group in world.updater.optimizer.param_groups:
        group["lr"] = 0.03


def sharpen(factor: float) -> Callable[[World], None]:
    def fault(world: World) -> None:
        with torch.no_grad():
            world.updater.model.lm_head.weight.mul_(factor)
        world.sync()

    return fault


def say_one_thing(world: World) -> None:
    """All tokens look alike to the model, so that one prompt is as good as another."""
    embedding = world.updater.model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.copy_(embedding.weight[5].expand_as(embedding.weight))
    sharpen(SHARP)(world)


def starve_experts(world: World) -> None:
    """Two experts of eight get all tokens: a bias that no score outweighs."""
    for router in find_routers(world.updater.model):
        router.bias[:2] += 100.0
    world.sync()


loss_factor = 1.0


def breakable_loss(inputs: LossInputs, settings: Grpo) -> TokenLosses:
    loss_C, figures = clip_tokens(inputs, settings)
    return TokenLosses(loss_C * loss_factor, figures)


def learn_nothing(world: World) -> None:
    """A policy from random weights ends no completion by itself."""


def ignoring(*checks: str) -> dict:
    """Settings for a fault that other checks see as well, and end the run for."""
    ignore = {"action": "ignore"}
    return {"breaker": {"window": 2 * GOOD_STEPS, **dict.fromkeys(checks, ignore)}}


SKIPPING = {"breaker": {"update_kl": {"action": "skip"}}}
# (fault, check that trips, its action, settings of the stage)
FAULTS = [
    (judge_with_nan, "nonfinite_rewards", "stop", {}),
    (judge_nothing, "unjudged", "stop", {}),
    (judge_all_wrong, "reward_collapse", "rollback", {}),
    (please_the_second, "reward_hacking", "warn", {}),
    (learn_nothing, "truncated", "warn", {"breaker": {}}),
    (sharpen(SHARP), "identical_groups", "warn", ignoring("logprob_diff", "entropy_collapse")),
    (say_one_thing, "same_completion", "rollback", {}),
    (break_the_loss, "nonfinite", "skip", {}),
    (explode_the_gradient, "nonfinite", "skip", {}),
    (corrupt_the_sync, "logprob_diff", "stop", {}),
    (leave_the_reference, "kl", "warn", {"beta": 0.01}),
    (learn_too_fast, "update_kl", "skip", {"steps_per_generation": 2, **SKIPPING}),
    (sharpen(SHARP), "entropy", "warn", ignoring("logprob_diff", "entropy_collapse")),
    (sharpen(100.0), "entropy_collapse", "rollback", {}),
    (judge_all_alike, "steps_in_vain", "warn", {}),
    (starve_experts, "dead_experts", "warn", {}),
]


def begin(
    settings: dict, checkpoint: Path, sampler: Sampler, folder: Path, patch: pytest.MonkeyPatch
) -> tuple[World, Iterator]:
    """A run of the real loop, no step of it taken yet."""
    rewards = [{"function": f"test_faults.{name}"} for name in ("first", "second")]
    values = {
        "name": "rl",
        "rewards": rewards,
        "max_steps": GOOD_STEPS + 1,
        "prompts_per_step": 16,
        "num_generations": 4,
        "max_completion_length": 8,
        "loss_type": "test_faults.breakable_loss",
        **ignoring("truncated"),
        **settings,
    }
    stage = make_grpo(**values)
    policy = load_model(checkpoint, CPU)
    reference = load_model(checkpoint, CPU) if stage.beta else None
    updater = GrpoUpdater(policy, reference, stage, dtype="float32", seed=0)
    sampler.load_checkpoint(str(checkpoint))
    collector = GrpoCollector(stage, sampler, Scorer(stage.rewards), Prompts(PROBLEMS, 0))
    batches = Prefetcher(collector, stage)
    breaker = Breaker(stage, EventLog(folder), folder)
    world = World(stage, updater, sampler, patch)
    return world, train(stage, updater, sampler, batches, breaker, first_step=1)


def read_events(folder: Path) -> list[dict]:
    return [row for _, row in read_jsonl(folder / "events.jsonl")]


@pytest.mark.parametrize(
    ("fault", "check", "action", "settings"), FAULTS, ids=[check for _, check, _, _ in FAULTS]
)
def test_fault(
    fault: Callable,
    check: str,
    action: str,
    settings: dict,
    checkpoint: Path,
    sampler: Sampler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, steps = begin(settings, checkpoint, sampler, tmp_path, monkeypatch)
    for _ in range(GOOD_STEPS):
        next(steps)
    if fault is not learn_nothing:
        assert check not in {event["check"] for event in read_events(tmp_path)}
    fault(world)
    before = copy.deepcopy(world.updater.model.state_dict())
    metrics = None
    if action in ("stop", "rollback"):
        with pytest.raises(Tripped) as error:
            next(steps)
        assert f"rl, step {GOOD_STEPS + 1}: " in str(error.value)
        assert error.value.rollback == (action == "rollback")
    else:
        metrics, _ = next(steps)

    events = [event for event in read_events(tmp_path) if event["step"] == GOOD_STEPS + 1]
    assert action in [event["action"] for event in events if event["check"] == check], events
    moved = [
        name
        for name, weight in world.updater.model.state_dict().items()
        if not torch.equal(weight, before[name])
    ]
    # Of a deterministic policy's completions there is nothing to learn; of the two optimizer steps
    # of which the second would go too far the first is applied.
    applied = check == "update_kl" or (
        action == "warn" and check not in ("identical_groups", "entropy", "steps_in_vain")
    )
    assert bool(moved) == applied
    assert (metrics or {}).get("updates_skipped", 0) == (action == "skip")


def test_rollouts_that_are_skipped_teach_nothing(
    checkpoint: Path, sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = {"truncated": {"limit": 0.1, "action": "skip"}, "max_skips": 2}
    world, steps = begin({"breaker": breaker}, checkpoint, sampler, tmp_path, monkeypatch)
    before = copy.deepcopy(world.updater.model.state_dict())
    for _ in range(2):
        metrics, _ = next(steps)
        assert (metrics["updates_skipped"], metrics["tokens_trained"]) == (1, 0)
    for name, weight in world.updater.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with pytest.raises(Tripped, match="3 steps in a row"):
        next(steps)
