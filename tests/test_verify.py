"""`fastrnn verify`: right here, and wrong where an error is planted. And training by several processes."""

import itertools
import math
import sys

import pytest
import torch

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import Backend
from fastrnn.bench import ddp, truth, verify
from fastrnn.cells import CELLS
from fastrnn.cli import main

HEAD = verify.Row("cpu", "gru", "float32", "dense", "reference", 0, "")


def rows_of(lines, *words):
    """Those of a table whose columns begin with `words`."""
    return [line for line in lines if line.split()[: len(words)] == list(words)]


@pytest.fixture
def small(monkeypatch):
    """`fastrnn verify` of one cell in fp32 alone."""

    def install(cell="lstm"):
        monkeypatch.setattr(verify, "TYPES", {"float32": torch.float32})
        monkeypatch.setattr(verify, "CELLS", {cell: CELLS[cell]})

    return install


def test_this_machine_is_right(monkeypatch, capsys):
    """Two types of four: bash .ci/run prints the whole table."""
    types = ("float32", "bfloat16")
    monkeypatch.setattr(verify, "TYPES", {name: truth.TYPES[name] for name in types})
    assert main(["verify", "--threads", "1", "2"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert last.startswith("all ")
    for cell in CELLS:
        for dtype in types:
            for kind in truth.INPUTS:
                for backend in BACKENDS:
                    shown = rows_of(rows, "cpu", cell, dtype, kind, backend)
                    absent = any(r.startswith(f"cpu  {backend:10}not run") for r in rows)
                    assert len(shown) == (2 if backend == "cpu" else 1) or absent, (cell, kind, backend)
    assert any("lstm, projected" in r for r in rows)


def planted(monkeypatch, name, change):
    """The backend `name` with an error in what its `change` makes of a method's result."""
    method, spoil = change
    backend = BACKENDS[name]
    original = getattr(backend, method)
    monkeypatch.setattr(backend, method, lambda *args, **more: spoil(original(*args, **more)))


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (("forward", lambda r: r._replace(y=r.y * 1.0001)), "y"),
        (("forward", lambda r: r._replace(finals=(*r.finals[:-1], r.finals[-1] + 0.01))), "c_n"),
        (("forward", lambda r: r._replace(y=r.y.index_fill(0, torch.tensor([1]), float("nan")))), "y"),
    ],
)
def test_a_planted_error_is_named_and_the_exit_code_is_1(small, monkeypatch, capsys, change, tensor):
    small()
    planted(monkeypatch, "reference", change)
    assert main(["verify", "--backends", "reference", "native"]) == 1
    out = capsys.readouterr().out
    wrong = [line for line in out.splitlines() if "WRONG" in line]
    assert wrong
    assert all(" reference " in line for line in wrong)
    if tensor == "c_n":
        assert wrong[0].split()[-1] == "c_n"
    # Three inputs, plain and projected; native has no resets. What is wrong is told once more at the end.
    assert "6 of 10 out of tolerance" in out
    assert len(wrong) == 12
    assert out.splitlines()[-7:-1] == wrong[:6]


def without(name):
    """The reference backend that does not see `lengths` or `resets`."""
    reference = BACKENDS["reference"]
    return lambda call, *rest: type(reference).forward(reference, call._replace(**{name: None}), *rest)


def test_an_input_that_is_ignored_is_seen(small, monkeypatch, capsys):
    small("rnn_tanh")
    monkeypatch.setattr(BACKENDS["reference"], "forward", without("resets"))
    assert main(["verify", "--backends", "reference"]) == 1
    *rows, last = capsys.readouterr().out.splitlines()
    assert last.startswith("1 of 3 out of tolerance")
    wrong = {row for row in rows if "WRONG" in row or "FAILED" in row}
    assert wrong == set(rows_of(rows, "cpu", "rnn_tanh", "float32", "resets"))


def test_an_error_of_several_threads_is_seen(small, monkeypatch, capsys):
    small("gru")
    planted(monkeypatch, "cpu", ("forward", lambda r: r._replace(y=r.y * torch.get_num_threads())))
    assert main(["verify", "--backends", "cpu", "--threads", "1", "2"]) == 1
    *rows, last = capsys.readouterr().out.splitlines()
    assert last.startswith("3 of 6 out of tolerance")
    for kind in truth.INPUTS:
        by_threads = {row.split()[5]: "WRONG" in row for row in rows_of(rows, "cpu", "gru", "float32", kind)}
        assert by_threads == {"x1": False, "x2": True}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", truth.INPUTS[1:])
def test_the_truth_of_rows_that_are_cut_is_that_of_each_piece_alone(cell, kind):
    """Another way to it: fastrnn, on one piece after the other."""
    problem = truth.problems(cell, kind, 3, False)[0]
    alone, x, states, _ = truth.layer(problem, fastrnn, "float64", True)
    seen = truth.results(problem, torch.nn, "float64", "cpu", True)
    for b, n in enumerate(problem.lengths):
        cuts = [0, *(t for t in (problem.resets[b] if problem.resets else ()) if 0 < t < n), n]
        for begin, end in itertools.pairwise(cuts):
            hx = [a[:, b].clone() for a in states]
            for a in hx:
                if begin or (problem.resets and 0 in problem.resets[b]):
                    a[0::2] = 0
                if end < n:
                    a[1::2] = 0
            y, finals = alone(x[begin:end, b], truth.bundle(hx))
            torch.testing.assert_close(seen["y"][begin:end, b], y, msg=f"{cell}: y of row {b} from {begin} to {end}")
            h = finals[0] if isinstance(finals, tuple) else finals
            if end == n:
                torch.testing.assert_close(seen["h_n"][0::2, b], h[0::2], msg=f"{cell}: h_n of row {b}, forward")
            if begin == 0:
                torch.testing.assert_close(seen["h_n"][1::2, b], h[1::2], msg=f"{cell}: h_n of row {b}, the other way")
        assert not seen["y"][n:, b].any()


def test_a_backend_that_raises_is_a_row(small, monkeypatch, capsys):
    def broken(*args, **more):
        raise RuntimeError("planted")

    small("gru")
    monkeypatch.setattr(BACKENDS["reference"], "forward", broken)
    assert main(["verify", "--backends", "reference"]) == 1
    assert "FAILED  RuntimeError: planted" in capsys.readouterr().out


def test_where_nothing_runs_the_exit_code_is_1(monkeypatch, capsys):
    class Nowhere(Backend):
        name = "reference"

        def unsupported(self, query):
            return "it runs nowhere"

    monkeypatch.setitem(BACKENDS, "reference", Nowhere())
    assert main(["verify", "--backends", "reference"]) == 1
    out = capsys.readouterr().out
    assert "cpu  reference not run: everything: it runs nowhere" in out
    assert "nothing ran" in out


def test_a_limit_is_torchs_own_error_doubled_or_the_floor():
    assert verify.limit_of("float32", 1e-4) == 2e-4
    assert verify.limit_of("float32", 0.0) == verify.limit_of("float32", None) == 2e-6
    assert verify.limit_of("float64", 1.0) == 1e-10
    assert verify.limit_of("float32", math.inf) == verify.limit_of("float32", math.nan) == 2e-6


def test_nothing_is_excused_by_a_result_of_torch_that_is_not_finite():
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for bad in (math.nan, math.inf):
        own = {"y": torch.tensor([1.0, bad])}
        assert verify.compared(HEAD, "y", want.float() * 1.5, want, own).status == "WRONG"
        assert verify.compared(HEAD, "y", torch.tensor([1.0, bad]), want, own).status == "WRONG"
        assert verify.error(want, own["y"]) == math.inf


def test_a_wrong_tensor_is_not_hidden_by_nan():
    right = HEAD._replace(status="ok", worst="y", ours=math.nan, limit=1.0)
    wrong = right._replace(status="WRONG", worst="h_n", ours=2.0)
    worse = wrong._replace(worst="grad x", ours=math.nan)
    assert max((right, wrong), key=verify.severity).worst == max((wrong, right), key=verify.severity).worst == "h_n"
    for found in ((right, wrong, worse), (worse, wrong, right), (wrong, worse, right)):
        assert max(found, key=verify.severity).worst == "grad x"


def test_a_problem_that_cannot_run_does_not_hide_one_that_went_wrong(monkeypatch):
    planted(monkeypatch, "reference", ("forward", lambda r: r._replace(y=r.y * 1.01)))
    monkeypatch.setattr(verify, "unsupported", lambda problem, *_: "too wide" if problem.H > 40 else None)
    assert verify.check(HEAD, 0).status == "WRONG"


def test_every_cell_has_a_layer_and_problems_change_with_the_seed():
    assert truth.LAYERS.keys() == CELLS.keys()
    for kind in truth.INPUTS:
        found = truth.problems("gru", kind, 0, False)
        assert found != truth.problems("gru", kind, 1, False)
        assert {p.directions for p in found} == {1, 2}
        assert {(bool(p.lengths), bool(p.resets)) for p in found} == {(kind != "dense", kind == "resets")}


@pytest.mark.parametrize("seed", range(20))
def test_two_threads_share_all_problems_but_the_smallest(seed):
    """`plan` in csrc/cpu/plan.h gives a second thread 131072 multiply-adds at least; the RNN has the fewest."""
    for kind in truth.INPUTS:
        for p in truth.problems("rnn_tanh", kind, seed, False)[1:]:
            assert p.directions * p.T * p.B * (p.H * p.H + p.H * p.I) >= 2 * 131072, p


def test_imports_stay_light():
    import subprocess

    code = "import sys, fastrnn, fastrnn.cli; print([m for m in sys.modules if m.startswith('fastrnn.bench')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_alike_and_are_measured():
    two = ddp.measure(2, 1, width=8, rounds=2)
    assert (two["world"], two["rounds"], two["tokens"]) == (2, 2, 2 * ddp.T * ddp.B)
    parameters = sum(p.numel() for p in ddp.Model(torch.nn, 8, ddp.OUT).parameters())
    assert two["bytes"] == 4 * parameters
    assert all(two[side]["p50"] > 0 for side in ("baseline", "subject"))
    alone = {**two, "tokens": ddp.T * ddp.B, "subject": {"p50": two["subject"]["p50"] / 2}}
    text = ddp.line(two, alone)
    assert text.startswith("2 processes, 1 threads each")
    assert "efficiency 1.00" in text.splitlines()[1]
    assert "efficiency 0.50" in text.splitlines()[2]
