"""Weights reach a fleet's engines by vLLM's weight transfer: its own code, with gloo for NCCL.

tests/gpu has the same tests by NCCL.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import gloo_transfer
import pytest
from test_engine import CPU, make_model
from test_faults import PROBLEMS, save_mixture
from test_fleet import LONG, SETTINGS, measure_diffs, sample_in_flight
from torch import Tensor
from transformers import PreTrainedModel

from r1pipe.config.recipe import SamplerPlace
from r1pipe.models.weights import export_weights
from r1pipe.rollout import weight_transfer
from r1pipe.rollout.fleet import Fleet
from r1pipe.utils.errors import UserError

LIMITS = {"cpu": 1e-5, "cuda": 1e-3}
"""Mean |sampler - trainer| log-probability in float32; other weights' are 0.1 and more off."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def fleet(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two engines need two cores")
    plugins = tmp_path_factory.mktemp("plugins")
    gloo_transfer.announce(plugins)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(plugins)
        for each in gloo_transfer.list_patches():
            patch.setattr(*each)
        patch.setitem(weight_transfer.BACKENDS, "cpu", "nccl")
        patch.setattr(weight_transfer, "BUFFER_BYTES", 2**18)  # several parts
        place = SamplerPlace(kind="fleet", engines=2)
        fleet = Fleet(str(checkpoint), SETTINGS, "float32", CPU, place=place)
        yield fleet
        fleet.close()


def sync(fleet: Fleet, seed: int) -> dict[int, PreTrainedModel]:
    """The model by its version."""
    model = make_model("deepseek_v3", fleet.tokenizer, seed).to(fleet.device)
    fleet.load_weights(export_weights(model))
    return {fleet.version: model.cpu().eval()}


def require_sampled_by(fleet: Fleet, model: dict[int, PreTrainedModel]) -> None:
    """Every engine, and nothing is missing."""
    groups = list(fleet.generate_groups(PROBLEMS, 2, LONG, (fleet.version,)))
    assert sorted(group.index for group in groups) == list(range(len(PROBLEMS)))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {version for rollout in rollouts for version in rollout.versions} == set(model)
    assert measure_diffs(model, rollouts).mean() < LIMITS[fleet.device.type]


@pytest.fixture(autouse=True)
def synced(fleet: Fleet, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Begins with a communicator of all engines. The broadcasts since: whether each was the first
    of a new one."""
    sent = []
    begin = weight_transfer.Broadcast.begin

    def begin_and_count(self: weight_transfer.Broadcast, weights: Iterator) -> dict | None:
        group = begin(self, weights)
        sent.append(group is not None)
        return group

    fleet.load_checkpoint(str(checkpoint))
    sync(fleet, 0)
    sync(fleet, 1)
    monkeypatch.setattr(weight_transfer.Broadcast, "begin", begin_and_count)
    return sent


def test_a_sync_reaches_every_engine(fleet: Fleet, synced: list[bool]) -> None:
    """By the communicator that is there."""
    for seed in (2, 3):
        require_sampled_by(fleet, sync(fleet, seed))
    assert synced == [False, False]


@pytest.mark.slow
def test_weights_change_between_two_steps(fleet: Fleet, synced: list[bool]) -> None:
    models = sync(fleet, 4)
    groups = sample_in_flight(fleet, 8, lambda: models.update(sync(fleet, 5)))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {version for rollout in rollouts for version in rollout.versions} == set(models)
    assert any(len(set(rollout.versions)) > 1 for rollout in rollouts)
    assert measure_diffs(models, rollouts).mean() < LIMITS[fleet.device.type]
    assert synced == [False, False]


def sync_and_meanwhile(fleet: Fleet, seed: int, do: signal.Signals) -> dict[int, PreTrainedModel]:
    """The signal comes to the last engine when some weights are on their way."""
    model = make_model("deepseek_v3", fleet.tokenizer, seed).to(fleet.device)

    def send() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(export_weights(model)):
            if number == 20:
                os.kill(fleet.members[-1].process, do)
            yield pair

    fleet.load_weights(send())
    return {fleet.version: model.cpu().eval()}


@pytest.mark.slow
def test_an_engine_killed_while_weights_travel(fleet: Fleet, synced: list[bool]) -> None:
    """Those that would wait for it are replaced too; the next sync has a new communicator."""
    replaced = fleet.num_replaced
    require_sampled_by(fleet, sync_and_meanwhile(fleet, 6, signal.SIGKILL))
    assert replaced < fleet.num_replaced <= replaced + len(fleet.members)
    require_sampled_by(fleet, sync(fleet, 7))
    assert synced == [False, True]


@pytest.mark.slow
def test_an_engine_hung_while_weights_travel(
    fleet: Fleet, synced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = fleet._replace

    def replace_once(*arguments: object) -> None:
        monkeypatch.setattr(fleet, "hang_s", None)  # an engine takes longer to start
        replace(*arguments)

    monkeypatch.setattr(fleet, "_replace", replace_once)
    monkeypatch.setattr(fleet, "hang_s", 3.0)
    require_sampled_by(fleet, sync_and_meanwhile(fleet, 8, signal.SIGSTOP))
    require_sampled_by(fleet, sync(fleet, 9))
    assert synced == [False, True]


@pytest.mark.slow
def test_an_engine_killed_while_idle(fleet: Fleet, synced: list[bool]) -> None:
    """It is found before the broadcast: nobody waits for it, and the others stay."""
    first = fleet.members[0].process
    os.kill(fleet.members[-1].process, signal.SIGKILL)
    fleet.members[-1].host.process.join()
    require_sampled_by(fleet, sync(fleet, 10))
    assert synced == []
    require_sampled_by(fleet, sync(fleet, 11))
    assert synced == [True]
    assert len(fleet.members) == 1 or fleet.members[0].process == first


@pytest.mark.slow
def test_weights_that_cannot_be_sent_end_the_sync(fleet: Fleet, synced: list[bool]) -> None:
    """With the trainer's own error. Last here: engines wait for the rest until the fleet closes."""

    def fail() -> Iterator[tuple[str, Tensor]]:
        yield from list(export_weights(make_model("deepseek_v3", fleet.tokenizer, 12)))[:20]
        raise UserError("broken weights")

    with pytest.raises(UserError, match="broken weights"):
        fleet.load_weights(fail())
