"""The registered ops: torch.library.opcheck in all its modes, fake tensors, make_fx, dispatch modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import assert_equal, leaves, usable_backends
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.cells import CELLS

T, B, I, H, P = 4, 3, 3, 5, 2  # noqa: E741
SIZES = [3, 2, 2, 1]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no states, no bias": {"states": False, "bias": False, "reverse": (True,)},
    "lengths": {"lengths": [2, 0, 4], "reverse": (False, True)},
    "no tokens": {"lengths": [0, 0, 0]},
    "batch_sizes": {"sizes": True, "reverse": (False, True)},
    "resets": {"resets": True, "save": "states"},
    "packed resets": {"resets": True, "sizes": True, "reverse": (True,)},
    "projection": {"proj": True},
    "projection, states": {"proj": True, "bias": False, "save": "states", "lengths": [2, 0, 4]},
    "trail": {"trail": True, "lengths": [2, 0, 4], "save": "states"},
    "inference": {"save": "", "trail": True, "sizes": True, "grad": False},
    "bfloat16": {"dtype": torch.bfloat16, "grad": False},
}
OF = {backend: [cell for cell in CELLS if backend in usable_backends(cell)] for backend in usable_backends()}
# Cells, backends and cases in turn, so that each pair of a backend and a case comes once and the whole takes seconds.
CHOSEN = [
    (OF[backend][k % len(OF[backend])] if not case.startswith("projection") else "lstm", backend, case)
    for k, (case, backend) in enumerate((case, b) for b in usable_backends() for case in CASES)
    if not (backend == "native" and (CASES[case].get("resets") or CASES[case].get("trail")))
]
# What a backward writes, and what its results share memory with, is each backend's own, and checked of each. Tracing
# takes seconds and sees shapes and derivatives, no backend's own: it is checked once of each case, backends in turn.
BACKWARD = [c for c in CHOSEN if CASES[c[2]].get("save", "gates")]
TRACED = [
    found[k % len(found)] for k, found in enumerate([c for c in BACKWARD if c[2] == case] for case in CASES) if found
]
EAGER = ("test_schema", "test_autograd_registration", "test_faketensor")


def arguments(
    cell: str,
    backend: str,
    *,
    reverse: tuple[bool, ...] = (False,),
    proj: bool = False,
    bias: bool = True,
    states: bool = True,
    lengths: list[int] | None = None,
    sizes: bool = False,
    resets: bool = False,
    save: str = "gates",
    trail: bool = False,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> tuple[Any, ...]:
    gates, streams, out = CELLS[cell].gates, len(reverse), P if proj else H

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    weights = []
    for _ in reverse:
        weights += [new(gates * H, I), new(gates * H, out)]
        weights += [new(gates * H), new(gates * H)] if bias else []
        weights += [new(P, H)] if proj else []
    weights += [new(H) for _ in reverse for _ in range(CELLS[cell].params)]
    rows = (sum(SIZES),) if sizes else (T, B)
    given = [new(streams, B, out), new(streams, B, H)][: CELLS[cell].states] if states else []
    return (
        cell,
        backend,
        new(*rows, I),
        given,
        weights,
        list(reverse),
        None if lengths is None else torch.tensor(lengths),
        torch.tensor(SIZES) if sizes else None,
        torch.rand(rows) < 0.3 if resets else None,
        save,
        trail,
    )


@pytest.mark.parametrize(("cell", "backend", "case"), CHOSEN)
def test_opcheck_of_forward(cell, backend, case):
    opcheck(torch.ops.fastrnn.forward, arguments(cell, backend, **CASES[case]))


@pytest.mark.parametrize(("cell", "backend", "case"), BACKWARD)
def test_opcheck_of_backward(cell, backend, case):
    *call, save, trail = arguments(cell, backend, **CASES[case])
    with torch.no_grad():
        y, finals, saved, states = torch.ops.fastrnn.forward(*call, save, trail)
    douts = [torch.randn_like(a).requires_grad_(y.dtype is torch.float64) for a in (y, *finals, *states)]
    given = [k != 1 for k in range(len(douts))]
    douts = [d for d, there in zip(douts, given, strict=True) if there]
    needed = [case != "plain", *(True for _ in (*call[3], *call[4]))]
    checks = "ALL" if (cell, backend, case) in TRACED else EAGER
    opcheck(torch.ops.fastrnn.backward, (*call, y, saved, douts, given, needed), test_utils=checks)


@pytest.mark.parametrize("backend", usable_backends())
def test_packed_calls_without_their_states_are_refused(backend):
    args = arguments("lstm", backend, sizes=True, states=False)
    with pytest.raises(ValueError, match="states: expected with batch_sizes"):
        torch.ops.fastrnn.forward(*args)
    few = [torch.randn(1, SIZES[0] - 1, H, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(ValueError, match=r"states: expected B = batch_sizes\[0\] = 3, got 2"):
        torch.ops.fastrnn.forward(*args[:3], few, *args[4:])


needs_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def place(module, device):
    """New parameters there: without CUDA fake ones can be neither initialised nor moved."""
    for name, p in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device=device)))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("keywords", [(), ("lengths",), ("resets",), ("lengths", "resets", "return_states")], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_fake_tensors_ask_for_no_value(name, keywords, device):
    """Nothing reads the device: where it would, a fake tensor raises DataDependentOutputException.

    On the GPU only of the reference: torch.nn's kernels do not run on fake CUDA tensors without CUDA.
    """
    with (
        FakeTensorMode(),
        fastrnn.backend("reference" if device == "cuda" else "auto"),
        torch.set_grad_enabled(device == "cpu"),
    ):
        module = getattr(fastrnn, name)(I, H, 2, bidirectional=True)
        place(module, device)
        x = torch.empty(T, B, I, device=device, requires_grad=True)
        given = {
            "lengths": torch.empty(B, dtype=torch.int64, device=device),
            "resets": torch.empty(T, B, dtype=torch.bool, device=device),
            "return_states": True,
        }
        outs = leaves(module(x, **{key: given[key] for key in keywords}))
        wanted = [x, *module.parameters()]
        # Without CUDA autograd ends the process where it asks for the device's stream.
        grads = torch.autograd.grad([o.sum() for o in outs], wanted) if device == "cpu" else ()
        with torch.no_grad():
            module(x, **{key: given[key] for key in keywords})
    assert outs[0].shape == (T, B, 2 * H)
    assert outs[1].shape == (4, B, H)
    assert {a.device.type for a in (*outs, *grads)} == {device}
    assert all(o.requires_grad == (device == "cpu") for o in outs)
    assert not grads or [g.shape for g in grads] == [a.shape for a in wanted]


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("device", DEVICES)
def test_fake_cells(name, device):
    with (
        FakeTensorMode(),
        fastrnn.backend("reference" if device == "cuda" else "auto"),
        torch.set_grad_enabled(device == "cpu"),
    ):
        cell = getattr(fastrnn, name)(I, H)
        place(cell, device)
        x = torch.empty(B, I, device=device, requires_grad=True)
        out = cell(x, cell(x))
        wanted = [x, *cell.parameters()]
        grads = torch.autograd.grad([o.sum() for o in leaves(out)], wanted) if device == "cpu" else ()
    assert {a.shape for a in leaves(out)} == {(B, H)}
    assert {a.device.type for a in leaves(out)} == {device}
    assert not grads or [g.shape for g in grads] == [a.shape for a in wanted]


@pytest.mark.parametrize("kind", ["real", "symbolic"])
def test_make_fx(kind):
    module = fastrnn.GRU(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, 7, I, dtype=torch.float64)  # no two sizes alike, which the tracer would take for one

    def loss(a):
        y, h = module(a)
        return y.sum() + h.sum(), torch.autograd.grad(y.square().sum(), a)[0]

    graph = make_fx(loss, tracing_mode=kind, _allow_non_fake_inputs=True)(x.clone().requires_grad_())
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert called.count("fastrnn.forward.default") == 2
    assert called.count("fastrnn.backward.default") == 2
    for shape in [(T, 7, I)] if kind == "real" else [(T, 7, I), (9, 2, I)]:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for a, b in zip(graph(x), loss(x), strict=True):
            assert_equal("graph", a, b)


class Logged(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["plain", "lengths", "packed", "cell", "autocast"])
@pytest.mark.parametrize("name", usable_backends())
def test_dispatch_modes_see_the_op(name, form):
    options = {"dtype": torch.float32 if form == "autocast" else torch.float64, "backend": name}
    module = fastrnn.LSTMCell(I, H, **options) if form == "cell" else fastrnn.LSTM(I, H, **options)
    x = torch.randn(T, B, I, dtype=options["dtype"], requires_grad=True)
    lengths = torch.tensor([2, 4, 1])

    def run():
        if form == "cell":
            outs = leaves(module(x[0]))
        elif form == "packed":
            outs = leaves(module(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)))
        else:
            outs = leaves(module(x, lengths=lengths if form == "lengths" else None))
        return [*outs, *torch.autograd.grad([o.square().sum() for o in outs], [x, *module.parameters()])]

    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        want = run()
        with Logged() as log:
            got = run()
    assert ("fastrnn.forward.default" in log.seen) != BACKENDS[name].differentiable
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_equal(str(k), a, b, 1e-2 if form == "autocast" else None)


def test_flop_counter():
    """It counts what it knows: the linear layer's products, around an op that has no formula there."""
    module, head = fastrnn.LSTM(I, H), torch.nn.Linear(H, 2)
    x = torch.randn(T, B, I)
    with FlopCounterMode(display=False) as counter:
        y = head(module(x)[0])
    assert counter.get_total_flops() == 2 * T * B * H * 2
    assert_equal("output", y, head(module(x)[0]))
