"""Cells that the kernels have never seen, from their Python text alone.

The LSTM whose forget gate is 1 - i, and the one of docs/adding-a-cell.md, which has parameters of its own.
"""

from __future__ import annotations

import pytest
import torch
import triton_support
from docs_support import unchanged
from engine_support import Case, assert_same_bits
from new_cell_support import NAME, page
from triton_support import SCHEDULES, TRITON, Form, assert_parity, call_of, run

import fastrnn
from fastrnn.cells import CELLS, Cell

__all__ = ["page"]

triton_support.require()

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # NumPy's, in the interpreter


def step(x, r, s, p, sigmoid, tanh, where):
    i = sigmoid(x[0] + r[0])
    g = tanh(x[1] + r[1])
    o = sigmoid(x[2] + r[2])
    c = s[1] + i * (g - s[1])
    return (o * tanh(c), c), (i, g, o)


def step_backward(tape, s, s1, p, ds, sigmoid, tanh, where):
    i, g, o = tape
    tc = tanh(s1[1])
    dc = ds[1] + ds[0] * o * (1 - tc * tc)
    d = (dc * (g - s[1]) * i * (1 - i), dc * i * (1 - g * g), ds[0] * tc * o * (1 - o))
    return d, d, (ds[0] * 0, dc * (1 - i)), ()


@pytest.fixture(autouse=True)
def _registered():
    with unchanged(CELLS):
        CELLS["lstm_coupled"] = Cell("lstm_coupled", step, step_backward, gates=3, states=2, tape=3)
        yield


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_and_gradients_are_the_references(schedule, monkeypatch):
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", schedule)
    case = Case("lstm_coupled", T=5, B=3, H=17, reverse=(False, True), resets=True)
    assert_parity(call_of(case, Form(padded=True), torch.float32), f"coupled, {schedule}")


PEEPHOLE = {
    "padded": (Case(NAME, T=5, B=3, H=17, reverse=(False, True), resets=True), Form(padded=True)),
    "packed": (Case(NAME, T=5, B=4, H=17, reverse=(True,), lengths=True, resets=True), Form()),
    "tiles": (Case(NAME, T=2, B=19, H=37, bias=False), Form(stateless=True)),  # of rows, and of units
}


@pytest.mark.usefixtures("poisoned", "page")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", PEEPHOLE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parameters_per_unit(schedule, form, dtype, monkeypatch):
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", schedule)
    case, how = PEEPHOLE[form]
    assert_parity(call_of(case, how, dtype), f"peephole, {schedule}, {form}")


@pytest.mark.usefixtures("poisoned", "page")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_sums_do_not_change_from_run_to_run(schedule, monkeypatch):
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", schedule)
    call = call_of(*PEEPHOLE["tiles"], torch.float32)
    assert_same_bits(schedule, run(call, backend=TRITON), run(call, backend=TRITON))


def test_auto_takes_a_cell_that_torch_does_not_have(page):
    query = fastrnn.backends.Query(NAME, "cpu", torch.float32, 5, 3, 11, 19, 19, 1)
    assert TRITON.passed_over(query) is None
    assert TRITON.passed_over(query._replace(cell="lstm")) is not None
