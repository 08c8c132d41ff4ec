"""The Triton backend under the rest of PyTorch: registered ops, torch.compile, torch.func, memory."""

import pytest
import torch
import triton_support
from engine_support import Case
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from triton_support import DEVICE, TRITON, Form, assert_equal, call_of

import fastrnn
from fastrnn.backends.base import GATES, NOTHING, STATES

triton_support.require()


def _arguments(call, save):
    weights = [w for stream in call.weights for w in stream if w is not None]
    fields = (list(call.states), weights, list(call.reverse), call.lengths, call.batch_sizes, call.resets)
    return ("lstm", "triton", call.x, *fields, save, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [GATES, STATES])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck_of_forward(dtype, save, padded):
    """Fake results have the types and sizes of real ones, the tape's own type among them."""
    call = call_of(Case("lstm", T=3, B=2, H=5, reverse=(False, True)), Form(padded=padded), dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if dtype is torch.bfloat16:
        tests = tests[:3]  # the last compares gradients to fp32's precision
    torch.library.opcheck(torch.ops.fastrnn.forward.default, _arguments(call, save), test_utils=tests)


def test_compiled_with_lengths_in_one_graph():
    module = fastrnn.LSTM(3, 5, 2, bidirectional=True, backend="triton").to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for T, B in ((4, 3), (6, 5)):
        x = torch.randn(T, B, 3, device=DEVICE)
        lengths = torch.randint(0, T + 1, (B,), device=DEVICE)
        results = []
        for run in (module, compiled):
            y, (h, c) = run(x, lengths=lengths)
            gradients = torch.autograd.grad(y.sum() + h.sum() + c.square().sum(), list(module.parameters()))
            results.append((y, h, c, *gradients))
        for k, (got, want) in enumerate(zip(results[1], results[0], strict=True)):
            assert_equal(f"T={T} result {k}", got, want)


def test_gradients_of_each_sample():
    module = fastrnn.GRU(3, 5, backend="triton").to(DEVICE)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(4, 6, 3, device=DEVICE)

    def loss(parameters, row):
        return functional_call(module, parameters, (row,))[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(6):
        want = grad(loss)(parameters, x[:, b])
        for name, g in got.items():
            assert_equal(f"row {b} {name}", g[b], want[name])


def test_second_derivatives_go_to_the_reference():
    module = fastrnn.LSTM(3, 5, backend="triton").to(DEVICE)
    x = torch.randn(4, 2, 3, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    got = torch.autograd.grad(first.square().sum(), list(module.parameters()))
    with fastrnn.backend("reference"):
        module.backend = "auto"
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        want = torch.autograd.grad(first.square().sum(), list(module.parameters()))
    for (name, _), g, w in zip(module.named_parameters(), got, want, strict=True):
        assert_equal(name, g, w)


def test_cells_and_single_steps():
    cell = fastrnn.LSTMCell(3, 5, backend="triton").to(DEVICE)
    x, state = torch.randn(4, 3, device=DEVICE), tuple(torch.randn(4, 5, device=DEVICE) for _ in range(2))
    got = cell(x, state)
    cell.backend = "reference"
    for k, want in enumerate(cell(x, state)):
        assert_equal(f"state {k}", got[k], want)


class Allocations(TorchDispatchMode):
    """Elements of every tensor that is made, views of older ones left out."""

    def __init__(self, *known):
        super().__init__()
        self.kept, self.seen, self.sizes = [], {a.untyped_storage().data_ptr() for a in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.seen:
            self.seen.add(out.untyped_storage().data_ptr())
            self.kept.append(out)  # so that no later one gets its address
            self.sizes.append(out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("save", [NOTHING, STATES, GATES])
def test_memory_of_a_forward(save):
    """xg and y, with "states" c too; the tape of "gates" takes xg's place, of which the GRU needs four blocks."""
    for name in ("lstm", "gru"):
        case = Case(name, T=50, B=16, H=19)
        call = call_of(case, Form(stateless=True), torch.float32)
        known = [call.x, *[w for w in call.weights[0] if w is not None]]
        with torch.no_grad(), Allocations(*known) as new:
            TRITON.forward(call, save)
        block = case.T * case.B * case.H
        blocks = call.cell.tape if save == GATES else call.cell.gates
        c = [block] if save and name == "lstm" else []
        large = sorted((n for n in new.sizes if n >= block), reverse=True)
        assert large == [blocks * block, block, *c]


def test_the_gradients_take_the_place_of_the_tape():
    case = Case("lstm", T=50, B=16, H=19)
    call = call_of(case, Form(), torch.float32)
    with torch.no_grad():
        y, finals, saved = TRITON.forward(call, GATES)
        dy = torch.ones_like(y)
        known = [call.x, y, dy, *call.states, saved.tape, saved.c, *[w for w in call.weights[0] if w is not None]]
        with Allocations(*known) as new:
            dgates = TRITON.backward(call, saved, y, dy, (None, None), (True,) * 8, True).dgates
    assert dgates is not None
    assert dgates.data_ptr() == saved.tape.data_ptr()
    assert max(new.sizes) <= finals[0].numel()
