"""The backend cuda on machines that lack something: it says what, and `auto` goes on without it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from docs_support import unchanged
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastrnn
from fastrnn import backends
from fastrnn.backends.base import Query
from fastrnn.backends.cuda import Cuda
from fastrnn.cells import CELLS

QUERY = Query("lstm", "cuda", torch.float32, 7, 5, 3, 19, 19, 1)

TEXT = {"cells": list(CELLS), "sizes": {name: cell.sizes for name, cell in CELLS.items()}}


def fail(*_: object) -> None:
    raise RuntimeError("CUDA: cudaDeviceGetAttribute: CUDA driver version is insufficient for CUDA runtime version")


@pytest.fixture
def outdated(monkeypatch):
    """Kernels whose CUDA runtime is newer than the driver, on a machine with a GPU."""
    backend = Cuda(lambda: (SimpleNamespace(**TEXT, limits=fail, plan=fail), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
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
    backend = Cuda(lambda: (SimpleNamespace(**TEXT, limits=fail, plan=fail), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unsupported(QUERY) == "there is no GPU"


class Device(SimpleNamespace):
    """What a plan goes by, and what it says of it."""


@pytest.fixture
def two(monkeypatch):
    """The backend on a machine with two GPUs that differ, the first of them torch's current one."""
    devices = [Device(name="large", multiprocessors=64), Device(name="small", multiprocessors=16)]
    asked, current = [], [0]

    @contextlib.contextmanager
    def device(which):
        current.append(which.index)
        yield
        current.pop()

    def plan(*request):
        *_, hidden, limits = request
        error = "H is too large for it" if limits.name == "small" and hidden > 100 else ""
        return Planned(limits, error)

    def limits(index):
        assert current[-1] == index  # which the driver is asked of
        asked.append(index)
        return devices[index]

    module = SimpleNamespace(**TEXT, limits=limits, plan=plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    with unchanged(backends.BACKENDS):
        backends.BACKENDS["cuda"] = Cuda(lambda: (module, ""))
        del backends.BACKENDS["triton"]
        backends.clear_choices()
        yield asked
    backends.clear_choices()


class Planned:
    def __init__(self, limits: Device, error: str) -> None:
        self.limits, self.error, self.grid = limits, error, (8, 1)

    def __str__(self) -> str:
        return f"on the {self.limits.name} one"


def test_the_plan_is_for_the_device_of_the_call(two):
    backend = backends.BACKENDS["cuda"]
    for index, name, share in ((0, "large", 8 / 64), (1, "small", 8 / 16)):
        query = QUERY._replace(device_index=index)
        assert backends.choose(query, "cuda").reason == f"asked for by name: on the {name} one"
        assert backend.share(query) == share
        assert backend.plan("lstm", 0, False, 1, 5, 24, index).limits.name == name
    large = QUERY._replace(H=128, P=128)
    assert backend.unsupported(large) is None
    assert backend.unsupported(large._replace(device_index=1)) == "H is too large for it"
    assert sorted(two) == [0, 1], "each device is asked once"


@pytest.mark.parametrize("make", [fastrnn.LSTM, fastrnn.LSTMCell])
def test_a_call_says_which_device_it_is_on(make):
    second, mode = torch.device("cuda:1"), FakeTensorMode()
    module = make(3, 4, device="meta")
    for name, p in module.named_parameters():
        module._parameters[name] = FakeTensor(mode, p.detach(), second)
    with mode:
        query = module._prepare(FakeTensor(mode, torch.empty(2, 3, device="meta"), second), None, None, None).query
    assert (query.device, query.device_index) == ("cuda", 1)


def test_a_call_on_the_cpu_loads_no_kernels():
    def load() -> tuple[None, str]:
        raise AssertionError("loaded")

    assert "these are on cpu" in str(Cuda(load).unsupported(QUERY._replace(device="cpu")))


def test_kernels_of_another_text_are_not_run(monkeypatch):
    """Which would read and write other memory."""
    sizes = {**TEXT["sizes"], "lstm": (4, 2, 4, 4, 3)}
    backend = Cuda(lambda: (SimpleNamespace(cells=list(CELLS), sizes=sizes, limits=fail, plan=fail), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.unsupported(QUERY) == (
        "its C++ text of lstm has gates, states, tape, dgates, params (4, 2, 4, 4, 3), "
        "fastrnn/cells has (4, 2, 4, 4, 0): compile anew"
    )
