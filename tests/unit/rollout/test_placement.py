"""Where engines fit, and Ray's start, with what it does to a run's process."""

import signal
from types import SimpleNamespace

import pytest

from r1pipe.config.recipe import SamplerPlace
from r1pipe.rollout.placement import check_placement, join_ray
from r1pipe.utils.errors import UserError


def test_a_ray_that_does_not_start_is_one_line_and_leaves_sigterm_alone() -> None:
    """As on a machine with much too much to do: a plain Exception, after taking the handler."""

    def init(*address: str, **options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Exception("The current node timed out during startup.\nLogs: none")

    def handle(*signals: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(UserError, match="it does not start: The current node timed") as error:
            join_ray(SimpleNamespace(init=init), None, 2)
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "\n" not in str(error.value)


# (engines, reward workers, processes of this machine, words of the refusal)
SHARES = [
    (4, 0, 2, None),
    (3, 0, 2, "sampler.engines 3: the trainer's 2 processes have as many each: take 2"),
    (6, 0, 2, "sampler.engines 6: each takes a core, and there are 4: take 4 or fewer"),
    (6, 0, 1, None),
    (10, 0, 1, "sampler.engines 10: each takes a core, and there are 4: take 8 or fewer"),
    (2, 3, 2, "sampler.reward_workers 3: the trainer's 2 processes"),
]


@pytest.mark.parametrize(("engines", "workers", "here", "refusal"), SHARES)
def test_two_processes_have_as_many_engines_each(
    engines: int, workers: int, here: int, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which this machine has room for those of its own processes."""
    monkeypatch.setattr("r1pipe.rollout.placement.available_cores", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    ray = "auto" if workers else None
    place = SamplerPlace(kind="fleet", engines=engines, ray=ray, reward_workers=workers)
    if refusal is None:
        check_placement(place, "cpu")
        return
    with pytest.raises(UserError) as error:
        check_placement(place, "cpu")
    assert str(error.value).startswith(refusal)
