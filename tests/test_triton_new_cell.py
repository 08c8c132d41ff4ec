"""A cell that the kernels have never seen, from its Python text alone: the LSTM whose forget gate is 1 - i."""

from __future__ import annotations

import pytest
import torch
import triton_support
from docs_support import unchanged
from engine_support import Case
from triton_support import SCHEDULES, Form, assert_parity, call_of

from fastrnn.cells import CELLS, Cell

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
