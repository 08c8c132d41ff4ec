"""The Triton kernels against the reference in fp64: every schedule, cell, form of batch and type."""

import pytest
import torch
import triton_support
from engine_support import Case
from triton_support import CELLS, DEVICE, SCHEDULES, TRITON, Form, assert_parity, call_of

import fastrnn

triton_support.require()
pytestmark = pytest.mark.usefixtures("poisoned")

BOTH = (False, True)
# Names to (fields of the case, form). B=19 are two tiles of rows, H=40 three of units.
FORMS = {
    "dense": ({"B": 19, "H": 40, "T": 5}, Form()),
    "both directions, resets": ({"reverse": BOTH, "resets": True}, Form()),
    "packed": ({"lengths": True, "reverse": BOTH, "resets": True}, Form()),
    "packed, reverse only": ({"lengths": True, "reverse": (True,)}, Form()),
    "lengths": ({"B": 18, "reverse": BOTH, "resets": True}, Form(padded=True)),
    "lengths, no states": ({"reverse": BOTH}, Form(padded=True, stateless=True)),
    "no states, no bias": ({"bias": False}, Form(stateless=True)),
    "one step, one row, one unit": ({"T": 1, "B": 1, "I": 1, "H": 1}, Form()),
    "one row": ({"B": 1, "H": 33, "T": 3}, Form(stateless=True)),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request, monkeypatch):
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", request.param)
    return request.param


@pytest.fixture(autouse=True)
def ieee():
    """No TF32, whose rounding is beyond the tolerances of fp32."""
    with fastrnn.fp32_precision("ieee"):
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_fp32(schedule, cell, form):
    fields, how = FORMS[form]
    assert_parity(call_of(Case(cell, **fields), how, torch.float32), f"{schedule} {cell} {form}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_16_bits(schedule, cell, dtype):
    case = Case(cell, lengths=True, reverse=BOTH, resets=True)
    assert_parity(call_of(case, Form(), dtype), f"{schedule} {cell} {dtype}")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_made_anew(schedule, cell):
    case = Case(cell, reverse=BOTH, resets=True)
    for dtype in (torch.float32, torch.bfloat16):
        call = call_of(case, Form(padded=True), dtype)
        assert_parity(call, f"{schedule} {cell} {dtype} states", save="states")


def test_all_states_and_their_gradient(schedule):
    case = Case("lstm", reverse=BOTH, resets=True)
    x = torch.randn(case.T, case.B, case.I, device=DEVICE)
    lengths = torch.tensor([7, 3, 0, 5, 6], device=DEVICE, dtype=torch.uint8)
    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        module = fastrnn.LSTM(case.I, case.H, 2, bidirectional=True, backend=backend).to(DEVICE)
        y, (h, c), trail = module(x, lengths=lengths, return_states=True)
        seeds = [torch.linspace(-1, 1, a.numel(), device=DEVICE).view_as(a) for a in (y, h, c, *trail)]
        grads = torch.autograd.grad((y, h, c, *trail), list(module.parameters()), seeds)
        found[backend] = [y, h, c, *trail, *grads]
    for k, (a, b) in enumerate(zip(found["triton"], found["reference"], strict=True)):
        triton_support.assert_equal(f"{schedule} result {k}", a, b, 5e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_type_of_lengths(dtype):
    call = call_of(Case("gru"), Form(padded=True), torch.float32)
    assert call.lengths is not None
    assert_parity(call._replace(lengths=call.lengths.to(dtype)), f"lengths of {dtype}")


def test_the_tape_may_be_walked_twice(schedule):
    """A graph that is kept must not lose its tape to the gradients."""
    call = call_of(Case("lstm"), Form(), torch.float32)
    y, *_ = triton_support.outputs(call, backend=TRITON)
    first = torch.autograd.grad(y.sum(), call.x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), call.x)[0])


def test_not_contiguous_tensors(schedule):
    call = call_of(Case("lstm", B=6, resets=True), Form(), torch.float32)

    def strided(a):
        return a.detach().mT.contiguous().mT.requires_grad_()

    weights = tuple(w._replace(w_ih=strided(w.w_ih), w_hh=strided(w.w_hh)) for w in call.weights)
    states = tuple(strided(a) for a in call.states)
    resets = call.resets.t().contiguous().t()
    assert_parity(call._replace(x=strided(call.x), weights=weights, states=states, resets=resets), schedule)
