"""Several layers side by side on the CUDA kernels, which begin a chunk before the states of the last one are there."""

from __future__ import annotations

import contextlib

import pytest
import torch
from emulator_support import EMULATOR, NUMBERS, emulated, needs_emulator
from support import error, leaves
from tolerances import KERNELS
from wavefront_support import Hazard, Operations, Watched

import fastrnn
from fastrnn import wavefront
from fastrnn.backends.base import Query
from fastrnn.wavefront import SETTING
from fastrnn.wavefront import lanes as streams

__all__ = ["emulated"]
pytestmark = needs_emulator
T, B, I, H = 7, 5, 3, 24  # noqa: E741


def run(module, x, **options):
    outs = leaves(module(x, **options))
    loss = torch.stack([(o.float() * (k + 1)).square().sum() for k, o in enumerate(outs)]).sum()
    return [*outs, *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("number", ["bf16", "fp32"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_results_are_those_of_layers_one_after_the_other(emulated, monkeypatch, cell, number):
    backend = emulated(number)
    torch.manual_seed(1)
    module = getattr(fastrnn, cell)(I, H, 2, backend="cuda", dtype=NUMBERS[number])
    x = torch.randn(T, B, I, dtype=NUMBERS[number], requires_grad=True)
    masks = {"lengths": torch.tensor([7, 2, 0, 5, 4]), "resets": torch.rand(T, B) < 0.3}
    monkeypatch.setenv(SETTING, "0")
    want = run(module, x, **masks)
    monkeypatch.setenv(SETTING, "3")
    calls = []
    after = type(backend).forward_after
    monkeypatch.setattr(type(backend), "forward_after", lambda *a: calls.append(1) or after(*a))
    got = run(module, x, **masks)
    assert len(calls) == 2 * 3
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (e := error(a, b)) < 2 * KERNELS[number], f"result {k}: {e:.1e}"


def test_the_share_of_the_gpu_is_the_plans(emulated):
    backend = emulated("bf16")
    query = Query("lstm", "cpu", torch.bfloat16, T, 40, I, 64, 64, 1, grad=True)
    grids = [backend.plan("lstm", 0, way, 1, 40, 64).grid for way in (False, True)]
    assert backend.share(query) == max(x * y for x, y in grids) / EMULATOR.limits(0).multiprocessors
    assert 0 < backend.share(query._replace(grad=False)) <= backend.share(query) < 1
    assert backend.share(query._replace(B=4096)) > 1


def test_the_share_of_k2_is_that_of_its_blocks(emulated, monkeypatch):
    """So that two launches that wait within find room for all of their blocks."""
    backend, query = emulated("bf16"), Query("lstm", "cuda", torch.bfloat16, 512, 8, 64, 1024, 1024, 1, grad=True)
    monkeypatch.setattr(wavefront, "_captured", lambda query: False)
    plans = [backend.plan("lstm", 0, way, 1, 8, 1024) for way in (False, True)]
    assert [plan.kernel for plan in plans] == [2, 2]
    share = backend.share(query)
    assert share == max(plan.grid[0] for plan in plans) / EMULATOR.limits(0).multiprocessors <= 0.5
    decision = wavefront.decide(backend, query, 3)
    assert decision.at_once == int(1 / share) == 2
    assert "3 layers, 2 at a time, 2 chunks" in decision.reason
    assert backend.share(query._replace(H=2048)) > 0.5
    assert "one of them takes" in wavefront.decide(backend, query._replace(H=2048), 3).reason


@pytest.mark.parametrize("late", [True, False])
def test_nothing_reads_the_states_too_early(emulated, monkeypatch, late):
    """All that the backend does before `ready` is seen, as it is torch that reads the states first."""
    backend = emulated("fp32")
    if not late:
        after = type(backend).forward_after
        monkeypatch.setattr(
            type(backend), "forward_after", lambda self, call, save, ready: after(self, call, save, lambda: None)
        )
    lanes = Watched()
    monkeypatch.setattr(streams, "lanes_of", lambda _, n: lanes.begin(n))
    monkeypatch.setenv(SETTING, "2")
    module, x = fastrnn.LSTM(I, 19, 2, backend="cuda"), torch.randn(T, B, I)  # H is padded, which reads the states
    outcome = contextlib.nullcontext() if late else pytest.raises(Hazard, match="does not wait")
    with torch.no_grad(), Operations(lanes), outcome:
        module(x)
    assert lanes.waits
