"""Ray's start, with what it does to a run's process."""

import signal
from types import SimpleNamespace

import pytest

from r1pipe.rollout.placement import join_ray
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
