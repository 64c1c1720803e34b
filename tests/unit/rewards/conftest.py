"""One worker for all tests here: they check what is judged, not how fast."""

import pytest

import rewards


@pytest.fixture(autouse=True, scope="package")
def one_worker():
    rewards.configure_workers(num_workers=1)
    yield
    rewards.shut_down_workers()
