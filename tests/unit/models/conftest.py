"""Kernels and inputs of the tests of tiny models."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from r1pipe.models.model import fast_training_kernels


@pytest.fixture(autouse=True)
def small_kernels() -> Iterator[None]:
    """Nothing here is worth a second thread, which waits busily for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fast_training_kernels(torch.device("cpu"), "float32"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def ids_BL() -> Tensor:
    return torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))
