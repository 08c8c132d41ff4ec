"""The benchmark suite: both sides do the same, and nothing that is wrong is timed or published."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks import bandwidth, cpu, environment, memory, overhead, parity, report, shapes, subjects


class OtherLibrary(SimpleNamespace):
    """torch.nn under fastrnn's interface: `lengths=`, dtype, a backend context; optionally wrong by `error`."""

    def __init__(self, error=0.0):
        super().__init__(__name__="other")

        def layer(base):
            class Layer(base):
                def forward(self, x, hx=None, *, lengths=None):
                    if lengths is None:
                        y, states = super().forward(x, hx)
                    else:
                        y, states = super().forward(pack_padded_sequence(x, lengths, enforce_sorted=False))
                        y = pad_packed_sequence(y)[0]
                    return (y if not isinstance(y, torch.Tensor) else y * (1.0 + error)), states

            return Layer

        for cell in shapes.CELLS:
            setattr(self, cell, layer(getattr(nn, cell)))
        self.LSTMCell = nn.LSTMCell
        self.requested = []

    def backend(self, name):
        self.requested.append(name)
        self.chosen = name
        return contextlib.nullcontext()

    def explain(self, module, *arguments, **keywords):
        return SimpleNamespace(backend=SimpleNamespace(name=self.chosen))


TINY = [shapes.tiny(c) for c in shapes.CASES if c.name.startswith(("T1-B1-H128", "cell", "step", "packed", "lengths"))]
TINY.append(shapes.tiny(shapes.CASES[14]))
COMBINATIONS = [
    pytest.param(case, cell, mode, id=f"{case.name}-{cell}-{mode}")
    for case in TINY
    for cell in case.cells
    for mode in case.modes
]


def options(**changes):
    args = cpu.parse(["--threads", "1", "--budget", "0", "--rounds", "2", "--memory", "no"])
    return SimpleNamespace(**{**vars(args), **changes})


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
    monkeypatch.setattr(cpu, "compare", lambda *a, **k: pytest.fail("timed before the gate"))
    with pytest.raises(parity.Mismatch, match="y: differs"):
        cpu.measure(TINY[0], "GRU", "inference", 1, OtherLibrary(error=1e-3), options())


def test_a_wrong_result_ends_the_run_with_failure_and_without_its_number(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "import_module", lambda name: OtherLibrary(error=1e-3))
    monkeypatch.setattr(cpu, "matching", lambda filters: [TINY[0]])
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: True)
    assert cpu.main(["--threads", "1", "--budget", "0", "--memory", "no", "--cells", "GRU"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED timing GRU T1-B1-H128 inference, 1 threads: Mismatch: y: differs") == 2
    assert "0 of 0 measurements" in printed


# The runner


def test_a_run_measures_reports_and_saves(monkeypatch, capsys, tmp_path):
    library = OtherLibrary()
    monkeypatch.setattr(cpu, "import_module", lambda name: library)
    monkeypatch.setattr(cpu, "matching", lambda filters: [TINY[0], TINY[-1]])
    monkeypatch.setattr(cpu, "ROOT", tmp_path / "benchmarks")
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: True)
    before = torch.get_num_threads()
    argv = ["--threads", "1", "2", "--budget", "0", "--rounds", "2", "--memory", "no", "--save", "--backend", "cpu"]
    assert cpu.main(argv) == 0
    assert torch.get_num_threads() == before
    assert set(library.requested) == {"cpu"}
    (saved,) = tmp_path.glob("benchmarks/results/*/cpu-*.jsonl")
    records = environment.read(saved)
    assert [r["kind"] for r in records] == ["environment"] + ["measurement"] * 2 * 2 * 3 * 2
    assert {r["threads"] for r in records[1:]} == {1, 2}
    assert {r["chosen"] for r in records[1:]} == {"cpu"}
    assert all(r["rounds"] >= 2 and r["ratio"]["p20"] <= r["ratio"]["p50"] <= r["ratio"]["p80"] for r in records[1:])
    assert saved.with_suffix(".txt").read_text() == report.full(records)
    assert report.summarise(records) in capsys.readouterr().out


def test_small_benchmarks_give_a_line_of_positive_figures():
    for text, start, figures in (
        (bandwidth.line("GRU", 24, 0.01), "GRU     24      6 KiB", 3),
        (overhead.line("LSTMCell", 8, 0.01), "LSTMCell  H=8    |", 9),
    ):
        assert text.startswith(start)
        values = [float(v) for v in text.removeprefix(start).replace("|", " ").split()]
        assert len(values) == figures
        assert min(values) >= 0


def test_an_unknown_filter_is_refused(capsys):
    with pytest.raises(SystemExit):
        cpu.parse(["--cases", "no-such-case"])
    assert "no-such-case" in capsys.readouterr().err


def test_write_is_atomic_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "results" / "run.jsonl"
    environment.write(path, "old")
    store = environment.Store(path)
    store.add({"kind": "measurement", "value": 1.5})
    assert json.loads(path.read_text()) == {"kind": "measurement", "value": 1.5}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add({"kind": "measurement", "value": 2.5})
    assert json.loads(path.read_text()) == {"kind": "measurement", "value": 1.5}


def test_hardware_is_named_by_model_vectors_and_cores():
    facts = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "flags": ["avx2", "fma", "avx512f"], "cores": 4}
    assert environment.slug(facts) == "intel-xeon-cpu-2-20ghz-avx512-4-cores"


# Memory

MEMORY_PROBE = """
from benchmarks import memory
from benchmarks.shapes import Case
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
            env={**os.environ, "PYTHONPATH": str(Path(environment.__file__).parents[1])},
        )
        peaks.append(int(run.stdout))
    one_tensor = 2000 * 8 * 64 * 4  # of shape (T, B, H)
    assert 2 * one_tensor < peaks[1] - peaks[0] < 20 * one_tensor
