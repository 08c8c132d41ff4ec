"""Calls for the tests of the C++ engine, run on it and on the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from support import assert_equal
from tolerances import ENGINE as TOLERANCE
from torch import Tensor

from fastrnn import differentiable
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import Backend, Call, Weights
from fastrnn.backends.cpu import load
from fastrnn.backends.reference import REFERENCE
from fastrnn.cells import CELLS
from fastrnn.recurrence import recurrence

ENGINE: Any = load()[0]
CPU = BACKENDS["cpu"]
FEW = 12 if ENGINE is None else ENGINE.few_rows


class Case(NamedTuple):
    """One layer's call: everything that decides which way it takes through the engine."""

    cell: str = "lstm"
    T: int = 7
    B: int = 5
    I: int = 11  # noqa: E741
    H: int = 19
    P: int = 0  # 0 without projection
    reverse: tuple[bool, ...] = (False,)
    bias: bool = True
    lengths: bool = False
    resets: bool = False
    single: bool = False  # a single step, without axes of length one


def make_call(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = True) -> Call:
    """A call of random values; every tensor of it is a leaf that asks for its gradient."""
    g = torch.Generator().manual_seed(seed)
    cell, streams, out = CELLS[case.cell], len(case.reverse), case.P or case.H

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_(grad)

    def stream() -> Weights:
        rows, scale = cell.gates * case.H, case.H**-0.5
        biases = [draw(rows, scale=scale) if case.bias else None for _ in range(2)]
        w_hr = draw(case.P, case.H, scale=scale) if case.P else None
        return Weights(draw(rows, case.I, scale=case.I**-0.5), draw(rows, out, scale=scale), *biases, w_hr)

    sizes, rows = None, (case.T, case.B)
    if case.lengths:
        lengths = torch.randint(1, case.T + 1, (case.B,), generator=g)
        lengths[0] = case.T
        sizes = (lengths[None] > torch.arange(case.T)[:, None]).sum(1)
        rows = (int(sizes.sum()),)
    resets = (torch.rand(rows, generator=g) < 0.3) if case.resets else None
    lead = (case.B,) if case.single else (streams, case.B)
    states = (draw(*lead, out), draw(*lead, case.H))[: cell.states]
    x = draw(*((case.B,) if case.single else rows), case.I)
    weights = tuple(stream() for _ in case.reverse)
    params = tuple(tuple(draw(case.H) for _ in range(cell.params)) for _ in case.reverse) if cell.params else ()
    return Call(cell, x, states, weights, case.reverse, batch_sizes=sizes, resets=resets, params=params)


def inputs_of(call: Call) -> dict[str, Tensor]:
    """The tensors of a call that may have gradients, by name."""
    named = {"x": call.x, **{f"state {k}": a for k, a in enumerate(call.states)}}
    for s, w in enumerate(call.weights):
        named |= {f"{field} of stream {s}": a for field, a in w._asdict().items() if a is not None}
    for s, own in enumerate(call.params):
        named |= {f"parameter {k} of stream {s}": p for k, p in enumerate(own)}
    return named


def like(call: Call, dtype: torch.dtype) -> Call:
    """The same values as leaves of another type."""
    return call.with_flat([None if a is None else a.detach().to(dtype).requires_grad_() for a in call.flat])


def outputs(call: Call, reference: bool = False, backend: Backend = CPU, **options: Any) -> list[Tensor]:
    """y (unless it is the first final state) and the final states."""
    result = differentiable.run(REFERENCE, call) if reference else recurrence(backend, call, **options)
    return list(result.finals) if call.single_step else [result.y, *result.finals]


def run(call: Call, reference: bool = False, seed: int = 1, backward: bool = True, **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradient of their product with random numbers for every input; `options` as of `outputs`."""
    outs = outputs(call, reference, **options)
    named = {f"output {k}": a.detach() for k, a in enumerate(outs)}
    if backward:
        g = torch.Generator().manual_seed(seed)
        seeds = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device, o.dtype) for o in outs]
        inputs = inputs_of(call)
        found = torch.autograd.grad(outs, list(inputs.values()), seeds)
        named |= {f"gradient of {name}": d for name, d in zip(inputs, found, strict=True)}
    return named


def assert_parity(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, factor: float = 1.0) -> None:
    """The engine in `dtype` against the reference in fp64 on the same numbers: outputs and every gradient."""
    call = make_call(case, dtype, seed)
    want = run(like(call, torch.float64), reference=True)
    got = run(call)
    assert list(got) == list(want)
    for name, a in got.items():
        assert a.dtype == dtype
        assert_equal(f"{case} {dtype} {name}", a, want[name].to(dtype), factor * TOLERANCE[dtype])


def assert_same_bits(what: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, a in want.items():
        assert not a.isnan().any(), f"{what} {name}: NaN"
        assert torch.equal(got[name], a), f"{what} {name}: differs by {float((got[name] - a).abs().max()):.1e}"


def fill_workspace_with_nan() -> None:
    """The engine keeps its scratch memory from call to call: leave nothing in it that could pass for a result."""
    call = make_call(Case(T=3, B=40, I=70, H=70, P=33, reverse=(False, True)), torch.float32, grad=False)
    nan = [torch.full_like(a, float("nan")) for a in (call.x, *call.states)]
    weights = tuple(
        Weights(*(None if a is None else torch.full_like(a, float("nan")) for a in w)) for w in call.weights
    )
    run(call._replace(x=nan[0], states=tuple(nan[1:]), weights=weights), backward=False)
