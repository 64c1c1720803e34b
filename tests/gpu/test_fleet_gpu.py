"""Weights travel to a fleet's engines by NCCL: the tests of tests/pipeline/test_weight_transfer.py,
with the trainer's model on one GPU and an engine on each other. None of it has run yet: no machine
with two GPUs was at hand, and NCCL refuses two ranks of a communicator on one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "pipeline"))

from test_fleet import SETTINGS  # noqa: E402
from test_weight_transfer import (  # noqa: E402, F401
    checkpoint,
    synced,
    test_a_sync_reaches_every_engine,
    test_an_engine_hung_while_weights_travel,
    test_an_engine_killed_while_idle,
    test_an_engine_killed_while_weights_travel,
    test_weights_change_between_two_steps,
)

from r1pipe.config.recipe import SamplerPlace  # noqa: E402
from r1pipe.rollout import weight_transfer  # noqa: E402
from r1pipe.rollout.fleet import Fleet  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]


@pytest.fixture(scope="module")
def fleet(checkpoint: Path) -> Iterator[Fleet]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_transfer, "BUFFER_BYTES", 2**18)  # several parts
        place = SamplerPlace(kind="fleet", engines=torch.cuda.device_count() - 1)
        device = torch.device("cuda", 0)
        fleet = Fleet(str(checkpoint), SETTINGS, "float32", device, place=place)
        yield fleet
        fleet.close()
