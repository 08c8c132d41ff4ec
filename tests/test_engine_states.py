"""The gradient of c at every step, which `Cpu.backward` takes beside that of the final state."""

import pytest
import torch
from engine_support import CPU, ENGINE, Case, inputs_of, like, make_call
from support import assert_equal
from tolerances import ENGINE as TOLERANCE

from fastrnn.backends.base import GATES
from fastrnn.cells import CELLS
from fastrnn.packing import previous_rows

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(ENGINE is None, reason="the engine is not built"),
]
BOTH = (False, True)
CASES = {
    "padded": Case(reverse=BOTH),
    "few rows": Case(T=4, B=2, reverse=(True,)),
    "ragged": Case(T=8, B=13, reverse=BOTH, lengths=True),
    "ragged, resets": Case(T=9, B=6, reverse=BOTH, lengths=True, resets=True),
    "projection": Case(P=6, reverse=BOTH, lengths=True),
}


def every_state(call, s):
    """Rows of h (N, P) and of every other state (N, H) after each step of stream s: the cell's text in a plain loop."""
    w, before = call.weights[s], previous_rows(call, call.reverse[s])
    p = call.params[s] if call.params else ()
    rows, batch = before.numel(), call.states[0].shape[1]
    sizes = [batch] * call.x.shape[0] if call.batch_sizes is None else call.batch_sizes.tolist()
    time = [r.tolist() for r in torch.arange(rows).split(sizes)]
    xg = torch.nn.functional.linear(call.x.reshape(rows, -1), w.w_ih, w.b_ih)
    found = [{rows + b: a[s, b] for b in range(batch)} | {rows + batch: torch.zeros_like(a[s, 0])} for a in call.states]
    for step in reversed(time) if call.reverse[s] else time:
        for row in step:
            state = tuple(a[int(before[row])] for a in found)
            gates = torch.nn.functional.linear(state[0], w.w_hh, w.b_hh).chunk(call.cell.gates)
            inputs = xg[row].chunk(call.cell.gates)
            new, _ = call.cell.step(inputs, gates, state, p, torch.sigmoid, torch.tanh, torch.where)
            for a, value in zip(found, new, strict=True):
                a[row] = value
            if w.w_hr is not None:
                found[0][row] = w.w_hr @ new[0]
    return [torch.stack([a[row] for row in range(rows)]) for a in found]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("cell", "name"), [(c, n) for c in CELLS for n in CASES if CELLS[c].states > 1 and (c == "lstm" or not CASES[n].P)]
)
def test_gradient_of_c_at_every_step(cell, name, dtype):
    call = make_call(CASES[name]._replace(cell=cell), dtype)
    truth = like(call, torch.float64)
    states = [every_state(truth, s) for s in range(len(call.weights))]
    y, c = torch.cat([a[0] for a in states], -1), torch.stack([a[1] for a in states])
    with torch.no_grad():
        result = CPU.forward(call, GATES)
    assert_equal("y", result.y.view(y.shape), y.to(dtype), TOLERANCE[dtype])
    dy, dc = (torch.randn(a.shape).to(dtype) for a in (y, c))
    inputs = inputs_of(truth)
    found = torch.autograd.grad((y, c), list(inputs.values()), (dy.double(), dc.double()))
    want = dict(zip(inputs, found, strict=True))
    needed = (True,) * len(call.flat)
    for strided in (False, True):
        given = dc.mT.contiguous().mT if strided else dc
        with torch.no_grad():
            got = CPU.backward(call, result.saved, result.y, dy.view_as(result.y), (None, None), needed, False, given)
        named = {"x": got.dx, **{f"state {k}": a for k, a in enumerate(got.dstates)}}
        for s, w in enumerate(got.dweights or ()):
            named |= {f"{field} of stream {s}": a for field, a in w._asdict().items() if a is not None}
        for s, own in enumerate(got.dparams):
            named |= {f"parameter {k} of stream {s}": a for k, a in enumerate(own)}
        for what, a in named.items():
            assert_equal(f"{name} {what}", a, want[what].to(dtype), TOLERANCE[dtype])
