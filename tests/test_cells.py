"""The Python text of each cell: its derivative against autograd, its sizes against its contract."""

import pytest
import torch
from support import B, H, assert_equal

from fastrnn.cells import CELLS

FUNCTIONS = (torch.sigmoid, torch.tanh, torch.where)


@pytest.fixture(params=CELLS.values(), ids=CELLS)
def cell(request):
    return request.param


def random_arguments(cell, dtype=torch.float64):
    def draw(n):
        return tuple(torch.randn(B, H, dtype=dtype).requires_grad_() for _ in range(n))

    return draw(cell.gates), draw(cell.gates), draw(cell.states), draw(cell.params)


def test_declared_sizes(cell):
    x, r, s, p = random_arguments(cell)
    s1, tape = cell.step(x, r, s, p, *FUNCTIONS)
    assert len(s1) == cell.states
    assert len(tape) == cell.tape
    dx, dr, ds, dp = cell.step_backward(tape, s, s1, p, s1, *FUNCTIONS)
    assert (len(dx), len(dr), len(ds), len(dp)) == (cell.gates, cell.gates, cell.states, cell.params)


def test_derivative_is_autograds(cell):
    x, r, s, p = random_arguments(cell)
    s1, tape = cell.step(x, r, s, p, *FUNCTIONS)
    ds1 = tuple(torch.randn_like(a) for a in s1)
    want = torch.autograd.grad(s1, (*x, *r, *s, *p), ds1, allow_unused=True)
    got = cell.step_backward(tape, s, s1, p, ds1, *FUNCTIONS)
    names = [f"d{kind}[{k}]" for kind, values in zip("xrsp", (x, r, s, p), strict=True) for k in range(len(values))]
    flat = [g for group in got for g in group]
    assert len(flat) == len(want) == len(names)
    for name, g, w in zip(names, flat, want, strict=True):
        assert_equal(f"{cell.name} {name}", g, torch.zeros_like(g) if w is None else w, 1e-13)


def test_only_split_gates_have_their_own_recurrent_gradient(cell):
    x, r, s, p = random_arguments(cell)
    s1, tape = cell.step(x, r, s, p, *FUNCTIONS)
    dx, dr, _, _ = cell.step_backward(tape, s, s1, p, tuple(torch.randn_like(a) for a in s1), *FUNCTIONS)
    assert tuple(g for g in range(cell.gates) if not torch.equal(dx[g], dr[g])) == cell.split


def test_nan_comes_through(cell):
    x, r, s, p = random_arguments(cell)
    with torch.no_grad():
        r[0][0, 0] = float("nan")
    s1, _ = cell.step(x, r, s, p, *FUNCTIONS)
    assert s1[0][0, 0].isnan()
    assert not s1[0][1:].isnan().any()
