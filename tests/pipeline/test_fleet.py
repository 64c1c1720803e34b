"""A fleet of two engines samples, syncs and trains as one engine in the trainer's process does, and
outlives the death of its engines. Each kind of fleet is started once, with real vLLM and Ray."""

import os
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import yaml
from commands import read_lines, run, start, wait_for
from test_engine import CPU, make_model
from test_faults import PROBLEMS, begin
from test_resume import TIMES

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine, SamplerPlace
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.fleet import Fleet
from r1pipe.rollout.groups import cover_engines
from r1pipe.rollout.probe import PROBE_PROBLEMS, measure_difference, probe
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError

SETTINGS = Engine(max_model_len=128, max_num_seqs=32, kv_cache_gib=0.1)
SAMPLING = Sampling(max_completion_length=24)
PLACES = {
    "processes": SamplerPlace(kind="fleet", engines=2),
    "ray": SamplerPlace(kind="fleet", engines=2, ray="auto"),
}
SAME = 1e-6
"""Absolute, and relative: the last bits of float32 follow what is sampled beside a sequence."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(make_model("deepseek_v3", tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Iterator[Sampler]:
    sampler = Sampler(str(checkpoint), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module", params=PLACES)
def fleet(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Fleet]:
    if request.param == "ray":
        pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two engines need two cores")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        fleet = Fleet(str(checkpoint), SETTINGS, "float32", CPU, place=PLACES[request.param])
    yield fleet
    processes = [member.process for member in fleet.members]
    fleet.close()
    for process in processes:
        wait_for_end(process)


def wait_for_end(process: int) -> None:
    """Ray's agents look for a dead cluster for a minute or two."""
    wait_for(lambda: not Path(f"/proc/{process}").exists(), timeout_s=240)


def sample(sampler: Sampler, seed: int, with_routes: bool = False) -> list[Rollout]:
    return sampler.generate(PROBLEMS[:21], 4, SAMPLING, (seed,), with_routes)


def require_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    assert len(rollouts) == len(expected)
    for rollout, other in zip(rollouts, expected):
        assert rollout.logprobs == pytest.approx(other.logprobs, rel=SAME, abs=SAME)
        rollout.logprobs = other.logprobs
    assert rollouts == expected


def test_samples_are_those_of_one_engine(fleet: Fleet, alone: Sampler, checkpoint: Path) -> None:
    for sampler in (fleet, alone):
        sampler.load_checkpoint(str(checkpoint))
    require_same(sample(fleet, 1), sample(alone, 1))
    assert len({member.process for member in fleet.members}) == 2
    for sampler in (fleet, alone):
        sampler.prepare_routes()
    routed, expected = sample(fleet, 2, True), sample(alone, 2, True)
    assert all((a.routes == b.routes).all() for a, b in zip(routed, expected))
    require_same(routed, expected)


def test_a_sync_reaches_every_engine(fleet: Fleet, alone: Sampler) -> None:
    before = sample(fleet, 3)
    model = make_model("deepseek_v3", fleet.tokenizer, 1)
    for sampler in (fleet, alone):
        sampler.load_weights(export_weights(model))
    after = sample(fleet, 3)
    assert sum(a == b for a, b in zip(after, before)) < len(before) / 4
    require_same(after, sample(alone, 3))


def test_an_engine_without_the_last_sync_samples_nothing(fleet: Fleet) -> None:
    fleet.version += 1
    with pytest.raises(RuntimeError, match=rf"sync {fleet.version - 1}, not of {fleet.version}"):
        sample(fleet, 3)
    fleet.version -= 1
    sample(fleet, 3)


def test_a_probe_asks_every_engine(fleet: Fleet, checkpoint: Path) -> None:
    """And tells of the one that is furthest off, however many are right."""
    fleet.load_checkpoint(str(checkpoint))
    assert probe(fleet, str(checkpoint)) < 1e-5
    asked = cover_engines(PROBE_PROBLEMS[:1], fleet.num_engines)
    rollouts = fleet.generate(asked, 1, SAMPLING, ("probe",))
    rollouts[1].logprobs = [value + 0.5 for value in rollouts[1].logprobs]
    assert measure_difference(str(checkpoint), rollouts, "float32", CPU, 2) > 0.49


def test_what_was_interrupted_is_not_mixed_with_the_next(fleet: Fleet) -> None:
    expected = sample(fleet, 5)
    for _ in islice(fleet.generate_groups(PROBLEMS, 4, SAMPLING, (4,)), 3):
        pass
    require_same(sample(fleet, 5), expected)


def test_steps_of_grpo_are_the_same(
    fleet: Fleet,
    alone: Sampler,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rollouts, losses, gradients and every other figure that is no time."""
    rows = []
    for sampler in (alone, fleet):
        folder = tmp_path / type(sampler).__name__
        folder.mkdir()
        changes = {"verify_sync": True, "steps_per_generation": 2, "learning_rate": 1e-4}
        _, steps = begin(changes, checkpoint, sampler, folder, monkeypatch)
        rows.append([(metrics, batch.rollouts) for metrics, batch in steps])
    for (expected, rollouts), (metrics, others) in zip(*rows, strict=True):
        require_same(others, rollouts)
        for name, value in expected.items():
            if not name.startswith((*TIMES, "logprob_diff", "sync")):
                assert metrics[name] == pytest.approx(value, rel=SAME, abs=SAME), name
        assert metrics["sync/logprob_diff_mean"] < 1e-5
        lanes = {name for name in metrics if name.startswith("idle/")}
        assert lanes == {f"idle/{name}" for name in ("trainer", "judges", "engine_0", "engine_1")}
        work = {tuple(row[:2]) for row in metrics["timeline"]}
        assert {("engine_1", "sampling"), ("engine_1", "sync"), ("trainer", "update")} < work


# --- Faults ---------------------------------------------------------------------------------------


def test_an_engine_killed_while_it_samples(fleet: Fleet, alone: Sampler, checkpoint: Path) -> None:
    """No sample is lost or comes twice, and they are the same; by weights that were synced."""
    model = make_model("deepseek_v3", fleet.tokenizer, 2)
    for sampler in (fleet, alone):
        sampler.load_weights(export_weights(model))
    replaced, before = fleet.num_replaced, fleet.members[1].process
    groups = []
    for group in fleet.generate_groups(PROBLEMS, 4, SAMPLING, (6,)):
        if not groups:
            os.kill(fleet.members[1].process, signal.SIGKILL)
        groups.append(group)
    assert fleet.num_replaced == replaced + 1
    assert fleet.members[1].process != before
    assert sorted(group.index for group in groups) == list(range(len(PROBLEMS)))
    found = [
        rollout for group in sorted(groups, key=lambda g: g.index) for rollout in group.rollouts
    ]
    require_same(found, alone.generate(PROBLEMS, 4, SAMPLING, (6,)))


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["idle", "load", "hang"])
def test_an_engine_lost_otherwise(
    doing: str, fleet: Fleet, alone: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("deepseek_v3", fleet.tokenizer, 3)
    replaced, process = fleet.num_replaced, fleet.members[0].process
    if doing == "idle":
        os.kill(process, signal.SIGKILL)
    else:  # the kill comes while the trainer waits for it
        os.kill(process, signal.SIGSTOP)
    if doing == "load":
        threading.Timer(1.0, os.kill, (process, signal.SIGKILL)).start()
    if doing == "hang":
        replace = fleet._replace

        def replace_once(*arguments: object) -> None:
            fleet.hang_s = None  # an engine takes longer to start
            replace(*arguments)

        monkeypatch.setattr(fleet, "_replace", replace_once)
        fleet.hang_s = 3.0
    for sampler in (fleet, alone):
        sampler.load_weights(export_weights(model))
    assert fleet.num_replaced == replaced + 1
    require_same(sample(fleet, 7), sample(alone, 7))


def test_an_engine_that_cannot_start_is_one_line(checkpoint: Path) -> None:
    settings = SETTINGS.model_copy(update={"kv_cache_gib": 1e-5})
    with pytest.raises(UserError, match="vLLM cannot run it") as error:
        Fleet(str(checkpoint), settings, "float32", CPU, place=PLACES["processes"])
    assert "\n" not in str(error.value)


# --- Whole runs -----------------------------------------------------------------------------------


def list_descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *list_descendants(child))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_a_killed_run_leaves_no_process_behind(
    kind: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same command finishes it."""
    if kind == "ray":
        pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    changes = {"from": "random", "max_completion_length": 16, "save_steps": 1, "max_steps": 3}
    stages["grpo"] |= changes
    stages["eval"] |= {"checkpoints": ["random", "grpo"]}
    values |= {"name": kind, "runs_dir": str(tmp_path), "sampler": PLACES[kind].model_dump()}
    values["stages"] = [stages[name] for name in ("random", "grpo", "eval")]
    recipe = tmp_path / "fleet.yaml"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    process = start("run", recipe)
    wait_for(lambda: any(tmp_path.glob(f"{kind}/.grpo*/checkpoints/step-*")))
    below = list_descendants(process.pid)
    process.kill()
    process.communicate()
    assert len(below) >= 2
    for descendant in below:
        wait_for_end(descendant)
    result = run("run", recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resum" in result.stderr
    rows = read_lines(tmp_path / kind / "grpo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sync/logprob_diff_mean"] < 1e-5 for row in rows)
