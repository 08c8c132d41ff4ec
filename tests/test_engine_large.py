"""Weights so large that the engine lays its scratch memory out differently, to stay below torch.nn's peak.

W_ih then has memory of its own in a forward of many rows, and in a backward it follows W_hh in the same place, after
the loop, while the gates of all steps wait in the tape or in dx.
"""

import pytest
import torch
from engine_support import ENGINE, Case, assert_parity, make_call, run
from support import assert_equal

from fastrnn.cells import CELLS

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(ENGINE is None, reason="the engine is not built"),
]
BOTH = (False, True)
CASES = {
    "dx after the loop": Case(T=4, B=7, I=531, H=517),
    "dx after the loop, in both directions": Case(T=5, B=3, I=541, H=523, reverse=BOTH),
    "dx after the loop, ragged": Case(T=6, B=5, I=530, H=515, reverse=BOTH, lengths=True, resets=True),
    "several chunks": Case(T=3, B=130, I=530, H=513),
    "more outputs than inputs": Case(T=4, B=5, I=400, H=680),
}
FORWARD = {
    "W_ih in memory of its own": Case(T=8, B=129, I=1601, H=515),
    "of two streams": Case(B=147, I=900, H=481, reverse=BOTH),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, cell):
    assert_parity(CASES[name]._replace(cell=cell), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_parity_in_other_types(cell, dtype):
    assert_parity(CASES["dx after the loop"]._replace(cell=cell), dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, cell):
    case = FORWARD[name]._replace(cell=cell)
    with torch.no_grad():
        call = make_call(case, torch.float32, grad=False)
        got = run(call, backward=False)
        want = run(call, reference=True, backward=False)
    for output, a in want.items():
        assert_equal(f"{name} {cell} {output}", got[output], a, 1e-5)
