"""Captures as CUDA graphs: torch's own contexts, over streams and a recording of operators that need no GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.bench import adapters, parity, peers, shapes
from fastrnn.bench.grids import Job
from fastrnn.bench.measuring import Options, settings
from fastrnn.bench.subjects import pair

CASE = shapes.Case("x", T=7, B=5, I=11, H=19)


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, device):
        self.waited = []
        device.streams.append(self)

    def wait_stream(self, other):
        self.waited.append(other)


class Recording(TorchDispatchMode):
    """The operators that run under it, and what they have returned."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.steps.append((operator, args, kwargs or {}, out, torch.is_grad_enabled()))
        return out


class Graph:
    """torch.cuda.CUDAGraph: a replay writes where the recorded operators have written."""

    def capture_begin(self, **_):
        self.recording = Recording()
        self.recording.__enter__()

    def capture_end(self):
        self.recording.__exit__(None, None, None)
        if Device.refused:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for operator, args, kwargs, out, enabled in self.recording.steps:
                with torch.set_grad_enabled(enabled):  # oneDNN keeps its workspace only then
                    again = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Device:
    """torch.cuda's streams, of which one is the current."""

    refused = False  # whether the capture has met an error

    def __init__(self):
        self.streams = []
        self.current = self.own = Stream(self)

    def set_stream(self, stream):
        self.current = stream


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(Device, "refused", False)
    for name, stand_in in {
        "Stream": lambda: Stream(found),
        "current_stream": lambda *_: found.current,
        "set_stream": found.set_stream,
        "_get_device_index": lambda *_: 0,  # torch.cuda.stream does nothing where there is no device
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return found


@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
@pytest.mark.parametrize("name", ["torch.nn", "fastrnn"])
@pytest.mark.parametrize("cell", shapes.CELLS)
def test_a_replay_writes_what_the_captured_call_has_returned(device, cell, name, mode):
    job = Job("timing", CASE, cell, mode, "float32", "cpu", 1)
    with settings(job, Options(fastrnn)):
        sides = dict(zip(("torch.nn", "fastrnn"), pair(CASE, cell, mode, torch.float32, fastrnn), strict=True))
        graph = peers.graphed(job, sides, name)
        x, before = sides[name].arguments[0], graph.observe()
        before = {key: a.clone() for key, a in before.items()}
        with torch.no_grad():
            x.mul_(-0.5)
            for a in graph.observe().values():
                a.fill_(torch.nan)  # but for what the replay writes
        got = {key: a.clone() for key, a in graph.observe().items()}
        want = sides[name].observe()
    assert got.keys() == want.keys()
    parity.check(want, got, torch.float32)
    with pytest.raises(parity.Mismatch):
        parity.check(want, before, torch.float32)


def test_the_call_is_warmed_up_and_captured_on_streams_that_wait_for_each_other(device):
    seen = []
    replay, returned = peers.capture(lambda: seen.append(device.current) or len(seen))
    own, warm, capturing = device.streams
    assert seen == [warm] * 3 + [capturing]
    assert warm.waited == [own]
    assert own.waited == [warm]
    assert returned == 4
    assert device.current is own
    replay()
    assert len(seen) == 4  # a replay runs no Python


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("cuDNN cannot\nbe captured"), "cuDNN cannot"), (RuntimeError(), "RuntimeError")],
)
@pytest.mark.parametrize("at", ["warm-up", "capture"])
def test_a_call_that_cannot_be_captured_is_absent_and_leaves_the_stream(device, error, reason, at):
    job = Job("timing", CASE, "GRU", "inference", "float32", "cpu", 1)
    side = pair(CASE, "GRU", "inference", torch.float32, fastrnn)[0]
    calls = []

    def iterate():
        calls.append(device.current)
        if at == "warm-up" or len(calls) == 4:
            Device.refused = at == "capture"
            raise error

    broken = adapters.Subject(side.module, iterate, side.read)
    with pytest.raises(adapters.Absent, match=f"^cannot be captured: {reason}$"):
        peers.graphed(job, {"torch.nn": broken}, "torch.nn")
    assert len(calls) == (1 if at == "warm-up" else 4)
    assert calls[-1] is not device.own
    assert device.current is device.own


def test_a_capture_whose_end_alone_fails_tells_that(device):
    def iterate():
        Device.refused = True

    job = Job("timing", CASE, "GRU", "inference", "float32", "cpu", 1)
    with pytest.raises(adapters.Absent, match="operation failed due to"):
        peers.graphed(job, {"fastrnn": adapters.Subject(None, iterate, None)}, "fastrnn")
    assert device.current is device.own
