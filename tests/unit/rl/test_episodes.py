"""Rollouts of several turns in the trainer and on disk: what an environment gave is read, and
nothing is learnt from it."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grpo_settings import make_grpo
from transformers import PreTrainedModel

from r1pipe.config.base import Reward
from r1pipe.config.recipe import KeptRollouts
from r1pipe.config.rl import LOSSES
from r1pipe.rl.batch import Batch, Group, describe_episodes
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.replay import ReplayBatches
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.scoring import Scorer
from r1pipe.rollout.store import RolloutFiles, list_steps, read_table
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Episode, Problem, Rollout, Score

CPU = torch.device("cpu")
GIVEN = [[2, 4], [5, 6]]
MESSAGES = [
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "look again"},
    {"role": "assistant", "content": "8"},
]


def make_episode(sample: Sample, **changes: object) -> Sample:
    """The sample as one of three turns; its completion ends as the second does, if it is short."""
    length = len(sample.rollout.completion_ids)
    given = [span for span in GIVEN if span[1] < length]
    episode = Episode(given, MESSAGES, **changes)
    return replace(sample, rollout=replace(sample.rollout, episode=episode, num_tokens=-1))


@pytest.fixture
def episodes(samples: list[Sample]) -> list[Sample]:
    return [make_episode(sample) for sample in samples]


def is_sampled(rollout: Rollout) -> list[bool]:
    given = {n for start, stop in rollout.episode.given for n in range(start, stop)}
    return [n not in given for n in range(len(rollout.completion_ids))]


def test_given_tokens_are_read_and_not_scored(
    model: PreTrainedModel, samples: list[Sample], episodes: list[Sample]
) -> None:
    whole, batch = pack(samples, CPU), pack(episodes, CPU)
    assert torch.equal(batch.ids_N, whole.ids_N)
    kept_C = torch.tensor([flag for s in batch.samples for flag in is_sampled(s.rollout)])
    assert not kept_C.all()
    assert batch.completion_lengths == [sum(is_sampled(s.rollout)) for s in batch.samples]
    with torch.no_grad():
        expected_C = Policy(copy.deepcopy(model))(whole, 1.0).logprobs_C[kept_C]
        assert torch.equal(Policy(model)(batch, 1.0).logprobs_C, expected_C)
    for column in ("predictor_C", "target_C", "sequence_C"):
        assert torch.equal(getattr(batch, column), getattr(whole, column)[kept_C]), column
    assert len(batch.sampler_logprobs_C) == kept_C.sum()


def test_an_episode_of_one_turn_is_trained_to_the_same_bits(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    paths = [
        replace(s, rollout=replace(s.rollout, episode=Episode([], MESSAGES[:1]))) for s in samples
    ]
    results = []
    for rows in (samples, paths):
        settings = make_grpo(learning_rate=1e-3)
        updater = GrpoUpdater(copy.deepcopy(model), None, settings, dtype="float32", seed=0)
        metrics = updater.step(copy.deepcopy(rows), 1, lambda metrics: None)
        results.append((metrics, updater.model.state_dict()))
    (metrics, weights), (others, other_weights) = results
    assert metrics == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_that_of_sampled_tokens_alone(
    model: PreTrainedModel, episodes: list[Sample], loss_type: str
) -> None:
    """Whatever stands in the places of given tokens' log-probabilities changes no loss, no gradient
    and no count."""
    settings = make_grpo(loss_type=loss_type, epsilon_high=0.3, learning_rate=1e-3)
    results = []
    for noise in (0.0, -7.0):
        rows = copy.deepcopy(episodes)
        for sample in rows:
            flags = is_sampled(sample.rollout)
            pairs = zip(sample.rollout.logprobs, flags)
            sample.rollout.logprobs = [value if flag else noise for value, flag in pairs]
        updater = GrpoUpdater(copy.deepcopy(model), None, settings, dtype="float32", seed=0)
        results.append((updater.step(rows, 1, lambda metrics: None), updater.model.state_dict()))
    (metrics, weights), (others, other_weights) = results
    assert metrics == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    trained = [s for s in episodes if s.advantage]
    assert metrics["tokens_trained"] == sum(s.num_tokens for s in trained)


def test_means_are_over_sampled_tokens(model: PreTrainedModel, episodes: list[Sample]) -> None:
    """At ratio 1 a token's loss is minus its sequence's advantage, and so is the mean."""
    correction = {"vllm_importance_sampling_correction": False}
    advantages = torch.tensor([s.advantage for s in episodes])
    sizes = torch.tensor([float(s.rollout.num_tokens) for s in episodes])
    expected = {
        "grpo": advantages.mean(),
        "dr_grpo": (advantages * sizes).mean() / 40,
        "dapo": (advantages * sizes).sum() / sizes.sum(),
    }
    for loss_type, mean in expected.items():
        settings = make_grpo(loss_type=loss_type, **correction)
        updater = GrpoUpdater(copy.deepcopy(model), None, settings, dtype="float32", seed=0)
        metrics = updater.step(copy.deepcopy(episodes), 1, lambda metrics: None)
        assert metrics["loss"] == pytest.approx(-float(mean), rel=1e-4), loss_type


def test_an_episode_that_sampled_nothing_is_not_trained_on(episodes: list[Sample]) -> None:
    broken = replace(episodes[0].rollout, completion_ids=[], logprobs=[], num_tokens=-1)
    broken.episode = Episode([], [], None, "error", "OSError: gone")
    batch = make_batch([episodes[1].rollout, broken])
    assert [sample.rollout for sample in batch.samples] == batch.rollouts[:1]
    assert batch.metrics()["episodes/ended_by_error"] == 0.5
    assert batch.metrics()["episodes/turns"] == 1


def test_calls_are_counted(episodes: list[Sample]) -> None:
    """And those who call once at least, and what looks like a call and is none."""
    rollouts = [copy.deepcopy(sample.rollout) for sample in episodes[:4]]
    for rollout, calls, malformed in zip(rollouts, (3, 0, 1, 0), (0, 2, 0, 0), strict=True):
        rollout.episode.num_tool_calls = calls
        rollout.episode.num_malformed_calls = malformed
    metrics = make_batch(rollouts).metrics()
    names = ("tool_calls", "malformed_calls", "calling")
    assert [metrics[f"episodes/{name}"] for name in names] == [1.0, 0.5, 0.5]


def test_what_ended_episodes_is_counted() -> None:
    ends = ("done", "done", "turns", "tokens", "tool_time", "error", "turns", "done")
    metrics = describe_episodes([Episode([], MESSAGES, ended=why) for why in ends])
    counted = {name: value for name, value in metrics.items() if "ended_by" in name}
    shares = {"turns": 2 / 8, "tokens": 1 / 8, "tool_time": 1 / 8, "error": 1 / 8}
    assert counted == {f"episodes/ended_by_{why}": share for why, share in shares.items()}
    assert describe_episodes([]) == {}


def make_batch(rollouts: list[Rollout]) -> Batch:
    problem = Problem("p", "math", [{"role": "user", "content": "5+3?"}], "8")
    scorer = Scorer([Reward(function="rewards.math_correct")], environment_weight=0.5)
    owned = [replace(rollout, problem_id="p") for rollout in rollouts]
    group = Group(problem, owned, scorer.score([problem] * len(owned), owned))
    return Batch(1, 1, [group], [group], 1, {"sample": 1.0, "score": 0.0})


def test_files_and_checkpoints_keep_an_episode(episodes: list[Sample], tmp_path: Path) -> None:
    rollouts = [sample.rollout for sample in episodes[:3]]
    rollouts[0].episode.reward, rollouts[1].episode.num_tool_calls = 0.25, 3
    batch = make_batch(rollouts)
    assert Batch.from_state(batch.state_dict()) == batch
    RolloutFiles(tmp_path, KeptRollouts()).write(1, batch.records(), batch.facts())
    replayed = ReplayBatches(tmp_path, needs_routes=False, has_old_weights=False).take(1)
    assert replayed.rollouts == batch.rollouts

    journal = SampleJournal(tmp_path / "journal", "digest")
    with journal:
        for rollout in batch.rollouts:
            journal.add_sample(replace(rollout, sample=7))
    journal.read()
    [found] = journal.find_samples("p", 8).values()
    assert found == replace(batch.rollouts[-1], sample=7, prompt_ids=[], logprobs=[])


def test_files_of_single_turns_have_no_column_of_episodes(
    samples: list[Sample], tmp_path: Path
) -> None:
    batch = make_batch([sample.rollout for sample in samples[:2]])
    RolloutFiles(tmp_path, KeptRollouts()).write(1, batch.records(), batch.facts())
    [path] = list_steps(tmp_path).values()
    assert read_table(path, ["episode"]).column_names == []
    assert "episode" not in batch.state_dict()["groups"][0]["rollouts"][0]
    assert not any(name.startswith("episodes/") for name in batch.metrics())


def test_an_environments_reward_joins_the_functions(episodes: list[Sample]) -> None:
    rewards = [0.5, None, 1.0]
    rollouts = [sample.rollout for sample in episodes[:3]]
    for rollout, reward in zip(rollouts, rewards):
        rollout.episode.reward, rollout.completion = reward, "so\n\\boxed{8}"
    rollouts[2].episode.ended, rollouts[2].episode.error = "error", "OSError: gone"
    scores: list[Score] = make_batch(rollouts).groups[0].scores
    assert [score.rewards["environment"] for score in scores] == rewards
    assert [score.total for score in scores] == [1.25, 1.0, None]
    assert scores[2].extra == {"environment_error": "OSError: gone"}


SEEN: list[dict] = []


def remember(**columns: object) -> list[None]:
    SEEN.append(columns)
    return [None] * len(columns["completions"])


def test_rewards_are_given_what_was_sampled(
    episodes: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = next(s.rollout for s in episodes if len(s.rollout.episode.given) == 2)
    problem = Problem("p", "math", [{"role": "user", "content": "5+3?"}], "8")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for conversational in (False, True):
        reward = Reward(function="test_episodes.remember", conversational=conversational)
        call = Scorer([reward]).calls[0]
        call.function = remember
        call.run([problem], [rollout], {}, [Score()])
    plain, conversational = SEEN
    assert plain["completions"] == [rollout.completion]
    assert plain["completion_ids"] == [rollout.pick_sampled(rollout.completion_ids)]
    assert len(plain["completion_ids"][0]) == len(rollout.completion_ids) - 3
    assert conversational["completions"] == [MESSAGES]
