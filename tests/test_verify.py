"""`fastrnn verify`: right here, and wrong where an error is planted. And training by several processes."""

import math
import sys

import pytest
import torch

from fastrnn.backends import BACKENDS
from fastrnn.backends.base import Backend
from fastrnn.bench import ddp, verify
from fastrnn.cells import CELLS
from fastrnn.cli import main


def test_this_machine_is_right(capsys):
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    *rows, last = out.splitlines()
    assert last.startswith("all ")
    for cell in CELLS:
        for dtype in ("float64", "float32", "float16", "bfloat16"):
            for backend in BACKENDS:
                shown = [r for r in rows if r.split()[:4] == ["cpu", cell, dtype, backend]]
                assert len(shown) == 1 or any(r.startswith(f"cpu  {backend:10}not run") for r in rows), (cell, backend)
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
def test_a_planted_error_is_named_and_the_exit_code_is_1(monkeypatch, capsys, change, tensor):
    monkeypatch.setattr(verify, "TYPES", {"float32": torch.float32})
    monkeypatch.setattr(verify, "CELLS", {"lstm": CELLS["lstm"]})
    planted(monkeypatch, "reference", change)
    assert main(["verify", "--backends", "reference", "native"]) == 1
    out = capsys.readouterr().out
    wrong = [line for line in out.splitlines() if "WRONG" in line]
    assert wrong
    assert all(" reference " in line for line in wrong)
    if tensor == "c_n":
        assert wrong[0].split()[-1] == "c_n"
    assert "2 of 4 out of tolerance" in out


def test_a_backend_that_raises_is_a_row(monkeypatch, capsys):
    def broken(*args, **more):
        raise RuntimeError("planted")

    monkeypatch.setattr(verify, "TYPES", {"float32": torch.float32})
    monkeypatch.setattr(verify, "CELLS", {"gru": CELLS["gru"]})
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
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for bad in (math.nan, math.inf):
        own = {"y": torch.tensor([1.0, bad])}
        assert verify._row("cpu", "gru", "float32", "cpu", "y", truth.float() * 1.5, truth, own).status == "WRONG"
        assert verify._row("cpu", "gru", "float32", "cpu", "y", torch.tensor([1.0, bad]), truth, own).status == "WRONG"
        assert verify.error(truth, own["y"]) == math.inf


def test_a_wrong_tensor_is_not_hidden_by_nan():
    right = verify.Row("cpu", "gru", "float32", "cpu", "ok", "y", math.nan, None, 1.0)
    wrong = right._replace(status="WRONG", worst="h_n", ours=2.0)
    worse = wrong._replace(worst="grad x", ours=math.nan)
    assert max((right, wrong), key=verify.severity).worst == max((wrong, right), key=verify.severity).worst == "h_n"
    for found in ((right, wrong, worse), (worse, wrong, right), (wrong, worse, right)):
        assert max(found, key=verify.severity).worst == "grad x"


def test_a_problem_that_cannot_run_does_not_hide_one_that_went_wrong(monkeypatch):
    planted(monkeypatch, "reference", ("forward", lambda r: r._replace(y=r.y * 1.01)))
    monkeypatch.setattr(verify, "unsupported", lambda problem, *_: "no lengths" if problem.lengths else None)
    assert verify.check("cpu", "gru", "float32", "reference", 0).status == "WRONG"


def test_every_cell_has_a_layer_and_problems_change_with_the_seed():
    assert verify.LAYERS.keys() == CELLS.keys()
    assert verify.problems("gru", 0, False) != verify.problems("gru", 1, False)
    assert [bool(p.lengths) for p in verify.problems("gru", 0, False)] == [False, True, False]


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
