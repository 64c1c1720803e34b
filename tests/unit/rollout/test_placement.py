"""Where engines fit, on GPUs too, as far as it can be seen without; and how Ray is started."""

import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faked_gpu import fake_gpu
from transformers import AutoConfig

from r1pipe.config.recipe import Engine, SamplerPlace
from r1pipe.rollout.engines import Engines
from r1pipe.rollout.placement import (
    Answer,
    LocalProcess,
    RayPlacement,
    check_placement,
    cut_gpus,
    join_ray,
    list_spare_gpus,
)
from r1pipe.rollout.weight_transfer import choose_backend
from r1pipe.utils.errors import UserError


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of four GPUs, two are those of the trainer's ranks."""
    fake_gpu(monkeypatch)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    return ["3", "1"]


def test_engines_take_the_gpus_after_the_trainers(
    spare: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list_spare_gpus() == spare
    assert cut_gpus(1) == spare[:1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cut_gpus(1) == spare[1:]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list_spare_gpus() == ["2", "3"]


def test_a_process_sees_one_gpu_or_computes_with_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its beginning: torch reads both as it is imported."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    found = []
    for gpu in ("3", None):
        host = LocalProcess(1, gpu)
        process = Path(f"/proc/{host.process.pid}")
        starter = "spawn_main" if gpu else "forkserver"
        while starter not in (process / "cmdline").read_text():  # still a copy of this one
            time.sleep(0.01)
        variables = (process / "environ").read_text().split("\0")
        host.kill()
        names = ("CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=")
        found.append(sorted(each for each in variables if each.startswith(names)))
    assert found == [["CUDA_VISIBLE_DEVICES=3", "OMP_NUM_THREADS=5"], ["OMP_NUM_THREADS=1"]]


@pytest.mark.parametrize("num_sent", [0, 2, 4, 6])
def test_an_engine_that_ends_while_it_answers_is_lost(num_sent: int) -> None:
    host = LocalProcess.__new__(LocalProcess)
    host.connection, theirs = multiprocessing.Pipe()
    host.process = SimpleNamespace(join=lambda: None, exitcode=-signal.SIGKILL)
    os.write(theirs.fileno(), (struct.pack("!i", 100) + bytes(100))[:num_sent])
    theirs.close()
    assert host.receive() == Answer("lost", "ended by SIGKILL")


def test_a_fleet_stays_open_while_another_model_is_trained() -> None:
    for kind, is_open in (("fleet", True), ("colocated", False)):
        engines = Engines(Engine(), "float32", torch.device("cuda"), None, SamplerPlace(kind=kind))
        engines._sampler = SimpleNamespace(can_sleep=False, close=lambda: None)
        engines.make_room()
        assert (engines._sampler is not None) == is_open


def test_weights_travel_by_nccl_where_it_reaches_them() -> None:
    config = AutoConfig.for_model("deepseek_v3", num_nextn_predict_layers=1)
    drafting = Engine(speculative={"method": "mtp", "num_speculative_tokens": 1})
    assert choose_backend("cuda", Engine(), config) == "nccl"
    assert choose_backend("cuda", drafting, config) is None
    config.num_nextn_predict_layers = 0  # a student, which is sampled without drafts
    assert choose_backend("cuda", drafting, config) == "nccl"
    assert choose_backend("cpu", Engine(), config) is None


@pytest.mark.slow
def test_ray_hands_out_the_gpus_after_the_trainers(
    spare: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray of the run's own; without GPUs it takes our word for them."""
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    placement = RayPlacement(None, 2, "cuda", 0)
    try:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,5,3,1"
        assert ray.cluster_resources()["GPU"] == 2
        actors = [placement.start(number).actor for number in range(2)]
        look = [
            actor.__ray_call__.options(concurrency_group="ask").remote(
                lambda _: (os.environ["CUDA_VISIBLE_DEVICES"], len(os.sched_getaffinity(0)))
            )
            for actor in actors
        ]
        cores = len(os.sched_getaffinity(0))
        assert sorted(ray.get(look)) == [("1", cores), ("3", cores)]
    finally:
        placement.close()


def test_a_ray_that_does_not_start_is_one_line_and_leaves_sigterm_alone() -> None:
    """As on a machine with much too much to do: a plain Exception, after taking the handler."""

    def init(*address: str, **options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Exception("The current node timed out during startup.\nLogs: none")

    def handle(*signals: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(UserError, match="it does not start: The current node timed") as error:
            join_ray(SimpleNamespace(init=init), None, 2, "cpu")
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
