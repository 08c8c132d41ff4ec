"""The cell of docs/adding-a-cell.md as it stands there: its derivative, its module against a loop, who runs it."""

from __future__ import annotations

import re

import pytest
import torch
from engine_support import Case, make_call, outputs
from new_cell_support import NAME, page, peephole
from support import B, H, I, T, assert_equal, leaves
from test_cells import FUNCTIONS, random_arguments
from test_opcheck import arguments
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torch.library import opcheck

import fastrnn
from fastrnn import onnx
from fastrnn.backends import BACKENDS
from fastrnn.backends.cpu import CODES

__all__ = ["page"]
WITHOUT = [n for n, b in BACKENDS.items() if not b.takes_params]


def loop(x, w_ih, w_hh, b, p, keep, live):
    """One direction in plain PyTorch: h (T, B, H) and the last h and c. keep, live (T, B) are of zeros and ones."""
    h, c, out = x.new_zeros(x.shape[1], H), x.new_zeros(x.shape[1], H), []
    for t in range(len(x)):
        h0, c0 = h * keep[t, :, None], c * keep[t, :, None]
        i, f, g, o = (x[t] @ w_ih.T + h0 @ w_hh.T + b).chunk(4, 1)
        c1 = torch.sigmoid(f + p[1] * c0) * c0 + torch.sigmoid(i + p[0] * c0) * torch.tanh(g)
        h1 = torch.sigmoid(o + p[2] * c1) * torch.tanh(c1)
        m = live[t, :, None]
        h, c = m * h1 + (1 - m) * h, m * c1 + (1 - m) * c
        out.append(m * h1)
    return torch.stack(out), h, c


def test_its_derivative_is_autograds(page):
    cell = page["LSTM_PEEPHOLE"]
    x, r, s, p = random_arguments(cell)
    s1, tape = cell.step(x, r, s, p, *FUNCTIONS)
    assert (len(s1), len(tape)) == (cell.states, cell.tape)
    ds1 = tuple(torch.randn_like(a) for a in s1)
    want = torch.autograd.grad(s1, (*x, *r, *s, *p), ds1, allow_unused=True)
    got = [g for group in cell.step_backward(tape, s, s1, p, ds1, *FUNCTIONS) for g in group]
    names = [f"d{kind}[{k}]" for kind, values in zip("xrsp", (x, r, s, p), strict=True) for k in range(len(values))]
    for name, g, w in zip(names, got, want, strict=True):
        assert_equal(name, g, torch.zeros_like(g) if w is None else w)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_module_against_a_plain_loop(page, ragged):
    module, x = peephole(page, I, H), torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    lengths, resets = (torch.tensor([T, 2, 0, 5, 1]), torch.rand(T, B) < 0.3) if ragged else (None, None)
    keep = torch.ones(T, B, dtype=x.dtype) if resets is None else 1 - resets.to(x.dtype)
    live = torch.ones_like(keep) if lengths is None else (torch.arange(T)[:, None] < lengths).to(x.dtype)
    w_ih, w_hh, b_ih, b_hh = module.all_weights[0]
    want = loop(x, w_ih, w_hh, b_ih + b_hh, module.peepholes[0], torch.where(live > 0, keep, 1.0), live)
    y, (h, c) = module(x, lengths=lengths, resets=resets)
    parameters = dict(module.named_parameters())
    d = [torch.randn_like(a) for a in want]
    got = torch.autograd.grad((y, h[0], c[0]), (x, *parameters.values()), d)
    wanted = torch.autograd.grad(want, (x, *parameters.values()), d)
    for name, a, b in zip(("y", "h", "c"), (y, h[0], c[0]), want, strict=True):
        assert_equal(name, a, b)
    for name, a, b in zip(("x", *parameters), got, wanted, strict=True):
        assert_equal(f"gradient of {name}", a, b)


def test_the_reverse_direction_and_the_second_layer_have_their_own(page):
    module, x = peephole(page, I, H, num_layers=2, bidirectional=True), torch.randn(T, B, I, dtype=torch.float64)
    ones = torch.ones(T, B, dtype=x.dtype)
    for layer in range(2):
        halves = []
        for direction in range(2):
            k = 2 * layer + direction
            w_ih, w_hh, b_ih, b_hh = module.all_weights[k]
            own = x.flip(0) if direction else x
            out = loop(own, w_ih, w_hh, b_ih + b_hh, module.peepholes[k], ones, ones)[0]
            halves.append(out.flip(0) if direction else out)
        x = torch.cat(halves, -1)
    torch.manual_seed(0)
    assert_equal("y", module(torch.randn(0, B, I, dtype=x.dtype))[0], x[:0])  # nothing to run
    first = torch.randn(T, B, I, dtype=x.dtype)
    packed = torch.nn.utils.rnn.pack_padded_sequence(first, [T] * B)
    assert_equal("packed", module(packed)[0].data.view(T, B, -1), module(first)[0])


def test_with_peepholes_at_zero_it_is_an_lstm(page):
    module, plain = page["PeepholeLSTM"](I, H, 2), fastrnn.LSTM(I, H, 2)
    left = module.load_state_dict(plain.state_dict(), strict=False)
    assert left.missing_keys == ["peepholes.0", "peepholes.1"]
    assert not left.unexpected_keys
    x = torch.randn(T, B, I)
    with fastrnn.backend("reference"):
        assert torch.equal(module(x)[0], plain(x)[0])


@pytest.mark.parametrize("name", WITHOUT)
def test_backends_that_take_no_parameters_refuse_it_with_the_reason(page, name):
    module = page["PeepholeLSTM"](I, H, backend=name)
    with pytest.raises(
        RuntimeError, match=f"'{name}' cannot run this call: it takes no cells with per-unit parameters"
    ):
        module(torch.randn(T, B, I))


@pytest.mark.skipif(not CODES, reason="the engine is not built")
def test_the_engine_refuses_a_cell_that_it_was_compiled_without(page):
    module = page["PeepholeLSTM"](I, H, backend="cpu")
    with pytest.raises(RuntimeError, match="the engine has no lstm_peephole: csrc/cells had not when it was compiled"):
        module(torch.randn(T, B, I))
    assert fastrnn.explain(page["PeepholeLSTM"](I, H), torch.randn(T, B, I)).backend is BACKENDS["reference"]


WRONG = {
    "layer 1, direction 0: expected 3 vectors for a lstm_peephole, got 2": lambda ps: [*ps[:2], ps[2][:2], ps[3]],
    "expected those of 4 layers and directions of a lstm_peephole, got 3": lambda ps: ps[:3],
    "expected those of 4 layers and directions of a lstm_peephole, got 0": lambda ps: (),
    "layer 0, direction 1, vector 2: expected a Tensor of shape (19,), got (1,)": (
        lambda ps: [ps[0], (*ps[1][:2], ps[1][2][:1]), *ps[2:]]
    ),
    "layer 0, direction 0, vector 0: expected a Tensor of shape (19,), got NoneType": (
        lambda ps: [(None, *ps[0][1:]), *ps[1:]]
    ),
    "layer 0, direction 0, vector 0: expected torch.float64 on cpu, got torch.float32 on cpu": (
        lambda ps: [(ps[0][0].float(), *ps[0][1:]), *ps[1:]]
    ),
    "layer 1, direction 1, vector 1: expected torch.float64 on cpu, got torch.float64 on meta": (
        lambda ps: [*ps[:3], (ps[3][0], ps[3][1].to("meta"), ps[3][2])]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_parameters_that_do_not_fit_are_refused_by_name(page, monkeypatch, message):
    module = peephole(page, I, H, num_layers=2, bidirectional=True)
    given = WRONG[message](module._params())
    monkeypatch.setattr(module, "_params", lambda: given)
    with pytest.raises(RuntimeError, match=f"params: {re.escape(message)}"):
        module(torch.randn(T, B, I, dtype=torch.float64))


def test_parameters_for_a_cell_that_has_none_are_refused(monkeypatch):
    module = fastrnn.LSTM(I, H, 2)
    monkeypatch.setattr(module, "_params", lambda: [(torch.zeros(H),)] * 2)
    with pytest.raises(RuntimeError, match="params: expected those of 0 layers and directions of a lstm, got 2"):
        module(torch.randn(T, B, I))


def test_autocast_casts_its_parameters_with_the_weights(page):
    module, x = page["PeepholeLSTM"](I, H), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)[0]
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert module.peepholes[0].grad.dtype is torch.float32


def test_parameters_alone_may_ask_for_their_gradient(page):
    module, x = peephole(page, I, H), torch.randn(T, B, I, dtype=torch.float64)
    module(x)[0].sum().backward()
    want = module.peepholes[0].grad.clone()
    module.requires_grad_(False)
    module.peepholes[0].requires_grad_().grad = None
    module(x)[0].sum().backward()
    assert_equal("peepholes", module.peepholes[0].grad, want)
    module.peepholes[0].grad = None
    for empty in (x[:0], x[:, :0]):
        module(empty)[0].sum().backward()
        assert not module.peepholes[0].grad.any()


@pytest.mark.parametrize("keywords", [(), ("lengths", "resets")], ids=["plain", "ragged"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(page, keywords, dynamic):
    torch._dynamo.reset()
    module = peephole(page, I, H, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    given = {"lengths": torch.tensor([T, 2, 0, 5, 1]), "resets": torch.rand(T, B) < 0.3}
    given = {k: given[k] for k in keywords}
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())
    found = []
    for f in (compiled, module):
        outs = leaves(f(x, **given))
        found.append([*outs, *torch.autograd.grad([o.square().sum() for o in outs], (x, *parameters.values()))])
    for name, a, b in zip(("y", "h", "c", "x", *parameters), *found, strict=True):
        assert_equal(name, a, b)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch's own use
def test_it_exports_with_symbolic_sizes(page):
    module = peephole(page, I, H, bidirectional=True)
    shapes = {"input": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = torch.export.export(module, (torch.randn(T, B, I, dtype=torch.float64),), dynamic_shapes=shapes)
    for steps, batch in ((T, B), (3, 2)):
        x = torch.randn(steps, batch, I, dtype=torch.float64)
        for name, a, b in zip(("y", "h", "c"), leaves(program.module()(x)), leaves(module(x)), strict=True):
            assert_equal(name, a, b)


def check_op(backend):
    *call, save, trail = arguments(NAME, backend, reverse=(False, True))
    opcheck(torch.ops.fastrnn.forward, (*call, save, trail))
    with torch.no_grad():
        y, finals, saved, _ = torch.ops.fastrnn.forward(*call, save, trail)
    douts = [torch.randn_like(a).requires_grad_() for a in (y, *finals)]
    needed = [True] * (1 + len(call[3]) + len(call[4]))
    opcheck(torch.ops.fastrnn.backward, (*call, y, saved, douts, [True] * 3, needed))


def test_opcheck(page):
    check_op("reference")


def per_sample(module, x):
    """Gradients of every parameter for each batch row alone: by vmap of grad, and by a loop."""
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def loss(own, row):
        return functional_call(module, own, (row.unsqueeze(1),))[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    rows = [grad(loss)(parameters, row) for row in x.unbind(1)]
    return got, {k: torch.stack([row[k] for row in rows]) for k in parameters}


def test_gradients_of_each_sample(page):
    got, want = per_sample(peephole(page, I, H), torch.randn(T, 3, I, dtype=torch.float64))
    for name, w in want.items():
        assert_equal(name, got[name], w)
    assert want["peepholes.0"].any()


def test_onnx_has_it_as_a_scan(page):
    """The operations that torch.onnx.export translates, run by torch; tests/test_onnx.py runs what it makes of them."""
    call = make_call(Case(NAME, reverse=(False, True), resets=True), grad=False)
    result = onnx.forward(call, False)
    for name, a, b in zip(("y", "h", "c"), (result.y, *result.finals), outputs(call, reference=True), strict=True):
        assert_equal(name, a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_refused_with_the_way_out(page):
    with pytest.raises(RuntimeError, match=r"torch.nn has no lstm_peephole; use torch.export"):
        torch.jit.trace(page["PeepholeLSTM"](I, H), (torch.randn(T, B, I),))
