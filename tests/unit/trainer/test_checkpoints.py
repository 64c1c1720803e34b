"""Checkpoints: whole or not at all, the newest and the best kept, damage noticed, logs cut back."""

import errno
import io
import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from r1pipe.config.sft import Supervised
from r1pipe.runs.folder import find_steps
from r1pipe.runs.logs import JsonlLog
from r1pipe.trainer.checkpoints import Checkpoints, read_manifest
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import Interrupt


class Numbers:
    """A part of a stage whose state can be seen."""

    def __init__(self, size: int = 10):
        self.tensor, self.text = torch.zeros(size), ""

    def learn(self, step: int) -> None:
        self.tensor += step
        self.text = f"after {step}"

    def state_dict(self) -> dict:
        return {"tensor": self.tensor, "text": self.text}

    def load_state_dict(self, state: dict) -> None:
        self.tensor, self.text = state["tensor"], state["text"]


class Stage:
    """What a stage does with its checkpoints, in a process that can be started again."""

    def __init__(self, folder: Path, size: int = 10, **settings: object):
        self.part = Numbers(size)
        self.log = JsonlLog(folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(
            folder,
            Supervised(max_steps=9, **settings),
            "stage",
            parts={"numbers": self.part},
            logs={"metrics": self.log},
        )
        self.step = self.checkpoints.restore_last_good()

    def run(self, until: int, scores: dict[int, float] | None = None) -> None:
        for step in range(self.step + 1, until + 1):
            self.part.learn(step)
            self.log.write({"step": step, "x": "ä" * step})
            self.checkpoints.end_step(step, (scores or {}).get(step))
            self.step = step

    def steps_kept(self) -> list[int]:
        return find_steps(self.checkpoints.folder)

    def steps_logged(self) -> list[int]:
        return [json.loads(line)["step"] for line in self.log.path.read_text().splitlines()]


def test_resumes_from_the_newest(tmp_path: Path) -> None:
    Stage(tmp_path, save_steps=2).run(5)
    again = Stage(tmp_path, save_steps=2)
    assert again.step == 4
    assert again.part.text == "after 4"
    assert torch.equal(again.part.tensor, torch.full((10,), 10.0))
    assert again.steps_logged() == [1, 2, 3, 4]
    again.run(6)
    assert again.steps_logged() == [1, 2, 3, 4, 5, 6]


def test_without_checkpoints_it_begins_with_empty_logs(tmp_path: Path) -> None:
    Stage(tmp_path, save_steps=None).run(3)
    again = Stage(tmp_path, save_steps=None)
    assert again.step == 0
    assert again.steps_logged() == []


def test_random_states_are_restored(tmp_path: Path) -> None:
    stage = Stage(tmp_path, save_steps=1)
    stage.run(1)

    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    expected = draw()
    assert draw() != expected
    stage.checkpoints.restore_last_good()
    assert draw() == expected


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: float("nan"), 4: 0.2, 5: 0.3, 6: 0.4}
    stage = Stage(tmp_path, save_steps=1, save_total_limit=2)
    stage.run(6, scores)
    assert stage.steps_kept() == [2, 5, 6]
    stage.run(7, {7: 1.0})
    assert stage.steps_kept() == [6, 7]


def test_without_scores_only_the_newest_are_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, save_steps=1, save_total_limit=2)
    stage.run(5)
    assert stage.steps_kept() == [4, 5]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


DAMAGE = {
    "flipped": ("rank-0.pt", flip),
    "truncated": ("rank-0.pt", truncate),
    "missing": ("rank-0.pt", Path.unlink),
    "flipped manifest": ("manifest.json", flip),
    "truncated manifest": ("manifest.json", truncate),
    "missing manifest": ("manifest.json", Path.unlink),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_used(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Stage(tmp_path, save_steps=2).run(4)
    file, damage = DAMAGE[case]
    damage(tmp_path / "checkpoints" / "step-4" / file)
    again = Stage(tmp_path, save_steps=2)
    assert again.step == 2
    assert torch.equal(again.part.tensor, torch.full((10,), 3.0))
    assert again.steps_logged() == [1, 2]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "checkpoint of step 4 is damaged" in warnings[0]
    again.run(5)
    assert again.steps_kept() == [2, 4]


def remove_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


# What becomes of metrics.jsonl, and the steps that are in it when the stage resumes.
LOST_ROWS = {
    "gone": (Path.unlink, []),
    "empty": (lambda path: os.truncate(path, 0), []),
    "cut between rows": (lambda path: os.truncate(path, path.read_bytes().find(b"\n") + 1), [1]),
    "cut within a row": (lambda path: os.truncate(path, 60), [1, 2]),
    "without its last newline": (remove_last_byte, [1, 2, 3]),
}


@pytest.mark.parametrize("case", LOST_ROWS)
def test_whole_checkpoints_stay_whatever_becomes_of_the_log(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Stage(tmp_path, save_steps=2).run(4)
    damage, left = LOST_ROWS[case]
    damage(tmp_path / "metrics.jsonl")
    again = Stage(tmp_path, save_steps=2)
    assert (again.step, again.steps_kept()) == (4, [2, 4])
    assert torch.equal(again.part.tensor, torch.full((10,), 10.0))
    assert "warning: metrics.jsonl has lost rows" in capsys.readouterr().err
    again.run(6)
    assert again.steps_logged() == [*left, 5, 6]
    assert Stage(tmp_path, save_steps=2).steps_logged() == [*left, 5, 6]


@pytest.mark.parametrize("file", ["rank-0.pt", "manifest.json"])
def test_what_cannot_be_read_is_not_removed(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Stage(tmp_path, save_steps=2).run(4)
    path = tmp_path / "checkpoints" / "step-4" / file
    with monkeypatch.context() as patch:
        refuse(path, patch)
        with pytest.raises(UserError, match=f"step-4/{file}: cannot be read: .*left as it is"):
            Stage(tmp_path, save_steps=2)
    assert Stage(tmp_path, save_steps=2).step == 4


def refuse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to somebody who does not own it; chmod does not keep root out."""
    real = io.open

    def open_others(file: object, *args: object, **options: object) -> object:
        if file == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr("io.open", open_others)


def test_none_good_begins_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Stage(tmp_path, save_steps=2).run(4)
    for place in tmp_path.glob("checkpoints/step-*"):
        flip(place / "rank-0.pt")
    again = Stage(tmp_path, save_steps=2)
    assert again.step == 0
    assert again.steps_logged() == []
    assert "starts over" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Stage(tmp_path, save_steps=2).run(2)
    path = tmp_path / "checkpoints" / "step-2" / "manifest.json"
    manifest = read_manifest(path.parent)
    monkeypatch.setattr(
        "r1pipe.trainer.checkpoints.read_manifest", lambda place: {**manifest, "num_processes": 2}
    )
    with pytest.raises(UserError, match="saved by 2 processes, and this run has 1"):
        Stage(tmp_path, save_steps=2)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """What a full disk does to a writer, without a disk to fill: EFBIG instead of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_full_disk_leaves_the_last_good(limit: int, tmp_path: Path) -> None:
    stage = Stage(tmp_path, size=10_000, save_steps=2)
    stage.run(3)
    with largest_file(limit), pytest.raises(UserError, match="the disk is full") as caught:
        stage.checkpoints.save(4)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    again = Stage(tmp_path, size=10_000, save_steps=2)
    assert again.step == 2


def test_a_save_that_was_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    stage = Stage(tmp_path, save_steps=2)
    stage.run(2)
    half = tmp_path / "checkpoints" / ".step-3.partial"
    half.mkdir()
    (half / "rank-0.pt").write_bytes(b"half")
    again = Stage(tmp_path, save_steps=2)
    assert again.step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_asked_to_end_it_saves_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("asked", "_waiting"):
        monkeypatch.setattr(Interrupt, name, False)
    stage = Stage(tmp_path, save_steps=None)
    handler = signal.signal(signal.SIGTERM, Interrupt.handle)
    try:
        with Interrupt.deferred(60):
            stage.run(1)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                stage.run(5)
            # A second one does not wait for the step.
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert Stage(tmp_path, save_steps=None).step == 2


def test_the_grace_period_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    deferred = []

    def ask_and_wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        deferred.append(True)
        while True:
            time.sleep(0.05)

    for name in ("asked", "_waiting"):
        monkeypatch.setattr(Interrupt, name, False)
    handler = signal.signal(signal.SIGTERM, Interrupt.handle)
    try:
        with Interrupt.deferred(2.0):
            with pytest.raises(KeyboardInterrupt):
                ask_and_wait()
            assert deferred
        # Not while the run, its step saved, is being closed.
        monkeypatch.setattr(Interrupt, "asked", False)
        with Interrupt.deferred(2.0):
            os.kill(os.getpid(), signal.SIGTERM)
        Interrupt._again.join()  # it ends at once, or by a signal
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_what_is_suspect_is_not_gone_on_from(tmp_path: Path) -> None:
    stage = Stage(tmp_path, save_steps=1, save_total_limit=9)
    stage.run(5)
    stage.checkpoints.discard_from(4)
    assert stage.steps_kept() == [1, 2, 3]
    again = Stage(tmp_path, save_steps=1)
    assert (again.step, again.part.text) == (3, "after 3")
