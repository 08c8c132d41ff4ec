"""Every test starts from the same seed and with automatic choice; tests of all backends take `backend`."""

import pytest
import torch
from support import usable_backends

import fastrnn

__all__ = ["usable_backends"]


def pytest_configure(config):
    # torch.nn's own, once per process: whichever test meets it first
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """New memory holds NaN (largest value for integers), so that what a backend fails to write shows."""
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, its default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=usable_backends())
def backend(request):
    """Each backend that works on this machine, in turn, asked for by name."""
    with fastrnn.backend(request.param):
        yield request.param


@pytest.fixture(params=usable_backends(ragged=True, resets=True))
def resets_backend(request):
    with fastrnn.backend(request.param):
        yield request.param
