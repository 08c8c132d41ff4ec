"""Peers: each says why it is absent, and an adapter gives torch.nn's numbers from the package's own interface.

The packages are stood in for by plain PyTorch under their interfaces, as their documents give them.
"""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.bench import adapters, measuring, parity, peers, shapes
from fastrnn.bench.grids import Job
from fastrnn.bench.subjects import pair
from fastrnn.cells import CELLS

CASE = shapes.Case("x", T=7, B=5, I=11, H=19)


def job(cell, mode="training", dtype="float32", case=CASE):
    return Job("timing", case, cell, mode, dtype, "cpu", 1)


def sides(j):
    dtype = adapters.DTYPES[j.dtype]
    baseline, subject = pair(j.case, j.cell, j.mode, dtype, fastrnn)
    return {"torch.nn": baseline, "fastrnn": subject}


def assert_equal_numbers(make, j):
    both = sides(j)
    want, got = both["torch.nn"].observe(), make(j, both).observe()
    assert got.keys() >= ({"y", "grad x"} if j.mode == "training" else {"y"})
    parity.check({name: want[name] for name in got}, got, adapters.DTYPES[j.dtype])


def gated(cell, xg, R, bias_h, H):
    """(T, B, G*H) -> y by the cell's own text; R (G*H, H)."""
    cell = CELLS[cell]
    state = tuple(xg.new_zeros(xg.shape[1], H) for _ in range(cell.states))
    y = []
    for x in xg:
        r = linear(state[0], R, bias_h).chunk(cell.gates, -1)
        state = cell.step(x.chunk(cell.gates, -1), r, state, (), torch.sigmoid, torch.tanh, torch.where)[0]
        y.append(state[0])
    return torch.stack(y), state


NAMES = {"lstm": "lstm", "gru": "gru", "elman": "rnn_tanh"}


def flashrnn(Wx, R, b, states=None, function="lstm", backend="cuda_fused", dtype="bfloat16"):
    H = Wx.shape[-1]
    xg = Wx.transpose(0, 1).squeeze(3)  # (T, B, gates, H)
    R, b = R.squeeze(1), b.squeeze(1)
    if function == "gru":  # recurrent n, r, z; biases of n's recurrent part, r, z, n's input part
        xg = xg + b[1:]
        R, bias = R[[1, 2, 0]], torch.stack([b.new_zeros(H), b.new_zeros(H), b[0]])
    else:
        bias = b
    y, _ = gated(NAMES[function], xg.flatten(2), R.reshape(-1, H), bias.flatten(), H)
    return y.transpose(0, 1)[None, :, :, None], None


class HasteLayer(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.hidden = hidden
        self.kernel = nn.Parameter(torch.empty(inputs, self.gates * hidden))
        self.recurrent_kernel = nn.Parameter(torch.empty(hidden, self.gates * hidden))
        self.bias = nn.Parameter(torch.empty(self.gates * hidden))
        if self.gates == 3:
            self.recurrent_bias = nn.Parameter(torch.empty(self.gates * hidden))

    def forward(self, x):
        def order(a):
            parts = a.chunk(self.gates, -1)
            return torch.cat([parts[i] for i in self.order], -1)

        bias = order(self.recurrent_bias) if self.gates == 3 else None
        xg = x @ order(self.kernel) + order(self.bias)
        return gated(self.cell, xg, order(self.recurrent_kernel).t(), bias, self.hidden)


class HasteLSTM(HasteLayer):
    gates, cell, order = 4, "lstm", (0, 2, 1, 3)  # from i, g, f, o


class HasteGRU(HasteLayer):
    gates, cell, order = 3, "gru", (1, 0, 2)  # from z, r, n


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init):
    assert hidden.shape == cell.shape == (*x.shape[:2], w_hh.shape[1])
    assert is_init.dtype is torch.bool
    y, state = gated("lstm", linear(x.transpose(0, 1), w_ih, b_ih), w_hh, b_hh, w_hh.shape[1])
    return y.transpose(0, 1), None, *state


def gru_triton(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init):
    y, (h,) = gated("gru", linear(x.transpose(0, 1), w_ih, b_ih), w_hh, b_hh, w_hh.shape[1])
    return y.transpose(0, 1), h


def xma_rnn(x, weight):
    h, y = x.new_zeros(x.shape[0], *x.shape[2:]), []
    for t in range(x.shape[1]):
        h = torch.tanh((h[..., None, :] @ weight).squeeze(-2) + x[:, t])
        y.append(h)
    return torch.stack(y, 1), h


@pytest.fixture
def packages(monkeypatch):
    recurrence = "torchrl.modules.tensordict_module._rnn_triton"
    for name, content in {
        "flashrnn": {"flashrnn": flashrnn},
        "haste_pytorch": {"LSTM": HasteLSTM, "GRU": HasteGRU},
        "xma": {"rnn": xma_rnn},
        recurrence: {"lstm_triton": lstm_triton, "gru_triton": gru_triton},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        for part in ("torchrl", "torchrl.modules", "torchrl.modules.tensordict_module"):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))


@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
@pytest.mark.parametrize(
    ("make", "cell", "dtype"),
    [
        *((adapters.flashrnn, cell, "bfloat16") for cell in shapes.CELLS),
        *((adapters.haste, cell, "float32") for cell in ("LSTM", "GRU")),
        *((adapters.torchrl, cell, "float32") for cell in ("LSTM", "GRU")),
        (adapters.xma, "RNN", "float32"),
    ],
)
def test_an_adapter_gives_torchs_numbers(packages, make, cell, dtype, mode):
    with torch.set_grad_enabled(mode != "inference"):
        assert_equal_numbers(make, job(cell, mode, dtype))


@pytest.mark.parametrize("cell", shapes.CELLS)
def test_the_loop_gives_torchs_numbers(monkeypatch, cell):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # that it compiles is torch's affair
    peers._compiled_step.cache_clear()
    assert_equal_numbers(peers.compiled_loop, job(cell))
    peers._compiled_step.cache_clear()


def test_an_adapter_refuses_what_its_package_lacks(packages):
    packed = shapes.Case("p", 7, 5, 11, 19, form="packed", lengths=(7, 5, 3, 2, 1))
    for make, j, reason in (
        (adapters.haste, job("RNN"), "has LSTM, GRU only"),
        (adapters.xma, job("GRU"), "has RNN only"),
        (adapters.flashrnn, job("LSTM"), "has bfloat16 only"),
        (adapters.haste, job("LSTM", case=packed), "over a dense batch"),
    ):
        with pytest.raises(adapters.Absent, match=reason):
            make(j, sides(j))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_by_name_runs_or_says_why_not(name):
    j = job("LSTM")
    make = functools.partial(peers.by_backend, backend=name)
    if BACKENDS[name].unsupported(peers.query_of(sides(j)["fastrnn"])) is None:
        assert_equal_numbers(make, j)
    else:
        with pytest.raises(adapters.Absent, match=f"backend '{name}' cannot run this call"):
            make(j, sides(j))


def test_every_peer_is_there_or_says_why_not():
    rows = dict(peers.table("cpu"))
    assert rows.keys() == {p.name for p in peers.PEERS}
    assert rows["torch.nn graph"] == "absent: runs on a CUDA device only"
    for package, name in (("haste_pytorch", "Haste"), ("flashrnn", "FlashRNN"), ("torchrl", "TorchRL"), ("xma", "XMA")):
        if importlib.util.find_spec(package) is None:
            assert rows[name] == f"absent: {package} is not installed"
    assert dict(peers.table("cpu", ()))["compiled loop"] == "absent: not asked for: --peers compiled loop"


def test_a_peer_that_is_wrong_is_not_timed_and_ours_is(monkeypatch):
    def wrong(j, both):
        side = peers.by_backend(j, both, "reference")
        return adapters.Subject(side.module, side.iterate, lambda r: {"y": side.read(r)["y"] * 1.01})

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("wrong", wrong), peers.Peer("loop", peers.compiled_loop)))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    peers._compiled_step.cache_clear()
    options = measuring.Options(fastrnn, sample=0.0, rounds=2, peers=("wrong", "loop"))
    record = measuring.timing(job("LSTM"), options)
    peers._compiled_step.cache_clear()
    assert "Mismatch: y: differs" in record["peers"]["wrong"]["absent"]
    assert record["peers"]["loop"]["ratio"]["p50"] > 0
    assert record["ratio"]["p50"] > 0
