"""A fleet of two engines samples, syncs and trains as one engine in the trainer's process does, and
outlives the death of its engines. Each kind of fleet is started once, with real vLLM and Ray."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from commands import read_lines, run, run_and_kill, start, wait_for
from test_engine import CPU, make_model
from test_faults import PROBLEMS, begin, save_mixture
from test_resume import TIMES
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.config.base import Environment, ProblemSet, Reward, Sampling
from r1pipe.config.recipe import Engine, SamplerPlace
from r1pipe.data.problems import load_problems
from r1pipe.envs.driver import EpisodeSampler
from r1pipe.models.model import fast_training_kernels, load_model
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rl.curriculum import Prompts
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.fleet import MAX_LOSSES, Fleet
from r1pipe.rollout.groups import SampleGroup, cover_engines
from r1pipe.rollout.probe import PROBE_PROBLEMS, measure_difference, probe
from r1pipe.rollout.reward_workers import RayScorer
from r1pipe.rollout.scoring import Scorer
from r1pipe.rollout.store import read_rollouts
from r1pipe.types import Episode, Rollout
from r1pipe.utils.errors import UserError

SETTINGS = Engine(max_model_len=128, max_num_seqs=32, kv_cache_gib=0.1)
SAMPLING = Sampling(max_completion_length=24)
LONG = Sampling(max_completion_length=48)
PLACES = {
    "processes": SamplerPlace(kind="fleet", engines=2),
    "ray": SamplerPlace(kind="fleet", engines=2, ray="auto"),
}
SAME = 1e-6
"""Absolute, and relative: the last bits of float32 follow what is sampled beside a sequence."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def one_engine(checkpoint: Path) -> Iterator[Sampler]:
    sampler = Sampler(str(checkpoint), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


@pytest.fixture
def alone(one_engine: Sampler, checkpoint: Path) -> Sampler:
    """As it was when it opened, whatever other tests have loaded."""
    one_engine.load_checkpoint(str(checkpoint))
    return one_engine


PARAMS = ["processes", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PARAMS)
def two_engines(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Fleet]:
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


@pytest.fixture
def fleet(two_engines: Fleet, checkpoint: Path) -> Fleet:
    """As it was when it opened."""
    two_engines.load_checkpoint(str(checkpoint))
    return two_engines


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


def test_samples_are_those_of_one_engine(fleet: Fleet, alone: Sampler) -> None:
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
    assert probe(fleet, str(checkpoint)) < 1e-5
    asked = cover_engines(PROBE_PROBLEMS[:1], fleet.num_engines)
    rollouts = fleet.generate(asked, 1, SAMPLING, ("probe",))
    rollouts[1].logprobs = [value + 0.5 for value in rollouts[1].logprobs]
    by_engine = [rollouts[0::2], rollouts[1::2]]
    assert measure_difference(str(checkpoint), by_engine, "float32", CPU) > 0.49


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


@pytest.fixture(scope="module")
def talker(two_engines: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ends a turn after eight tokens or so, by a logit that is far from 0 either way."""
    tokenizer = two_engines.tokenizer
    model = make_model("deepseek_v3", tokenizer, 11)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 8
    folder = tmp_path_factory.mktemp("talker")
    save_checkpoint(model, tokenizer, folder)
    return folder


def play(sampler: Sampler, with_routes: bool = False) -> Iterator[SampleGroup]:
    episodes = EpisodeSampler(sampler, Environment(name="envs_of_tests.Talk"), PROBLEMS[0])
    return episodes.generate_groups(PROBLEMS[:9], 4, LONG, (12,), with_routes=with_routes)


def join_groups(groups: Iterable[SampleGroup]) -> list[Rollout]:
    in_order = sorted(groups, key=lambda group: group.index)
    return [rollout for group in in_order for rollout in group.rollouts]


def test_episodes_are_those_of_one_engine(fleet: Fleet, alone: Sampler, talker: Path) -> None:
    """Whose environments are in its own process."""
    for sampler in (fleet, alone):
        sampler.load_checkpoint(str(talker))
        sampler.prepare_routes()
    rollouts, expected = join_groups(play(fleet)), join_groups(play(alone))
    assert sum(rollout.episode.num_turns > 1 for rollout in rollouts) > len(rollouts) / 2
    require_same(rollouts, expected)
    routed = join_groups(play(fleet, with_routes=True))
    pairs = zip(routed, join_groups(play(alone, with_routes=True)), strict=True)
    assert all((rollout.routes == other.routes).all() for rollout, other in pairs)
    require_same(routed, expected)


# --- Weights that change in flight ----------------------------------------------------------------


@torch.no_grad()
def measure_diffs(models: dict[int, PreTrainedModel], rollouts: list[Rollout]) -> Tensor:
    """|log-probability of the sampler - of the model of the token's version|, of every token."""
    diffs = []
    for rollout in rollouts:
        assert len(rollout.versions) == len(rollout.completion_ids)
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        for version in set(rollout.versions):
            with fast_training_kernels(CPU, "float32"):
                logits_NV = models[version](input_ids=ids, use_cache=False).logits[0, :-1]
            logprobs_N = logits_NV.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            logprobs_C = logprobs_N[-len(rollout.versions) :]
            own = torch.tensor(rollout.versions) == version
            diffs.append((logprobs_C - torch.tensor(rollout.logprobs))[own].abs())
    return torch.cat(diffs)


def sample_in_flight(fleet: Fleet, seed: int, meanwhile: Callable[[], None]) -> list[SampleGroup]:
    """Two batches at once; `meanwhile` is called when a group of each is there."""
    found: dict[int, list[SampleGroup]] = {0: [], 1: []}

    def sample_batch(number: int) -> None:
        for group in fleet.generate_groups(PROBLEMS, 4, LONG, (seed, number)):
            found[number].append(group)

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(sample_batch, number) for number in found]
        wait_for(lambda: any(call.done() for call in running) or all(found.values()))
        meanwhile()
        for call in running:
            call.result()
    for groups in found.values():
        assert sorted(group.index for group in groups) == list(range(len(PROBLEMS)))
    return [group for groups in found.values() for group in groups]


def test_weights_change_between_two_steps(fleet: Fleet) -> None:
    """A token's log-prob is that of the weights that it says, over all that stands before it."""
    models = {}

    def sync(seed: int) -> None:
        model = make_model("deepseek_v3", fleet.tokenizer, seed)
        fleet.load_weights(export_weights(model))
        models[fleet.version] = model.eval()

    def sync_twice() -> None:
        sync(5)
        sync(6)
        # What begins now has the newest alone.
        probe = fleet.generate(PROBLEMS[:2], 1, SAMPLING, ("probe",))
        assert {version for rollout in probe for version in rollout.versions} == {fleet.version}
        assert measure_diffs(models, probe).max() < 1e-4

    sync(4)
    groups = sample_in_flight(fleet, 8, sync_twice)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {version for rollout in rollouts for version in rollout.versions} == set(models)
    assert all(rollout.versions == sorted(rollout.versions) for rollout in rollouts)
    mixed = [rollout for rollout in rollouts if len(set(rollout.versions)) > 1]
    assert mixed
    diffs = measure_diffs(models, rollouts)
    assert (diffs.mean() < 1e-5, diffs.max() < 1e-3) == (True, True)
    swapped = dict.fromkeys(models, models[fleet.version])
    assert measure_diffs(swapped, mixed).mean() > 0.1


@pytest.mark.slow
def test_grpo_in_flight(
    fleet: Fleet, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt is trained on once, in order, by tokens at most two steps old, whose log-probs
    are those of the trainer at the steps that they name."""
    changes = {
        "max_staleness": 2,
        "in_flight": True,
        "max_steps": 4,
        "max_completion_length": 48,
        "learning_rate": 1e-3,
        "off_policy_mask_threshold": 1.0,
        "breaker": {"truncated": {"action": "ignore"}},
    }
    world, steps = begin(changes, checkpoint, fleet, tmp_path, monkeypatch)

    def copy_policy() -> PreTrainedModel:
        """The trainer's own takes packed rows."""
        model = load_model(checkpoint, CPU)
        model.load_state_dict(world.updater.model.state_dict())
        return model

    models, trained, rollouts = {1: copy_policy()}, [], []
    for metrics, batch in steps:
        step = metrics["step"]
        models[step + 1] = copy_policy()
        trained += [group.problem.id for group in batch.groups]
        rollouts += batch.rollouts
        assert metrics["sync/logprob_diff_mean"] < 1e-5
        assert metrics["staleness/max"] <= min(2, step - 1)
        assert len(metrics["staleness/tokens"]) == metrics["staleness/max"] + 1
        assert sum(metrics["staleness/tokens"]) == metrics["tokens_sampled"]
        if metrics["staleness/max"]:
            assert metrics["sampler/ratio"] != pytest.approx(1.0, abs=1e-6)
    assert trained == [problem.id for problem in Prompts(PROBLEMS, 0).draw(4 * 16)]
    assert any(len(set(rollout.versions)) > 1 for rollout in rollouts)
    diffs = measure_diffs(models, rollouts)
    assert (diffs.mean() < 1e-5, diffs.max() < 1e-3) == (True, True)
    assert measure_diffs(dict.fromkeys(models, models[1]), rollouts).mean() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("two_engines", ["ray"], indirect=True, scope="module")
def test_reward_workers_score_as_the_trainer_does(fleet: Fleet, alone: Sampler) -> None:
    """What an environment gave counts; also when they die; and a reward that raises is the same one
    line."""
    import ray

    functions = ("rewards.math_correct", "reward_of_tests.accept_even_lengths")
    rewards = [Reward(function=function) for function in functions]
    rollouts = sample(alone, 8)
    problems = [problem for problem in PROBLEMS[:21] for _ in range(4)]
    for number, rollout in enumerate(rollouts):
        rollout.episode = Episode([], [], reward=float(number))
    expected = Scorer(rewards, 0.5).score(problems, rollouts)
    scorer = RayScorer(rewards, 2, 0.5)
    assert scorer.num_threads == 2
    assert scorer.score(problems, rollouts) == expected
    for worker in scorer.workers:
        os.kill(ray.get(worker.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    for _ in scorer.workers:
        assert scorer.score(problems, rollouts) == expected
    broken = RayScorer([Reward(function="reward_of_tests.raises")], 1)
    with pytest.raises(UserError, match="raised ValueError: broken reward") as error:
        broken.score(problems, rollouts)
    assert "\n" not in str(error.value)


# --- Faults ---------------------------------------------------------------------------------------


def test_an_engine_killed_while_it_samples(fleet: Fleet, alone: Sampler) -> None:
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
    require_same(join_groups(groups), alone.generate(PROBLEMS, 4, SAMPLING, (6,)))


@pytest.mark.slow
def test_an_engine_killed_in_the_middle_of_episodes(
    fleet: Fleet, alone: Sampler, talker: Path
) -> None:
    """Those that had not ended begin again, by the same seeds."""
    for sampler in (fleet, alone):
        sampler.load_checkpoint(str(talker))
    replaced, groups = fleet.num_replaced, []
    for group in play(fleet):
        if not groups:
            os.kill(fleet.members[1].process, signal.SIGKILL)
        groups.append(group)
    assert fleet.num_replaced == replaced + 1
    require_same(join_groups(groups), join_groups(play(alone)))


@pytest.mark.slow
def test_an_engine_killed_in_flight(fleet: Fleet) -> None:
    """Just before a sync: its successor samples what was left by the weights of that sync."""
    model = make_model("deepseek_v3", fleet.tokenizer, 7).eval()
    models = {fleet.version + 1: model, fleet.version + 2: model}
    fleet.load_weights(export_weights(model))
    replaced = fleet.num_replaced

    def kill_and_sync() -> None:
        os.kill(fleet.members[0].process, signal.SIGKILL)
        fleet.load_weights(export_weights(model))

    groups = sample_in_flight(fleet, 9, kill_and_sync)
    assert fleet.num_replaced == replaced + 1
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {version for rollout in rollouts for version in rollout.versions} == set(models)
    assert measure_diffs(models, rollouts).mean() < 1e-5


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


@pytest.mark.slow
def test_an_engine_that_cannot_be_replaced_is_one_line(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(fleet, 10)
    with monkeypatch.context() as patch:
        patch.setattr(fleet, "checkpoint", "/nowhere")
        os.kill(fleet.members[0].process, signal.SIGKILL)
        with pytest.raises(UserError, match="/nowhere"):
            sample(fleet, 10)
    fleet._replace(fleet.members[0], "by the test")
    sample(fleet, 10)


@pytest.mark.slow
def test_ten_kills_at_random_moments(fleet: Fleet, alone: Sampler) -> None:
    """While engines sample, load or idle: every sample is there once, and the same."""
    rng, kills = random.Random(0), []

    def kill() -> None:
        while len(kills) < 10:
            time.sleep(rng.uniform(0.0, 3.0))
            member = rng.choice(fleet.members)
            process = member.process
            # Else the one in its place has not begun yet, or the fleet would give up on it.
            if process not in kills and member.num_losses < MAX_LOSSES:
                os.kill(process, signal.SIGKILL)
                kills.append(process)

    replaced, step = fleet.num_replaced, 0
    thread = threading.Thread(target=kill)
    thread.start()
    while thread.is_alive() or step == 0:
        step += 1
        model = make_model("deepseek_v3", fleet.tokenizer, step)
        for sampler in (fleet, alone):
            sampler.load_weights(export_weights(model))
        require_same(sample(fleet, step), sample(alone, step))
    sample(fleet, 0)  # replaces those that were killed last
    assert fleet.num_replaced >= replaced + 10


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_run_in_flight_trains_on_every_prompt_once(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    """Batches that were finished are kept, others sampled again: the same prompts in order."""
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    stages["grpo"] |= {"from": "random", "max_completion_length": 32, "save_steps": 1}
    stages["grpo"] |= {"routing_replay": False, "max_steps": 6}
    stages["grpo"] |= {"max_staleness": 2, "in_flight": True}
    values |= {"name": "killed", "runs_dir": str(tmp_path)}
    values["sampler"] = PLACES["processes"].model_dump()
    values["stages"] = [stages[name] for name in ("random", "grpo")]
    recipe = tmp_path / "in_flight.yaml"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    partial = tmp_path / "killed" / ".grpo.partial"
    for steps in (1, 3):
        run_and_kill("updating", steps, 0.05, partial, "run", recipe)
    result = run("run", recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step" in result.stderr
    folder = tmp_path / "killed" / "grpo"
    rows = list(read_rollouts(folder, columns=("step", "problem_id", "sample")))
    problems = load_problems(ProblemSet.model_validate(stages["grpo"]["data"]))
    drawn = [problem.id for problem in Prompts(problems, values["seed"]).draw(6 * 8)]
    assert [row["problem_id"] for row in rows] == [name for name in drawn for _ in range(4)]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 7))
    assert max(row["staleness/max"] for row in metrics) in (1, 2)
