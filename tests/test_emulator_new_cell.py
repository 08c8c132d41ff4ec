"""A cell with per-unit parameters, that of docs/adding-a-cell.md, in the CUDA kernels on the emulator."""

from __future__ import annotations

import importlib.util
import sys

import emulator_build
import pytest
import torch
from emulator_support import Emulated, needs_emulator
from engine_support import Case, inputs_of, like
from support import error
from test_emulator_grid import K2
from test_emulator_kernels import BOTH, NUMBERS, REVERSE, make
from test_new_cell import page
from tolerances import KERNELS

from fastrnn import differentiable, gradients
from fastrnn.backends.base import GATES
from fastrnn.backends.reference import REFERENCE
from fastrnn.backends.triton.precision import fp32_precision

__all__ = ["page"]
pytestmark = [needs_emulator, pytest.mark.slow, pytest.mark.usefixtures("poisoned", "page")]
CELL = """
#pragma once

#include "cells/math.h"

namespace fastrnn {

struct LstmPeephole {
  static constexpr const char* kName = "lstm_peephole";
  static constexpr int kGates = 4, kStates = 2, kTape = 4, kSplit = 0, kParams = 3;  // i f g o; h c; i f g o; of i f o
  static constexpr bool kReadsH = false, kProjects = false, kReadsPreviousH = false;

  template <class F>
  static FASTRNN_HD void step(const F (&a)[4], const F (&s)[2], const F* p, F (&s1)[2], F (&tape)[4]) {
    const F i = sigmoid(a[0] + p[0] * s[1]), f = sigmoid(a[1] + p[1] * s[1]), g = tanh(a[2]);
    const F c = f * s[1] + i * g, o = sigmoid(a[3] + p[2] * c);
    s1[0] = o * tanh(c), s1[1] = c;
    tape[0] = i, tape[1] = f, tape[2] = g, tape[3] = o;
  }

  template <class F>
  static FASTRNN_HD void step_backward(const F (&tape)[4], const F (&s)[2], const F (&s1)[2], const F* p, F (&ds)[2],
                                       F (&d)[4], F* dp) {
    const F i = tape[0], f = tape[1], g = tape[2], o = tape[3], one = F(1), tc = tanh(s1[1]);
    d[3] = ds[0] * tc * o * (one - o);
    const F dc = ds[1] + ds[0] * o * (one - tc * tc) + d[3] * p[2];
    d[0] = dc * g * i * (one - i), d[1] = dc * s[1] * f * (one - f), d[2] = dc * i * (one - g * g);
    dp[0] = d[0] * s[1], dp[1] = d[1] * s[1], dp[2] = d[3] * s1[1];
    ds[0] = F(0), ds[1] = dc * f + d[0] * p[0] + d[1] * p[1];
  }
};

}  // namespace fastrnn
"""
# What knows the list of cells, and the new cell's own kernels, of two number types.
CHANGED = ["gpu.cpp", "plan.cpp", "launch.cpp"]
CHANGED += [f"{way}_LstmPeephole_{number}.cpp" for way in ("forward", "backward") for number in ("Bf16", "Fp32")]
CASES = {
    "odd": Case(),
    "lengths and resets": Case(T=6, B=11, I=3, H=33, reverse=BOTH, lengths=True, resets=True),
    "reverse, no bias": Case(T=3, B=17, I=3, H=40, reverse=REVERSE, bias=False, lengths=True),
}
# What the plan is asked for, and the (blocks, variant) of both directions
WAYS = {
    "K1": ({"kernel": 1}, {}),
    "K1 in clusters": ({}, {False: (2, 2), True: (2, 4)}),
    "K2": (K2, {}),
    "K2, tiles one after another": ({**K2, "groups": 1, "warps": 1}, {}),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The emulator with the cell in the list."""
    folder = tmp_path_factory.mktemp("peephole")
    copy = emulator_build.sources(folder)
    (copy / "cells" / "lstm_peephole.h").write_text(CELL)
    emulator_build.replace(copy / "cells" / "list.h", "DO(RnnRelu)", "DO(RnnRelu) DO(LstmPeephole)")
    emulator_build.replace(copy / "cells" / "list.h", "rnn.h", 'rnn.h"\n#include "cells/lstm_peephole.h')
    emulator_build.replace(copy / "cuda" / "find.cuh", "DO(C, Fp16) DO(C, Tf32) ", "")
    spec = importlib.util.spec_from_file_location("_emulator", emulator_build.build(folder, CHANGED))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "_emulator" not in sys.modules or sys.modules["_emulator"] is not module
    return module


def with_params(call, seed=0):
    """The call with three vectors for each stream."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(3, call.hidden, generator=g, dtype=torch.float64) / 2 for _ in call.weights]
    return call._replace(params=tuple(tuple(p.to(call.x.dtype).requires_grad_()) for p in values))


def whole(call, dtype):
    params = tuple(tuple(p.detach().to(dtype).requires_grad_() for p in own) for own in call.params)
    return like(call, dtype)._replace(params=params)


def all_inputs(call):
    named = [(f"parameter {k} of stream {s}", p) for s, own in enumerate(call.params) for k, p in enumerate(own)]
    return {**inputs_of(call), **dict(named)}


def backward(backend, call, result, douts):
    """Every gradient by name, as they follow from the gates' and from what the backend has made itself."""
    dy, *dfinals, dc = douts
    everything = (True,) * 40
    dc = dc.flatten(1, 2)
    found = gradients.backward(backend, call, result.saved, result.y, dy, tuple(dfinals), everything, dc=dc)
    own = backend.backward(call, result.saved, result.y, dy, tuple(dfinals), everything, False, dc)
    inputs = list(all_inputs(call))
    count = sum(len(p) for p in call.params)
    of_params = [d for stream in own.dparams for d in stream]
    kept = [d for d in found if d is not None][: len(inputs) - count]
    return dict(zip(inputs, [*kept, *of_params], strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", ["bf16", "fp32"])
def test_parity(emulator, number, way, case):
    """Outputs, states, and the gradients of all of them by every input against autograd of the reference in fp64."""
    backend = Emulated(emulator)
    backend.asked, backend.forced = WAYS[way]
    call = with_params(make(CASES[case]._replace(cell="lstm_peephole"), number))
    exact = whole(call, torch.float64)
    want = differentiable.run(REFERENCE, exact, trail=True)
    wanted = [want.y, *want.finals, *want.trail]
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(call.x.dtype) for o in wanted]
    with torch.no_grad(), fp32_precision("ieee"):
        result = backend.forward(call, GATES)
        found = backward(backend, call, result, douts)
    got = [result.y, *result.finals, result.saved.c.view(wanted[-1].shape)]
    for name, a, b in zip(("y", "h_n", "c_n", "c"), got, wanted, strict=True):
        assert error(a, b) <= KERNELS[number], name
    inputs = all_inputs(exact)
    for name, b in zip(
        inputs, torch.autograd.grad(wanted, list(inputs.values()), [d.double() for d in douts]), strict=True
    ):
        assert found[name].shape == b.shape, name
        assert found[name].dtype is NUMBERS[number], name
        assert error(found[name], b) <= KERNELS[number], name


@pytest.mark.parametrize("way", WAYS)
def test_no_schedule_changes_a_bit(emulator, way):
    backend = Emulated(emulator)
    backend.asked, backend.forced = WAYS[way]
    call = with_params(make(Case("lstm_peephole", T=5, B=11, I=3, H=40, lengths=True, resets=True), "bf16"))
    found = []
    with torch.no_grad():
        for seed in range(4):
            emulator.schedule(seed=seed)
            result = backend.forward(call, GATES)
            grads = backend.backward(call, result.saved, result.y, result.y, result.finals, (True,) * 40, False)
            found.append([result.y, grads.dgates, *grads.dparams[0]])
    emulator.schedule()
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_no_races(emulator):
    if not emulator.detects_races:
        pytest.skip("no detector of races in this build")
    backend = Emulated(emulator)
    call = with_params(make(Case("lstm_peephole", T=3, B=9, I=3, H=40, lengths=True, resets=True), "fp32"))
    with torch.no_grad(), fp32_precision("ieee"):
        for seed, (backend.asked, backend.forced) in enumerate(WAYS.values()):
            emulator.schedule(seed=seed, races=True)
            result = backend.forward(call, GATES)
            backend.backward(call, result.saved, result.y, result.y, result.finals, (True,) * 40, False)
    emulator.schedule()


def test_without_its_values_it_is_refused(emulator):
    code = emulator.cells.index("lstm_peephole")
    plan = emulator.plan(code, 0, False, 1, 5, 24, emulator.limits(0), kernel=1)
    with pytest.raises(ValueError, match="the values of the cell's units are missing"):
        emulator.forward(plan, code, 0, [1, 5, 24, 1, 0, 24], [0] * 16, 0, 4)
