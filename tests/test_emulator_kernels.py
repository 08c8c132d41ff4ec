"""The CUDA kernels on the emulator against the fp64 reference: outputs, every state and every gradient."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from device_support import stays_on
from emulator_support import EMULATOR, NUMBERS, ROOT, Emulated, emulated, needs_emulator, needs_races
from engine_support import Case, inputs_of, like, make_call
from support import error
from tolerances import KERNELS
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import differentiable
from fastrnn.backends.base import GATES, Backend, Call
from fastrnn.backends.reference import REFERENCE
from fastrnn.cells import CELLS
from fastrnn.recurrence import recurrence

__all__ = ["emulated"]
pytestmark = [needs_emulator, pytest.mark.usefixtures("poisoned")]
BOTH, REVERSE = (False, True), (True,)
CASES = {
    "odd": Case(),
    "one step": Case(T=1, B=3, I=2, H=8),
    "reverse": Case(T=4, B=8, I=3, H=40, reverse=REVERSE),
    "both directions, lengths": Case(T=6, B=11, I=3, H=24, reverse=BOTH, lengths=True),
    "reverse, resets": Case(T=6, B=3, I=3, H=16, reverse=REVERSE, resets=True),
    "lengths, resets": Case(T=9, B=9, I=3, H=33, reverse=BOTH, lengths=True, resets=True),
    "no bias": Case(T=3, B=17, I=3, H=20, bias=False),
}


def make(case: Case, number: str, seed: int = 0, states: bool = True) -> Call:
    """A padded call; lengths in any order, zero among them, resets none beyond."""
    call = make_call(case._replace(lengths=False, resets=False), NUMBERS[number], seed)
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, case.T + 1, (case.B,), generator=g) if case.lengths else None
    resets = torch.rand(case.T, case.B, generator=g) < 0.3 if case.resets else None
    if resets is not None and lengths is not None:
        resets &= torch.arange(case.T)[:, None] < lengths
    return call._replace(lengths=lengths, resets=resets, states=call.states if states else ())


def run(backend: Backend, call: Call, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and the gradients of their product with random numbers."""
    run_on = differentiable.run if backend is REFERENCE else recurrence
    trail = call.cell.states > 1
    result = run_on(backend, call, trail=trail)
    outs = [result.y, *result.finals, *result.trail]
    g = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outs]
    inputs = inputs_of(call)
    found = torch.autograd.grad(outs, list(inputs.values()), seeds)
    named = {f"output {k}": a.detach() for k, a in enumerate(outs)}
    return named | {f"gradient of {name}": d for name, d in zip(inputs, found, strict=True)}


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def assert_parity(backend: Emulated, call: Call, number: str) -> dict[str, Tensor]:
    got, want = run(backend, call), run(REFERENCE, like(call, torch.float64))
    # Near zero, rounding decides whether a ReLU lets a gradient through: so as a whole, where rounding is coarse.
    coarse = call.cell.name == "rnn_relu" and number == "bf16"
    measure, limit = (distance, 4 * KERNELS[number]) if coarse else (error, KERNELS[number])
    assert list(got) == list(want)
    for name, a in got.items():
        assert a.shape == want[name].shape
        assert a.dtype == NUMBERS[number]
        e = measure(a, want[name])
        assert e <= limit, f"{call.cell.name} {number} {name}: relative error {e:.1e}"
    return got


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(emulated, cell, number, case):
    assert_parity(emulated(number), make(CASES[case]._replace(cell=cell), number), number)


@pytest.mark.parametrize("cell", CELLS)
def test_zero_states(emulated, cell):
    assert_parity(emulated("fp32"), make(Case(cell, T=3, H=24), "fp32", states=False), "fp32")


# What the plan is asked for, and the (blocks, variant) of the forward: one block, a cluster, K2
PADDED = {"one block": ({}, (1, 0)), "a cluster": ({}, (2, 2)), "K2": ({"kernel": 2}, (2, 8))}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("way", PADDED)
@pytest.mark.parametrize("cell", CELLS)
def test_a_size_that_is_padded_keeps_infinities_in_their_rows(emulated, cell, way, number):
    """Gates saturate at an infinite input or state as in the reference: 0 * inf in the padding would make NaN of all.

    Where fp32 is three products, an infinite h makes NaN of its row from the next step on.
    """
    backend = emulated(number)
    backend.asked, forward = PADDED[way]
    backend.forced = {False: forward}
    call = make(Case(cell, T=4, B=6, I=3, H=19), number)
    h = call.states[0].detach()
    h[0, 2, 7], h[0, 3, 4], h[0, 4, 18], h[0, 4, 3] = torch.inf, -torch.inf, torch.inf, -torch.inf
    call.x.detach()[1, 1, 2] = torch.inf
    with torch.no_grad():
        got, want = recurrence(backend, call), differentiable.run(REFERENCE, like(call, torch.float64))
    split = list(range(2, 5)) if number == "fp32" else []
    if cell == "rnn_relu" and number == "fp32":
        split.append(1)  # whose h is infinite after the second step
    for name, a, b in zip(
        ("y", *(f"final state {k}" for k in range(call.cell.states))),
        (got.y, *got.finals),
        (want.y, *want.finals),
        strict=True,
    ):
        for row in range(6):
            ours, theirs = a[:, row].double(), b[:, row]
            if row in split:
                continue
            options = {"rtol": KERNELS[number], "atol": KERNELS[number] * float(theirs.nan_to_num(0, 0, 0).abs().max())}
            message = f"{name} of row {row}: {{}}".format
            torch.testing.assert_close(ours, theirs, **options, equal_nan=True, msg=message)
    saturated = want.y[-1, 1 if cell == "gru" else 2]
    assert cell == "rnn_relu" or saturated.isfinite().any()
    assert all(got.y[3, row].isnan().all() for row in split)


@pytest.mark.parametrize("reverse", [REVERSE, BOTH])
@pytest.mark.parametrize("cell", CELLS)
def test_results_of_padded_sizes_are_contiguous(emulated, cell, reverse):
    """As torch.compile has been told, and as they are saved."""
    backend = emulated("bf16")
    call = make(Case(cell, T=3, B=3, I=3, H=19, reverse=reverse), "bf16")
    with torch.no_grad():
        result = backend.forward(call, GATES)
        found = backend.backward(call, result.saved, result.y, result.y, result.finals, (True,) * 20, True)
    for a in (result.y, *result.finals, *result.saved, found.dgates, *found.dstates):
        assert a is None or a.is_contiguous()


def test_compiled_at_a_padded_size(emulated):
    emulated("fp32")
    module, x = fastrnn.LSTM(5, 19, backend="cuda"), torch.randn(7, 5, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    (y, _), (compiled_y, _) = module(x), compiled(x)
    assert torch.equal(compiled_y, y)
    assert all(map(torch.equal, *(torch.autograd.grad(a.sum(), list(module.parameters())) for a in (y, compiled_y))))


def test_lengths_out_of_range_touch_nothing(emulated):
    """On the device nobody has checked them: the kernels take them as 0 and T."""
    backend = emulated("fp32")
    call = make(Case("lstm", T=4, B=5, I=3, H=19, reverse=BOTH), "fp32")
    wild = call._replace(lengths=torch.tensor([9, -3, 4, 1 << 40, 2]))
    tame = call._replace(lengths=torch.tensor([4, 0, 4, 4, 2]))
    with torch.no_grad():
        runs = [backend.forward(c, GATES) for c in (wild, tame)]
        back = [
            backend.backward(c, r.saved, r.y, r.y, r.finals, (True,) * 20, False)
            for c, r in zip((wild, tame), runs, strict=True)
        ]
    assert all(map(torch.equal, (runs[0].y, *runs[0].finals), (runs[1].y, *runs[1].finals)))
    assert all(map(torch.equal, (back[0].dgates, *back[0].dstates), (back[1].dgates, *back[1].dstates)))


@pytest.mark.parametrize("cell", CELLS)
def test_a_tape_that_is_kept_is_not_overwritten(emulated, cell):
    backend = emulated("bf16")
    call = make(Case(cell, T=4, B=3, I=3, H=24), "bf16")
    with torch.no_grad():
        result = backend.forward(call, GATES)
        before = [None if a is None else a.clone() for a in result.saved]
        first = backend.backward(call, result.saved, result.y, result.y, result.finals, (True,) * 20, False)
        for a, b in zip(result.saved, before, strict=True):
            assert a is b or torch.equal(a, b)
        last = backend.backward(call, result.saved, result.y, result.y, result.finals, (True,) * 20, True)
    assert torch.equal(first.dgates, last.dgates)
    dtypes = backend.saved_dtypes(torch.bfloat16)
    assert all(a is None or a.dtype is d for a, d in zip(before, dtypes, strict=True))


# (blocks, variant) of the forward and of the backward
PAIRS = [((1, 0), (1, 0)), ((2, 2), (2, 4)), ((3, 4), (3, 4)), ((3, 5), (3, 7))]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_no_schedule_changes_a_bit(emulated, cell, forward, backward):
    backend = emulated("bf16")
    backend.forced = {False: forward, True: backward}
    call = make(Case(cell, T=8, B=5, I=3, H=72, lengths=True, reverse=BOTH), "bf16")
    runs = []
    for seed in range(8):
        EMULATOR.schedule(seed=seed, resident=1 if seed == 3 else 1 << 30)
        runs.append(run(backend, call))
    assert all(same_bits(runs[0], r) for r in runs)


@needs_races
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_no_races(emulated, cell, forward, backward):
    backend = emulated("fp32")
    backend.forced = {False: forward, True: backward}
    call = make(Case(cell, T=5, B=3, I=3, H=48, lengths=True, resets=True), "fp32")
    for seed in range(3):
        EMULATOR.schedule(seed=seed, races=True)
        assert_parity(backend, call, "fp32")


def test_a_call_that_does_not_fit_says_why(emulated):
    backend: Any = emulated("fp32")
    plan = backend.plan("lstm", 3, False, 1, 16, 1160)
    assert "lstm with H=1160" in plan.error
    assert "KiB of shared memory, each of the 132 multiprocessors has 227" in plan.error
    code = EMULATOR.cells.index("lstm")
    ampere = EMULATOR.Limits(80, 163 << 10, 1, 108)
    assert not EMULATOR.plan(code, 0, False, 1, 16, 128, ampere).error
    assert EMULATOR.plan(code, 0, False, 1, 16, 256, ampere, kernel=1).error
    assert "8.0 or later" in EMULATOR.plan(code, 0, False, 1, 16, 64, EMULATOR.Limits(75, 64 << 10, 1, 40)).error
    assert "multiple of 8" in EMULATOR.plan(code, 0, False, 1, 16, 65, ampere).error


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_waits_for_the_device(emulated, cell):
    """No operation reads a value, so that a call can be captured in a CUDA graph."""
    backend = emulated("bf16")
    call = make(Case(cell, T=3, B=3, I=3, H=20, lengths=True, resets=True, reverse=BOTH), "bf16")
    with torch.no_grad(), stays_on("cpu"):
        result = backend.forward(call, GATES)
        backend.backward(call, result.saved, result.y, result.y, result.finals, (True,) * 20, True)


@pytest.mark.parametrize("cell", CELLS)
def test_a_module_by_name(emulated, cell):
    emulated("fp32")
    kinds = {"lstm": (fastrnn.LSTM, torch.nn.LSTM), "gru": (fastrnn.GRU, torch.nn.GRU)}
    ours, theirs = kinds.get(cell, (fastrnn.RNN, torch.nn.RNN))
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    torch.manual_seed(0)
    module = ours(5, 16, num_layers=2, bidirectional=True, backend="cuda", **options)
    reference = theirs(5, 16, num_layers=2, bidirectional=True, **options)
    reference.load_state_dict(module.state_dict())
    x = pack_sequence([torch.randn(n, 5) for n in (6, 2, 3)], enforce_sorted=False)
    (got, _), (want, _) = module(x), reference(x)
    assert error(got.data, want.data) < KERNELS["fp32"]
    got.data.sum().backward()
    want.data.sum().backward()
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert error(p.grad, q.grad) < KERNELS["fp32"], name


def test_automatic_choice_passes_it_over_and_says_why(emulated):
    emulated("fp32")
    choice = fastrnn.explain(fastrnn.LSTM(5, 16).double().float(), torch.zeros(3, 2, 5))
    assert choice.backend.name != "cuda"
    with fastrnn.backend("cuda"):
        choice = fastrnn.explain(fastrnn.LSTM(5, 16), torch.zeros(3, 2, 5))
    assert "K1: 1x1 blocks of 32 threads, 1 to a cluster with 16 units each" in choice.reason
    with pytest.raises(RuntimeError, match="the kernels have no projections"):
        fastrnn.LSTM(5, 16, proj_size=3, backend="cuda")(torch.zeros(3, 2, 5))
    with pytest.raises(RuntimeError, match=r"the kernels have no torch\.float64"):
        fastrnn.LSTM(5, 16, backend="cuda", dtype=torch.float64)(torch.zeros(3, 2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="lstm with H=1160 on the chip"):
        fastrnn.LSTM(5, 1160, backend="cuda")(torch.zeros(3, 2, 5))


# The table of docs/cuda.md: number type by its first column's last words, limits by its first.
DEVICES = {"sm_90": (90, 227, 16), "sm_120": (120, 99, 8), "sm_80": (80, 163, 1)}


def test_the_documented_sizes_are_the_plans():
    text = (ROOT / "docs" / "cuda.md").read_text()
    rows = re.findall(r"\| (sm_\d+).*?(16 bits|fp32 and TF32) \|(.*)\|", text)
    assert len(rows) == 6
    for device, numbers, sizes in rows:
        capability, kib, cluster = DEVICES[device]
        limits = EMULATOR.Limits(capability, kib << 10, cluster, 132)
        for cell, pair in zip(("lstm", "gru", "rnn_tanh"), sizes.split("|"), strict=True):
            for backward, documented in enumerate(map(int, pair.split("/"))):
                code, number = EMULATOR.cells.index(cell), 0 if numbers == "16 bits" else 3
                unit = 8 if number == 0 else 4
                for hidden, fits in ((documented, True), (documented + unit, False)):
                    found = EMULATOR.plan(code, number, bool(backward), 1, 16, hidden, limits, kernel=1)
                    assert (not found.error) == fits, (device, numbers, cell, backward, hidden)
