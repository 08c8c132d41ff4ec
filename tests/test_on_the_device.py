"""Everything above a backend stays on the input's device, so that a call can be captured in a CUDA graph.

No GPU is needed: tensors on the device "meta" have no values at all, and every operation is watched. A backend without
arithmetic stands for those of GPUs. Packed sequences are not here: their batch_sizes lie on the CPU by definition.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_support import stays_on
from support import KINDS as ALL_KINDS
from support import leaves
from torch import Tensor
from torch.func import functional_call, grad, vmap

import fastrnn
from fastrnn import backends, ops, ordinary
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import GATES, NOTHING, Backend, Gradients, Result, Saved
from fastrnn.cells import CELLS

T, B, I, H, P = 3, 4, 5, 6, 2  # noqa: E741
KINDS = {kind: ALL_KINDS[kind] for kind in ("lstm", "lstm_proj", "gru", "rnn_tanh")}


class Empty(Backend):
    """Takes padded batches and returns tensors of the right shapes, like a backend of kernels."""

    name = "empty"

    def unsupported(self, query: Any) -> str | None:
        return None

    def forward(self, call: Any, save: str) -> Result:
        x, streams, rows = call.x, len(call.weights), call.x.shape[:-1].numel()
        y = x.new_empty(*call.rows, streams * call.out)
        finals = tuple([x.new_empty(streams, x.shape[1], n) for n in (call.out, call.hidden)[: call.cell.states]])
        gates, projected = save == GATES, call.weights[0].w_hr is not None
        widths = [gates and call.cell.tape, save != NOTHING and call.cell.states > 1, gates and projected]
        kinds = self.saved_dtypes(x.dtype)
        saved = [
            x.new_empty(streams, rows, n * call.hidden, dtype=kind) if n else None
            for n, kind in zip(widths, kinds, strict=True)
        ]
        return Result(y, finals, Saved(*saved))

    def backward(
        self,
        call: Any,
        saved: Saved,
        y: Tensor,
        dy: Tensor,
        dfinals: Any,
        needed: Any,
        last: bool,
        dc: Tensor | None = None,
        gates: bool = False,
    ) -> Gradients:
        streams, rows = len(call.weights), y.shape[:-1].numel()
        assert (saved.tape is None) == (not call.cell.tape)
        dgates = y.new_empty(streams, rows, call.cell.dgates * call.hidden)
        dh = None if saved.m is None else y.new_empty(streams, rows, call.out)
        return Gradients(dgates, tuple([torch.empty_like(a) for a in call.states]), dh, saved.m)


@pytest.fixture(params=["empty", "reference"])
def engine(request, monkeypatch):
    """A backend for any device, called as eager code calls it although a mode looks on."""
    known = {**BACKENDS, "empty": Empty()}
    for module in (backends, ops):
        monkeypatch.setattr(module, "BACKENDS", known)
    monkeypatch.setattr(backends, "NAMES", ("auto", *known))
    monkeypatch.setattr(ordinary, "_dispatch_modes", lambda: 0)
    backends.clear_choices()
    with fastrnn.backend(request.param):
        yield known[request.param]
    backends.clear_choices()


def saves(engine: Backend) -> list[str]:
    return ["gates"] if engine.differentiable else ["gates", "states"]


def new(*shape: int, **options: Any) -> Tensor:
    return torch.empty(*shape, device="meta", **options)


def masks(which: str) -> dict[str, Any]:
    given = {
        "lengths": new(B, dtype=torch.int32),
        "resets": new(T, B, dtype=torch.bool),
        "return_states": True,
    }
    return {name: given[name] for name in which.split()}


def build(kind: str, **options: Any) -> Any:
    name, extra = KINDS[kind]
    options = {**extra, **options, **({"proj_size": P} if extra else {})}
    return getattr(fastrnn, name)(I, H, device="meta", **options)


def run_all(module: Any, x: Tensor, **given: Any) -> None:
    """Recorded without states and with them, every gradient, and inference."""
    lead = module.num_layers * (1 + module.bidirectional)
    batch = () if x.dim() == 2 else (B,)
    sizes = [module.proj_size or H, H][: 1 + (module.mode == "LSTM")]
    states = [new(lead, *batch, n, requires_grad=True) for n in sizes]
    hx = tuple(states) if len(states) > 1 else states[0]
    for arguments, wanted in (((x,), [x]), ((x, hx), [x, *states])):
        wanted = [*wanted, *module.parameters()]
        outs = leaves(module(*arguments, **given))
        found = torch.autograd.grad([o.sum() for o in outs], wanted)
        assert [g.shape for g in found] == [a.shape for a in wanted]
        with torch.no_grad():
            assert [o.shape for o in leaves(module(*arguments, **given))] == [o.shape for o in outs]


@pytest.mark.parametrize("kind", KINDS)
def test_layers(engine, kind):
    for save in saves(engine):
        module = build(kind, num_layers=2, bidirectional=True, dropout=0.5, save=save)
        with stays_on("meta") as seen:
            run_all(module, new(T, B, I, requires_grad=True))
            run_all(module, new(T, I, requires_grad=True))
            run_all(module, new(T, B, I, requires_grad=True), **masks("return_states"))
        assert "aten.native_dropout.default" in seen or "aten.bernoulli_.float" in seen


@pytest.mark.parametrize("which", ["lengths", "resets", "lengths resets return_states"])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_and_resets(engine, kind, which):
    given = masks(which)
    if "resets" in given:
        given["resets"] = given["resets"].t()
    for save in saves(engine):
        module = build(kind, num_layers=2, bidirectional=True, batch_first=True, save=save)
        with stays_on("meta"):
            run_all(module, new(B, T, I, requires_grad=True), **given)


@pytest.mark.parametrize("which", ["lengths", "resets", "lengths resets return_states"])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_without_gradients(engine, kind, which):
    module = build(kind, num_layers=2, bidirectional=True)
    with stays_on("meta"), torch.no_grad():
        module(new(T, B, I), **masks(which))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(engine, name):
    cell = getattr(fastrnn, name)(I, H, device="meta")
    x = new(B, I, requires_grad=True)
    with stays_on("meta"):
        outs = leaves(cell(x, cell(x)))
        found = torch.autograd.grad([o.sum() for o in outs], [x, *cell.parameters()])
        with torch.no_grad():
            cell(x[0])
    assert [g.shape for g in found] == [a.shape for a in (x, *cell.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(engine, kind):
    module, x = build(kind, bidirectional=True), new(T, B, I, requires_grad=True)
    with stays_on("meta"):
        y, _ = module(x, **masks("lengths resets"))
        first = torch.autograd.grad(y.sum(), [x, *module.parameters()], create_graph=True)
        second = torch.autograd.grad([g.sum() for g in first], [x, *module.parameters()])
    assert [g.shape for g in second] == [a.shape for a in (x, *module.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(engine, kind):
    module = build(kind, bidirectional=True)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, own, (x,))[0].sum()

    with stays_on("meta"):
        found = vmap(grad(loss), in_dims=(None, 1))(parameters, new(T, B, I))
    assert {name: g.shape for name, g in found.items()} == {name: (B, *p.shape) for name, p in parameters.items()}


@pytest.mark.parametrize("which", ["", "resets", "lengths", "lengths resets"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_registered_op_does(engine, kind, which):
    """As in a compiled graph: the functions behind fastrnn::forward and fastrnn::backward."""
    module = build(kind, bidirectional=True)
    cell, given = CELLS[module.mode.lower()], masks(which)
    widths = [module.proj_size or H, H][: cell.states]
    states = [new(2, B, n) for n in widths]
    head = (cell.name, engine.name, new(T, B, I), states, [p.detach() for p in module.parameters()], [False, True])
    tail = (given.get("lengths"), None, given.get("resets"))
    for save in saves(engine):
        with stays_on("meta"):
            y, finals, saved, trail = ops._forward(*head, *tail, save, cell.states > 1)
            douts = [torch.empty_like(a) for a in (y, *finals, *trail)]
            needed = [True] * (1 + len(states) + len(head[4]))
            found = ops._backward(*head, *tail, y, saved, douts, [True] * len(douts), needed)
        assert [g.shape for g in found] == [a.shape for a in (head[2], *states, *head[4])]


OFFENCES = {
    "item": lambda x, mask: x[0].item(),
    "bool": lambda x, mask: bool(x[0] > 0),
    "nonzero": lambda x, mask: mask.nonzero(),
    "a mask as an index": lambda x, mask: x[mask],
    "assignment by a mask": lambda x, mask: x.__setitem__(mask, x[:1]),
    "a list as an index": lambda x, mask: x[[0, 1]],
    "repeat_interleave": lambda x, mask: x.repeat_interleave(mask.long()),
    "equal": lambda x, mask: torch.equal(x, x),
    "made on the host": lambda x, mask: torch.arange(3),
    "copied to the device": lambda x, mask: torch.zeros(3, device="cpu").to(x.device),
    "a literal": lambda x, mask: torch.tensor([0.0], device="meta"),
    "a literal of the same kind": lambda x, mask: x.new_tensor([0.0]),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_the_watch_sees(offence):
    x, mask = new(3), new(3, dtype=torch.bool)
    with pytest.raises(AssertionError), stays_on("meta"):
        OFFENCES[offence](x, mask)
    with stays_on("meta") as seen:
        torch._assert_async((x[mask.long()] + 1 > 0).all())
    assert seen
