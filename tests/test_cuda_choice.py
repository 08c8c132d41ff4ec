"""The backend cuda on machines that lack something: it says what, and `auto` goes on without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from docs_support import unchanged

from fastrnn import backends
from fastrnn.backends.base import Query
from fastrnn.backends.cuda import Cuda
from fastrnn.cells import CELLS

QUERY = Query("lstm", "cuda", torch.float32, 7, 5, 3, 19, 19, 1)


def fail(*_: object) -> None:
    raise RuntimeError("CUDA: cudaDeviceGetAttribute: CUDA driver version is insufficient for CUDA runtime version")


@pytest.fixture
def outdated(monkeypatch):
    """Kernels whose CUDA runtime is newer than the driver, on a machine with a GPU."""
    backend = Cuda(lambda: (SimpleNamespace(cells=list(CELLS), limits=fail, plan=fail), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with unchanged(backends.BACKENDS):  # their order, too: it is that of `auto`
        backends.BACKENDS["cuda"] = backend
        del backends.BACKENDS["triton"]  # which would ask the GPU, too
        backends.clear_choices()
        yield


@pytest.mark.usefixtures("outdated")
def test_kernels_newer_than_the_driver_leave_auto_alone():
    choice = backends.choose(QUERY)
    assert choice.backend.name != "cuda"
    assert "driver version is insufficient" in choice.reason
    with pytest.raises(RuntimeError, match=r"cannot run this call: .*driver version is insufficient"):
        backends.choose(QUERY, "cuda")


def test_without_a_gpu_the_device_is_not_asked(monkeypatch):
    backend = Cuda(lambda: (SimpleNamespace(cells=list(CELLS), limits=fail, plan=fail), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unsupported(QUERY) == "there is no GPU"


def test_a_call_on_the_cpu_loads_no_kernels():
    def load() -> tuple[None, str]:
        raise AssertionError("loaded")

    assert "these are on cpu" in str(Cuda(load).unsupported(QUERY._replace(device="cpu")))
