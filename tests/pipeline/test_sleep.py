"""Trainer and engine take turns in a GPU's memory: the order of sleep, reload and wake-up, and what
happens to an engine whose weights sleep has discarded. Real vLLM, started once.

On CPU vLLM's scheduler sleeps and wakes, and its worker frees nothing. Here the worker loses on
sleep what it would lose on a GPU at level 2: weights, keys and values become noise.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from grpo_settings import make_grpo, make_on_policy_distill
from test_engine import CPU, LIMIT, ROOT, SAMPLING, SETTINGS, lengthen, logprob_diff, make_model
from test_faults import PROBLEMS, begin
from test_resume import TIMES

from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import SamplerPlace
from r1pipe.models.tokenizer import build_tokenizer, load_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rl.loop import check_last_sync
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.engines import Engines
from r1pipe.trainer.breaker import Breaker, EventLog
from r1pipe.utils.errors import Tripped

LONG = [lengthen(problem, 7) for problem in PROBLEMS[:8]]
"""More tokens than a block of the prefix cache has."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one architecture."""
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folders = [tmp_path_factory.mktemp("checkpoint") for _ in range(2)]
    for seed, folder in enumerate(folders):
        save_checkpoint(make_model("qwen3_moe", tokenizer, seed), tokenizer, folder)
    return folders


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    engines = Engines(SETTINGS, "float32", CPU)
    yield engines
    engines.close()


@pytest.fixture
def sampler(engines: Engines, checkpoints: list[Path]) -> Sampler:
    sampler = engines.open(str(checkpoints[0]), sleep=2)
    worker = sampler.llm.collective_rpc(lambda worker: worker)[0]

    @torch.no_grad()
    def lose(level: int) -> None:
        for tensor in (*worker.get_model().parameters(), *worker.model_runner.kv_caches):
            tensor.normal_()

    worker.sleep = lose
    return sampler


@pytest.fixture
def events(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine was asked to do."""
    seen: list[str] = []
    sleep, wake_up = sampler.llm.sleep, sampler.llm.wake_up

    def note_sleep(level: int, mode: str) -> None:
        assert mode == "keep", "test_cuda_engine.py says why"
        seen.append(f"sleep {level}")
        sleep(level, mode)

    def note_wake_up(tags: list[str] | None = None) -> None:
        seen.append(f"wake {tags and ' '.join(tags)}")
        wake_up(tags)

    monkeypatch.setattr(sampler.llm, "sleep", note_sleep)
    monkeypatch.setattr(sampler.llm, "wake_up", note_wake_up)
    return seen


def test_weights_come_before_the_kv_cache(
    sampler: Sampler, events: list[str], checkpoints: list[Path]
) -> None:
    model = make_model("qwen3_moe", sampler.tokenizer, 1)

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        events.append("weights")
        yield from export_weights(model)

    sampler.generate(LONG, 1, SAMPLING, (0,))
    sampler.sleep()
    sampler.sleep()
    assert sampler.llm.llm_engine.is_sleeping()
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        sampler.generate(LONG, 1, SAMPLING, (0,))
    sampler.load_weights(export())
    assert events == ["sleep 2", "wake weights", "weights", "wake kv_cache"]
    assert not sampler.llm.llm_engine.is_sleeping()
    # The same prompts as before: a prefix cache that is kept would serve noise.
    assert logprob_diff(model, sampler.generate(LONG, 1, SAMPLING, (0,))) < LIMIT


def test_a_level_of_0_stays_awake(sampler: Sampler, events: list[str]) -> None:
    sampler.sleep_level = 0
    sampler.sleep()
    assert not events
    assert not sampler.asleep


def test_the_next_stage_finds_it_awake(
    engines: Engines, sampler: Sampler, events: list[str], checkpoints: list[Path]
) -> None:
    sampler.sleep()
    assert engines.open(str(checkpoints[1])) is sampler
    assert not sampler.asleep
    assert sampler.sleep_level == 0
    model = make_model("qwen3_moe", sampler.tokenizer, 1)
    assert logprob_diff(model, sampler.generate(LONG, 1, SAMPLING, (0,))) < LIMIT


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if not k.startswith(TIMES)}


def test_sleep_changes_nothing_in_the_loop(
    sampler: Sampler,
    events: list[str],
    checkpoints: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses, samples, weights; and every wake-up is probed."""
    found = []
    for level, settings in ((0, {"verify_sync": True}), (2, {})):
        world, steps = begin(settings, checkpoints[0], sampler, tmp_path, monkeypatch)
        sampler.sleep_level = level
        taken = [next(steps)[0] for _ in range(2)]
        assert all(metrics["sync/logprob_diff_mean"] < LIMIT for metrics in taken)
        assert all(weight.grad is None for weight in world.updater.model.parameters())
        found.append(([*map(without_times, taken)], world.updater.model.state_dict()))
    assert events == 2 * ["sleep 2", "wake weights", "wake kv_cache"]
    assert found[0][0] == found[1][0]
    for name, weight in found[0][1].items():
        assert torch.equal(weight, found[1][1][name]), name


def test_garbage_after_waking_stops_the_run(
    sampler: Sampler, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, steps = begin({}, checkpoints[0], sampler, tmp_path, monkeypatch)
    monkeypatch.setattr("r1pipe.rollout.engine.send_weights", lambda *arguments: None)
    with pytest.raises(Tripped, match="step 1: sampler and trainer disagree"):
        next(steps)


def test_the_last_comparison_needs_one_half_at_a_time(
    sampler: Sampler, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _ = begin({}, checkpoints[0], sampler, tmp_path, monkeypatch)
    evaluate, asleep = world.updater.evaluate, []

    def look(samples: list) -> Any:
        asleep.append(sampler.asleep)
        return evaluate(samples)

    monkeypatch.setattr(world.updater, "evaluate", look)
    breaker = Breaker(world.stage, EventLog(tmp_path), tmp_path)
    check_last_sync(world.stage, world.updater, sampler, breaker, PROBLEMS)
    assert asleep == [True]


class Loading(Exception):
    """A stage has come to the loading of what it trains."""


@pytest.mark.parametrize("kind", ["grpo", "on_policy_distill"])
def test_a_model_is_loaded_while_the_engine_sleeps(
    kind: str,
    engines: Engines,
    sampler: Sampler,
    checkpoints: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = {"grpo": make_grpo, "on_policy_distill": make_on_policy_distill}[kind]()
    module = import_module(f"r1pipe.stages.{kind}")
    context = SimpleNamespace(
        engines=engines,
        device=CPU,
        recipe=SimpleNamespace(sleep_level=lambda *arguments: 2, seed=0, sampler=SamplerPlace()),
        load_training_problems=lambda stage: PROBLEMS,
        checkpoint=lambda name: str(checkpoints[0]),
        tokenizer=load_tokenizer,
    )

    def load(*arguments: object) -> None:
        assert sampler.asleep
        raise Loading

    monkeypatch.setattr(module, "make_updater", load)
    with pytest.raises(Loading):
        module.run(stage, context)


@pytest.mark.parametrize("kind", ["sft", "distill"])
def test_a_stage_that_only_trains_asks_for_room(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it loads a model; distill has sampled by then."""
    stage = load_recipe(ROOT / "configs" / "demo.yaml").stage(kind)
    module = import_module(f"r1pipe.stages.{kind}")
    context = MagicMock()
    context.engines.make_room.side_effect = Loading
    for name, value in (("drop_flawed", PROBLEMS), ("collect_traces", (PROBLEMS, {}))):
        monkeypatch.setattr(module, name, lambda *arguments, value=value: value, raising=False)
    monkeypatch.setattr(module, "write_jsonl", lambda *arguments: None, raising=False)
    monkeypatch.setattr(module, "identify_weights", lambda *arguments: None, raising=False)
    for name in ("load_sharded", "build_model"):
        monkeypatch.setattr(module, name, MagicMock(side_effect=AssertionError), raising=False)
    with pytest.raises(Loading):
        module.run(stage, context)


def test_room_for_a_model_of_its_own(
    engines: Engines,
    sampler: Sampler,
    events: list[str],
    checkpoints: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage that trains without sampling finds an engine of an earlier one. That of an evaluation
    cannot sleep."""
    engines.make_room()
    assert not events  # on CPU it may stay
    sampler.sleep_level = 0  # the last stage's
    monkeypatch.setattr(engines, "device", torch.device("cuda"))
    engines.make_room()
    assert events == ["sleep 2"]

    monkeypatch.setattr(engines, "device", CPU)
    engines.close()
    assert events == ["sleep 2", "wake None"]
    awake = engines.open(str(checkpoints[0]))
    assert engines._can_reload(str(checkpoints[1]), with_routes=False, sleep=0)
    assert not engines._can_reload(str(checkpoints[1]), with_routes=False, sleep=1)
    monkeypatch.setattr(engines, "device", torch.device("cuda"))
    engines.make_room()
    assert not hasattr(awake, "llm")
