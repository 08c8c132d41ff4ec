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
from test_bench_model import write
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks import bandwidth, overhead
from fastrnn.bench import (
    commands,
    environment,
    measuring,
    memory,
    page,
    parity,
    records,
    report,
    roofline,
    run,
    shapes,
    subjects,
)
from fastrnn.bench.grids import Job
from fastrnn.cli.parser import UsageError


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
STEP = shapes.Case("T1-B1-H128", 1, 1, 5, 7)
COMBINATIONS = [
    pytest.param(case, cell, mode, id=f"{case.name}-{cell}-{mode}")
    for case in TINY
    for cell in case.cells
    for mode in case.modes
]


def job(case, cell="GRU", mode="inference", what="timing"):
    return Job(what, case, cell, mode, "float32", "cpu", 1)


def options(library, **changes):
    return measuring.Options(**{"library": library, "sample": 0.0, "rounds": 2, **changes})


@pytest.fixture
def stand_in(monkeypatch):
    """`fastrnn bench` with a library in the place of fastrnn, and two tiny cases for a grid."""

    def install(error=0.0, cases=(TINY[0], TINY[-1])):
        library = OtherLibrary(error)
        monkeypatch.setattr(run, "import_module", lambda name: library)
        monkeypatch.setattr(run, "cases", lambda grid, *sizes: tuple(cases))
        monkeypatch.setattr(roofline, "cpu", lambda dtype: roofline.Machine(1e12, lambda size: 1e12, 1e12))
        monkeypatch.setattr(page, "write_all", lambda *_: [])
        return library

    return install


QUICK = ["--threads", "1", "--sample", "0", "--rounds", "2", "--peers", "none", "--budget", "0"]


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

    monkeypatch.setattr(measuring, "interleave", compare)
    for what in ("timing", "latency"):
        with pytest.raises(parity.Mismatch, match="y: differs"):
            measuring.MEASURE[what](job(TINY[0]), options(OtherLibrary(error=1e-3), compare=compare))


def test_a_wrong_result_ends_the_run_with_failure_and_without_its_number(stand_in, capsys):
    stand_in(error=1e-3, cases=[TINY[0]])
    argv = [*QUICK, "--cells", "GRU", "--parts", "timing", "--modes", "inference", "training"]
    assert commands.bench(argv) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED timing GRU T1-B1-H128 inference, 1 threads: Mismatch: y: differs") == 2
    assert "0 of 0 measurements" in printed


# The runner


def test_a_run_measures_reports_and_saves(stand_in, capsys, tmp_path):
    library = stand_in()
    before = torch.get_num_threads()
    argv = ["--threads", "1", "2", "--sample", "0", "--rounds", "2", "--parts", "timing", "--save", "--backend", "cpu"]
    argv += ["--cells", "GRU"]
    assert commands.bench([*argv, "--out", str(tmp_path), "--budget", "0", "--peers", "none"]) == 0
    assert torch.get_num_threads() == before
    assert set(library.requested) == {"cpu"}
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    records = environment.read(saved)
    assert [r["kind"] for r in records] == ["environment"] + ["measurement"] * 2 * 2 * 3
    assert records[0]["command"].startswith("fastrnn bench --threads 1 2")
    assert {r["threads"] for r in records[1:]} == {1, 2}
    assert {r["mode"] for r in records[1:]} == {"inference", "forward", "training"}
    assert {r["chosen"] for r in records[1:]} == {"cpu"}
    assert all(r["rounds"] >= 2 and r["ratio"]["p20"] <= r["ratio"]["p50"] <= r["ratio"]["p80"] for r in records[1:])
    assert all(0 < r["bound"]["share"]["subject"] < 1 for r in records[1:])
    assert saved.with_suffix(".txt").read_text() == report.full(records)
    assert report.summarise(records) in capsys.readouterr().out


def test_what_a_file_holds_is_not_measured_again(stand_in, tmp_path, capsys):
    stand_in(cases=[STEP])
    argv = [*QUICK, "--parts", "timing", "latency", "--cells", "GRU"]
    assert commands.bench([*argv, "--modes", "inference", "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    before = environment.read(saved)
    assert [r["kind"] for r in before] == ["environment", "measurement", "latency"]
    assert commands.bench([*argv, "--resume", str(saved)]) == 0
    assert "2 of 4 are in the file already" in capsys.readouterr().out
    after = environment.read(saved)
    assert after[:3] == before
    assert [(r["kind"], r.get("mode")) for r in after[3:]] == [
        ("environment", None),
        ("measurement", "training"),
        ("measurement", "forward"),
    ]


def test_a_file_of_other_hardware_is_not_continued(stand_in, tmp_path):
    stand_in(cases=[TINY[0]])
    path = write(tmp_path / "other.jsonl", [])
    with pytest.raises(UsageError, match="made on hardware abacus-1-cores, this is "):
        commands.bench([*QUICK, "--resume", path])


SAVED = [*QUICK, "--parts", "timing", "--cells", "GRU", "--modes", "inference"]


def change(path, kind, **changes):
    """Rewrite all records of a kind in a file."""
    records = [{**r, **changes} if r["kind"] == kind else r for r in environment.read(path)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize("name", records.SETUP)
def test_a_run_is_continued_only_with_what_it_was_made_with(stand_in, tmp_path, name):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    change(saved, "environment", **{name: "planted"})
    before = saved.read_text()
    with pytest.raises(UsageError, match=f"--resume .*: made on {name} planted, this is "):
        commands.bench([*SAVED, "--resume", str(saved)])
    assert saved.read_text() == before


def test_a_case_without_what_is_asked_for_now_is_measured_anew(stand_in, tmp_path, capsys):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    peer = "torch.nn graph"  # of GPUs: absent here, and the record says so
    again = [*SAVED[: SAVED.index("--peers")], "--peers", peer, *SAVED[SAVED.index("--peers") + 2 :]]
    for argv, measured in (([*again, "--kernels"], True), ([*again, "--kernels"], False), (SAVED, False)):
        before = environment.read(saved)[1:]
        assert commands.bench([*argv, "--resume", str(saved)]) == 0
        (kept,) = (r for r in environment.read(saved) if r["kind"] == "measurement")
        assert kept["peers"].keys() == {peer}
        assert kept["kernels"]
        assert (kept not in before) == measured
        assert ("1 of 1 are in the file already" in capsys.readouterr().out) != measured


def test_a_wrong_result_replaces_the_number_it_had(stand_in, tmp_path):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    stand_in(error=1e-3, cases=[STEP])
    assert commands.bench([*SAVED, "--kernels", "--resume", str(saved)]) == 1
    assert [r["kind"] for r in environment.read(saved) if r["kind"] != "environment"] == ["failure"]


def test_a_continued_run_forgets_that_its_budget_was_spent(stand_in, tmp_path):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    notes = [{"kind": "note", "message": f"{run.BUDGET} 5 s spent"}, {"kind": "note", "message": "planted"}]
    saved.write_text(saved.read_text() + "".join(json.dumps(n) + "\n" for n in notes))
    assert commands.bench([*SAVED, "--resume", str(saved)]) == 0
    assert [r["message"] for r in environment.read(saved) if r["kind"] == "note"] == ["planted"]


def test_a_run_that_measures_nothing_is_no_success(stand_in, monkeypatch, capsys):
    stand_in(cases=[STEP])
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    assert commands.bench([*SAVED, "--budget", "5"]) == 1
    assert "0 of 1 measured" in capsys.readouterr().out


def test_a_spent_budget_leaves_what_there_is(stand_in, capsys, tmp_path, monkeypatch):
    stand_in()
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    argv = [*QUICK[:-2], "--budget", "25", "--parts", "timing", "--save", "--out", str(tmp_path)]
    assert commands.bench(argv) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    kinds = [r["kind"] for r in environment.read(saved)]
    assert kinds == ["environment", "measurement", "measurement", "note"]
    assert "budget of 25 s spent: 2 of 18 measured" in capsys.readouterr().out


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


def test_kernels_are_named(stand_in):
    record = measuring.timing(job(TINY[0], "LSTM"), options(OtherLibrary(), kernels=True))
    assert any("lstm" in name for name in record["kernels"]["torch.nn"])


def test_small_benchmarks_give_a_line_of_positive_figures():
    for text, start, figures in (
        (bandwidth.line("GRU", 24, 0.01), "GRU     24      6 KiB", 3),
        (overhead.line("LSTMCell", 8, 0.01), "LSTMCell  H=8    |", 9),
    ):
        assert text.startswith(start)
        values = [float(v) for v in text.removeprefix(start).replace("|", " ").split()]
        assert len(values) == figures
        assert min(values) >= 0


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
