"""Drafts are left out where they cost time."""

from types import SimpleNamespace

import pytest

from r1pipe.rollout.speculation import TRIAL_CALLS, TRIAL_PERIOD, DraftTrial


class Engine:
    """`speedup`: of drafts, by the number of requests that run together."""

    def __init__(self, speedup: dict[int, float], monkeypatch: pytest.MonkeyPatch):
        self.speedup, self.now, self.drafting = speedup, 0.0, True
        self.trial = DraftTrial(self.set_drafting)
        monkeypatch.setattr("r1pipe.rollout.speculation.time.perf_counter", lambda: self.now)

    def set_drafting(self, drafting: bool) -> None:
        self.drafting = drafting

    def sample(self, num_requests: int) -> bool:
        """Whether with drafts. The first call takes long."""
        call = self.trial.begin(num_requests)

        def step() -> list[SimpleNamespace]:
            self.now += 1.0 / (self.speedup[num_requests] if self.drafting else 1.0)
            self.now += 100.0 if self.now < 2 else 0.0
            output = SimpleNamespace(token_ids=[0] * 5)
            return num_requests * [SimpleNamespace(finished=True, outputs=[output])]

        call.time(step)
        self.trial.end(call)
        return self.drafting


IN_TRIAL = [True, *TRIAL_CALLS * [False, True]]


def test_slower_drafts_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    engine = Engine({64: 0.9}, monkeypatch)
    seen = [engine.sample(64) for _ in range(2 * TRIAL_PERIOD)]
    assert seen[: len(IN_TRIAL)] == IN_TRIAL
    assert not any(seen[len(IN_TRIAL) :])
    (line,) = capsys.readouterr().err.splitlines()
    assert "288 tokens/s with drafts, 320 without, of 64 to 127 requests" in line
    assert line.endswith("from now on without")


def test_faster_ones_stay_until_they_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine({8: 1.2}, monkeypatch)
    seen = [engine.sample(8) for _ in range(TRIAL_PERIOD)]
    assert seen == IN_TRIAL + (TRIAL_PERIOD - len(IN_TRIAL)) * [True]
    engine.speedup = {8: 0.8}
    seen = [engine.sample(8) for _ in range(TRIAL_PERIOD)]
    assert seen == IN_TRIAL + (TRIAL_PERIOD - len(IN_TRIAL)) * [False]


def test_few_requests_at_once_are_judged_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine({4: 1.5, 64: 0.9}, monkeypatch)
    for _ in range(TRIAL_PERIOD):
        few, many = engine.sample(4), engine.sample(64)
    assert few
    assert not many


def test_an_interrupted_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine({8: 0.5}, monkeypatch)
    engine.sample(8)
    for _ in range(3):
        engine.trial.begin(8)
    assert not engine.drafting
    assert [engine.sample(8) for _ in range(4)] == [False, True, False, True]
