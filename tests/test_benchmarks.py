"""The benchmark suite: both sides do the same, nothing that is wrong is timed, and what one measurement holds."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_support import COMBINATIONS, STEP, TINY, OtherLibrary, job, options
from torch import nn

import fastrnn
from benchmarks import bandwidth, overhead, saving, slow_paths
from fastrnn.backends import steps_natively
from fastrnn.bench import environment, measuring, memory, parity, shapes, subjects

# The two sides


@pytest.mark.parametrize(("case", "cell", "mode"), COMBINATIONS)
def test_both_sides_agree_and_the_gate_sees_every_tensor(case, cell, mode):
    baseline, subject = subjects.pair(case, cell, mode, torch.float32, OtherLibrary())
    expected, actual = baseline.observe(), subject.observe()
    parity.check(expected, actual, torch.float32)
    names = {"y", "h"} | ({"c"} if cell == "LSTM" else set())
    if mode == "training":
        names |= {"grad x"} | {f"grad {name}" for name, _ in baseline.module.named_parameters()}
    assert expected.keys() == names
    for name in names:
        broken = {**actual, name: actual[name] + 0.01 * expected[name].abs().max()}
        with pytest.raises(parity.Mismatch, match=f"^{name}: differs"):
            parity.check(expected, broken, torch.float32)


def test_training_gradients_do_not_accumulate_over_iterations():
    side = subjects.build(TINY[0], "GRU", "training", torch.float64, nn)
    first = side.observe()
    side.iterate()
    parity.check(first, side.observe(), torch.float64)


def test_lengths_are_those_of_the_padded_batch():
    case = next(c for c in shapes.CASES if c.form == "lengths")
    assert len(case.lengths) == case.B == 32
    assert 20 <= min(case.lengths) < 60
    assert 240 < max(case.lengths) == case.T <= 300
    assert case.tokens == sum(case.lengths) < case.T * case.B


def test_flops_are_those_of_the_matrix_products():
    case = shapes.Case("x", T=5, B=2, I=3, H=4, layers=2, bidirectional=True)
    weights = sum(p.numel() for n, p in nn.GRU(3, 4, 2, bidirectional=True).named_parameters() if "weight" in n)
    assert case.flops("GRU", "inference") == 2 * 10 * weights
    assert case.flops("GRU", "training") == 3 * case.flops("GRU", "inference")


# The gate


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: a * (1 + 1e-3), "differs"),
        (lambda a: a[:1], "float32 (1, 3)"),
        (lambda a: a.double(), "float64"),
        (lambda a: a.index_fill(0, torch.tensor([0]), float("nan")), "not finite"),
    ],
)
def test_gate_refuses(wrong, message):
    a = torch.arange(1.0, 7.0).reshape(2, 3)
    assert parity.check({"y": a}, {"y": a.clone()}, torch.float32) == {"y": 0.0}
    with pytest.raises(parity.Mismatch) as refused:
        parity.check({"y": a}, {"y": wrong(a)}, torch.float32)
    assert message in str(refused.value)


def test_gate_refuses_a_missing_tensor():
    with pytest.raises(parity.Mismatch):
        parity.check({"y": torch.ones(1), "h": torch.ones(1)}, {"y": torch.ones(1)}, torch.float32)


def test_no_time_is_taken_of_a_wrong_result(monkeypatch):
    def compare(*_, **__):
        pytest.fail("timed before the gate")

    monkeypatch.setattr(measuring, "blocks", compare)
    for what in ("timing", "latency"):
        with pytest.raises(parity.Mismatch, match="y: differs"):
            measuring.MEASURE[what](job(TINY[0]), options(OtherLibrary(error=1e-3), compare=compare))


# One measurement


def test_latency_is_of_steps_whose_state_goes_on():
    seen = []

    class Module(nn.LSTM):
        def forward(self, x, hx=None):
            seen.append(hx)
            return super().forward(x, hx)

    module = Module(3, 4)
    step = measuring._stream(subjects.Subject(module, None, None, (torch.zeros(1, 1, 3),)))
    step()
    step()
    assert seen[0] is None
    want = nn.LSTM.forward(module, torch.zeros(1, 1, 3))[1]
    assert torch.equal(seen[1][0], want[0])
    record = measuring.latency(job(STEP, "LSTM"), options(OtherLibrary()))
    assert record["steps"] >= 100
    assert all(0 < record[side]["p50"] <= record[side]["p99"] for side in ("baseline", "subject"))


def test_kernels_are_named():
    record = measuring.timing(job(TINY[0], "LSTM"), options(OtherLibrary(), kernels=True))
    assert any("lstm" in name for name in record["kernels"]["torch.nn"])


def test_small_benchmarks_give_a_line_of_positive_figures():
    for text, start, figures in (
        (bandwidth.line("GRU", 24, 0.01), "GRU     24      6 KiB", 3),
        (overhead.line("LSTMCell", 8, 0.01), "LSTMCell  H=8    |", 9),
        (overhead.batch_line("GRUCell", 64, 192, 0.01).removesuffix("| ours"), "GRUCell   B=64  H=192  |", 3),
        (overhead.batch_line("LSTMCell", 12, 193, 0.01).removesuffix("| ours"), "LSTMCell  B=12  H=193  |", 3),
        (overhead.batch_line("RNNCell", 5, 8, 0.01).removesuffix("| torch.nn"), "RNNCell   B=5   H=8    |", 3),
    ):
        assert text.startswith(start)
        values = [float(v) for v in text.removeprefix(start).replace("|", " ").split()]
        assert len(values) == figures
        assert min(values) >= 0


def test_the_grid_of_batches_lies_on_both_sides_of_the_rule_and_runs_the_engine(monkeypatch):
    for kind in overhead.CELLS:
        cell = kind.removesuffix("Cell").lower()
        sides = {steps_natively(cell, b, h) for b in overhead.BATCHES for h in overhead.CELL_SIZES}
        assert sides == {True, False}, kind
    timed = []
    monkeypatch.setattr(overhead, "interleave", lambda calls, _: timed.append(calls) or [[1.0], [2.0]])
    assert overhead.batch_line("RNNCell", 64, 16, 0.0).endswith("| 1000000.0 2000000.0   0.50 | torch.nn")
    ((theirs, ours),) = timed
    assert type(module_of(theirs)) is nn.RNNCell
    assert module_of(ours).backend == "cpu"


def module_of(call):
    return inspect.getclosurevars(call).nonlocals["module"]


def test_a_cell_with_wrong_gradients_is_not_timed(monkeypatch):
    class Wrong(nn.GRUCell):
        def __init__(self, *sizes, backend):
            super().__init__(*sizes)

        def forward(self, x):
            h = super().forward(x)
            return h + 0.01 * (self.bias_hh.sum() - self.bias_hh.sum().detach())

    monkeypatch.setattr(overhead.fastrnn, "GRUCell", Wrong)
    monkeypatch.setattr(overhead, "interleave", lambda *_: pytest.fail("timed before the gate"))
    with pytest.raises(AssertionError, match="not close"):
        overhead.batch_line("GRUCell", 3, 5, 0.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use, in forward mode
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("benchmark", [bandwidth, overhead, saving, slow_paths], ids=lambda b: b.__name__)
def test_a_small_benchmark_tells_first_where_it_runs(benchmark, monkeypatch, capsys):
    sizes = {"KINDS": ("GRU",), "CELLS": ("GRUCell",) if benchmark is overhead else ("GRU",), "BATCHES": (2,)}
    sizes |= {"SIZES": (8,), "CELL_SIZES": (8,), "SHAPES": ((3, 2, 8),)}
    for name in sizes.keys() & vars(benchmark).keys():
        monkeypatch.setattr(benchmark, name, sizes[name])
    monkeypatch.setattr(os, "getloadavg", lambda: (1.25, 7.0, 7.0))
    threads = torch.get_num_threads()
    try:
        benchmark.main(0.0)
    finally:
        torch.set_num_threads(threads)
    facts = environment.describe(fastrnn)
    first, *table = capsys.readouterr().out.splitlines()
    assert first == f"{facts['cpu']}; torch {torch.__version__}, commit {facts['commit']}, 1 thread, load 1.2"
    assert any("GRU" in row for row in table)


def test_the_heading_tells_the_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert ", 2 threads, load " in environment.heading(nn)
    finally:
        torch.set_num_threads(threads)


# Memory

MEMORY_PROBE = """
from fastrnn.bench import memory
from fastrnn.bench.shapes import Case
import torch
case = Case("x", T={steps}, B=8, I=64, H=64, cells=("RNN",))
if __name__ == "__main__":
    print(memory.peak(case, "RNN", torch.float32, "torch.nn", "auto", 1))
"""


@pytest.mark.skipif(memory.unavailable() is not None, reason=f"peak memory: {memory.unavailable()}")
def test_peak_memory_counts_the_activations(tmp_path):
    peaks = []
    for steps in (2000, 4000):
        script = tmp_path / f"probe{steps}.py"
        script.write_text(MEMORY_PROBE.format(steps=steps))
        run = subprocess.run(
            [sys.executable, script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(environment.__file__).parents[2])},
        )
        peaks.append(int(run.stdout))
    one_tensor = 2000 * 8 * 64 * 4  # of shape (T, B, H)
    assert 2 * one_tensor < peaks[1] - peaks[0] < 20 * one_tensor
