"""The benchmark suite: that it times what it says, and publishes nothing that is wrong."""

import contextlib
import itertools
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

from benchmarks import cpu, environment, measure, memory, parity, report, shapes, subjects, targets


class FakeClock:
    """A clock that advances only when a call says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def task(self, name, *durations):
        """A call that takes each of `durations` in turn, over and over."""
        turns = itertools.cycle(durations)

        def call():
            self.log.append(name)
            self.now += next(turns)

        return call


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


# The timing core


def test_ratio_is_that_of_the_durations():
    clock = FakeClock()
    result = measure.compare(clock.task("a", 3.0), clock.task("b", 1.5), budget=100.0, clock=clock)
    assert result["ratio"] == pytest.approx({"p20": 2.0, "p50": 2.0, "p80": 2.0})
    assert (result["baseline"]["p50"], result["subject"]["p50"]) == (3.0, 1.5)


def test_samples_are_interleaved_after_a_warm_up():
    clock = FakeClock()
    measure.interleave([clock.task("a", 1.0), clock.task("b", 1.0)], 0.0, min_rounds=3, clock=clock)
    assert "".join(clock.log) == "ab" + "ababab"


def test_a_drift_of_the_machine_leaves_the_ratio():
    clock = FakeClock()
    slower = [1.0 + 0.1 * i for i in range(40)]
    a = clock.task("a", *(2 * s for s in slower))
    b = clock.task("b", *slower)
    result = measure.compare(a, b, budget=0.0, min_rounds=20, clock=clock)
    assert result["baseline"]["p80"] > 1.5 * result["baseline"]["p20"]
    assert result["ratio"] == pytest.approx({"p20": 2.0, "p50": 2.0, "p80": 2.0})


def test_short_calls_are_repeated_and_counted_once_each():
    clock = FakeClock()
    (samples,) = measure.interleave([clock.task("a", 1e-5)], budget=0.01, sample_seconds=1e-3, clock=clock)
    assert samples == pytest.approx([1e-5] * len(samples))
    assert 10 <= len(samples) <= 11


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 5), (100.0, 50), (101.0, 51)])
def test_rounds_fill_the_budget_and_are_never_too_few(budget, rounds):
    clock = FakeClock()
    times = measure.interleave([clock.task("a", 1.0), clock.task("b", 1.0)], budget, min_rounds=5, clock=clock)
    assert [len(t) for t in times] == [rounds, rounds]


def test_quantiles_and_geometric_mean():
    assert measure.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}
    assert measure.quantile([7.0], 0.8) == 7.0
    assert measure.geomean([0.5, 8.0]) == pytest.approx(2.0)


def test_gemm_rate_is_within_reason():
    assert 1e8 < measure.gemm_rate(torch.float32, size=64, repeats=3) < 1e14


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


# Targets and tables


def record(case, cell, mode, ratio, threads=1):
    times = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    key = {"kind": "measurement", "case": case, "cell": cell, "mode": mode, "threads": threads}
    ratios = {"p20": ratio, "p50": ratio, "p80": ratio}
    return {
        **key,
        "rounds": 5,
        "baseline": times,
        "subject": times,
        "ratio": ratios,
        "gemm": None,
        "chosen": "cpu",
        "flops": 1.0,
    }


def target(text):
    (found,) = [t for t in targets.TARGETS if t.text == text]
    return found


def test_each_takes_the_least_and_names_it():
    each = target("GRU T=100 B=1 training, each")
    records = [record(f"T100-B1-H{H}", "GRU", "training", r) for H, r in ((128, 5.0), (256, 3.9), (512, 9.0))]
    verdict = targets.judge(each, records, 1)
    assert (verdict.value, verdict.status, verdict.where) == (3.9, "MISSED", "T100-B1-H256 GRU training")
    records[1]["ratio"]["p50"] = 4.0
    assert targets.judge(each, records, 1).status == "met"
    assert targets.judge(each, records[:2], 1).status == "met so far on 2 of 3"
    assert targets.judge(each, records, 2).status == "not measured"


def test_mean_target_and_noise():
    mean = target("GRU B>=16 inference, geometric mean")
    names = [case for case, _, _ in mean.group()]
    assert len(names) == 8
    ratios = [1.0, 4.0] * 4
    records = [record(name, "GRU", "inference", r) for name, r in zip(names, ratios, strict=True)]
    assert targets.judge(mean, records, 1).value == pytest.approx(2.0)
    every = target("every cell, shape and mode")
    assert targets.judge(every, [record("T1-B1-H128", "RNN", "training", 0.96)], 1).status.startswith(
        "met within noise"
    )
    assert targets.judge(every, [record("T1-B1-H128", "RNN", "training", 0.94)], 1).status.startswith("MISSED")


@pytest.mark.parametrize("goal", targets.TARGETS, ids=lambda t: t.text)
def test_every_target_is_about_cases_that_exist(goal):
    assert goal.group()


def test_report_lists_every_loss_and_marks_noise():
    noisy = record("T1-B1-H128", "GRU", "training", 0.9, threads=2)
    noisy["ratio"] = {"p20": 0.5, "p50": 0.9, "p80": 1.2}
    records = [record("T1-B1-H128", "LSTM", "inference", 4.2), noisy]
    assert report.time_line(noisy).endswith(" ~<")
    assert "0.90  GRU T1-B1-H128 training, 2 threads" in report.losing_list(records)
    assert "1 of 2 measurements" in report.losing_list(records)
    assert "4.20  met" in report.target_table(records)


@pytest.mark.parametrize(("subject", "verdict"), [(90, "met"), (100.9, "met"), (120, "MISSED")])
def test_memory_may_not_grow(subject, verdict):
    key = {"kind": "memory", "case": "T1-B1-H128", "cell": "GRU", "mode": "training", "threads": 1}
    records = [{**key, "baseline": 100 << 20, "subject": int(subject * 2**20)}]
    assert f"  {verdict}  (most: T1-B1-H128 GRU)" in report.target_table(records)


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


def test_markdown_has_inference_and_training_side_by_side():
    records = [record("T1-B1-H128", "LSTM", mode, r) for mode, r in (("inference", 2.5), ("training", 1.25))]
    lines = report.markdown(records).splitlines()
    assert lines[0].split(" | ")[1] == "LSTM, 1 thread"
    assert lines[2].split(" | ") == ["| T1-B1-H128", "2.50 / 1.25", "- / -", "- / - |"]
