"""The C++ of docs/adding-a-cell.md, put where it says and compiled: the engine with it against fp64 and autograd."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_support import CPU, Case, assert_parity, assert_same_bits, make_call, run
from new_cell_support import NAME, page, peephole, sources
from support import B, H, I, T, assert_equal, leaves
from test_cells import FUNCTIONS
from test_new_cell import check_op, per_sample

import fastrnn
from fastrnn.backends import cpu
from fastrnn.cells import CELLS

pytestmark = [
    pytest.mark.slow,  # half a minute of compiling C++
    pytest.mark.skipif(importlib.util.find_spec("cmake") is None, reason="needs cmake, ninja and pybind11 to compile"),
]
__all__ = ["page"]
ROOT = Path(__file__).parent.parent
BOTH = (False, True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "few rows": Case(NAME, T=3, B=2),
    "packed weights": Case(NAME, T=6, B=5, reverse=BOTH),
    "no bias": Case(NAME, bias=False, reverse=(True,)),
    "resets": Case(NAME, resets=True, reverse=BOTH),
    "ragged": Case(NAME, T=6, B=7, reverse=BOTH, lengths=True, resets=True),
    "single step": Case(NAME, T=1, B=3, single=True),
    "many rows": Case(NAME, T=23, B=14, H=37, reverse=BOTH),
    "even sizes": Case(NAME, T=5, B=14, I=12, H=34),  # pairs of bfloat16, where the processor multiplies those
}
# Of work enough for two threads, which share the batch rows or the units.
THREADED = {
    "rows": Case(NAME, T=9, B=13, I=33, H=47),
    "units": Case(NAME, T=9, B=5, I=33, H=67),
    "ragged rows": Case(NAME, T=12, B=17, I=33, H=47, lengths=True, resets=True),
    "streams": Case(NAME, T=9, B=7, I=33, H=47, reverse=BOTH),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A copy of the sources with the page's files, compiled for the compiler's own instruction set alone."""
    import cmake
    import ninja
    import pybind11

    tree = tmp_path_factory.mktemp("fastrnn")
    for name in ("csrc", "cmake"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    files = sources()
    assert set(files) == {"csrc/cells/lstm_peephole.h", "csrc/cells/list.h"}
    for path, text in files.items():
        (tree / path).write_text(text)
    command = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    options = {
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FASTRNN_BASELINE_ONLY": "ON",
        "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",  # a third of the time: the calls are small
    }
    build = tree / "build"
    jobs = os.environ.get("OMP_NUM_THREADS", "2")
    for arguments in (
        [command, "-S", tree, "-B", build, "-G", "Ninja", *[f"-D{k}={v}" for k, v in options.items()]],
        [command, "--build", build, "--target", "_cpu", "-j", jobs],
    ):
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (path,) = build.glob("_cpu.*.so")
    # Another name: pybind11 makes one module of a name.
    spec = importlib.util.spec_from_file_location("with_page._cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine(compiled, page, monkeypatch):
    """The backend "cpu" runs on the engine that was compiled here."""
    monkeypatch.setattr(cpu, "load", lambda: (compiled, ""))
    monkeypatch.setattr(cpu, "CODES", {name: code for code, name in enumerate(compiled.cells())})
    return compiled


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_engine_has_the_cells_of_the_list(engine):
    assert engine.cells() == list(CELLS)


def test_both_texts_agree(engine):
    cell = CELLS[NAME]
    for _ in range(50):
        draw = lambda n: [torch.randn((), dtype=torch.float64) * 2 for _ in range(n)]  # noqa: E731
        x, r, s, p, ds = draw(cell.gates), draw(cell.gates), draw(cell.states), draw(cell.params), draw(cell.states)
        s1, tape = cell.step(x, r, s, p, *FUNCTIONS)
        dx, _, ds0, dp = cell.step_backward(tape, s, s1, p, ds, *FUNCTIONS)
        got = engine.step(
            NAME, [float(a + b) for a, b in zip(x, r, strict=True)], *([*map(float, v)] for v in (s, p, ds))
        )
        for name, g, w in zip(("s1", "tape", "ds", "da", "dp"), got, (s1, tape, ds0, dx, dp), strict=True):
            assert_equal(name, torch.tensor(g, dtype=torch.float64), torch.stack(tuple(w)), 1e-12)


@pytest.mark.usefixtures("engine", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_references(name, dtype, threads):
    assert_parity(CASES[name], dtype)


@pytest.mark.usefixtures("engine", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", THREADED)
def test_threads_change_no_bit_of_the_parameters_gradients(name, dtype):
    call = make_call(THREADED[name], dtype)
    before, found = torch.get_num_threads(), []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        found.append({k: a for k, a in run(call).items() if "parameter" in k or "output" in k})
    torch.set_num_threads(before)
    assert any("parameter" in k for k in found[0])
    for other in found[1:]:
        assert_same_bits(name, other, found[0])
    assert_parity(THREADED[name], dtype)


@pytest.mark.usefixtures("engine")
def test_states_saved_alone_give_the_same_gradients():
    call = make_call(CASES["ragged"])
    want, got = run(call), run(call, save="states")
    for name, w in want.items():
        assert_equal(name, got[name], w)


@pytest.mark.usefixtures("engine", "poisoned")
def test_the_module_chooses_the_engine(page, threads):
    module = peephole(page, I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    given = {"lengths": torch.tensor([T, 2, 0, 5, 1]), "resets": torch.rand(T, B) < 0.3}
    assert fastrnn.explain(module, x).backend is CPU
    names, found = ("y", "h", "c", "x", *dict(module.named_parameters())), []
    for backend in ("auto", "reference"):
        with fastrnn.backend(backend):
            outs = leaves(module(x, **given))
        grads = torch.autograd.grad([o.square().sum() for o in outs], (x, *module.parameters()))
        found.append([*outs, *grads])
    for name, a, b in zip(names, *found, strict=True):
        assert_equal(name, a, b)


@pytest.mark.usefixtures("engine")
def test_autograd_through_the_engine(page):
    module = peephole(page, 2, 3)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    p = module.peepholes[0].detach().requires_grad_()

    def f(a, own):
        return torch.func.functional_call(module, {"peepholes.0": own}, (a,))[0]

    assert torch.autograd.gradcheck(f, (x, p))
    assert torch.autograd.gradgradcheck(f, (x, p))


@pytest.mark.usefixtures("engine")
def test_autocast(page):
    module, x = peephole(page, I, H, dtype=torch.float32), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastrnn.explain(module, x).backend is CPU
        y = module(x)[0]
    want = torch.autograd.grad(module(x)[0].sum(), module.peepholes[0])[0]
    (got,) = torch.autograd.grad(y.float().sum(), module.peepholes[0])
    assert_equal("peepholes", got, want, 6e-2)


@pytest.mark.usefixtures("engine")
def test_the_op(page):
    check_op("cpu")
    torch._dynamo.reset()
    module, x = peephole(page, I, H), torch.randn(T, B, I, dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(x)[0].square().sum(), list(module.parameters())) for f in (compiled, module))
    for (name, _), a, b in zip(module.named_parameters(), got, want, strict=True):
        assert_equal(name, a, b)


@pytest.mark.usefixtures("engine")
def test_gradients_of_each_sample(page):
    got, want = per_sample(peephole(page, I, H), torch.randn(T, 3, I, dtype=torch.float64))
    for name, w in want.items():
        assert_equal(name, got[name], w)


def test_malformed_calls_are_refused(engine):
    zeros = [0] * 6
    head = [1, 1, 1, 1, 1, 1, engine.cells().index(NAME), 0, *zeros[:5]]
    stream = [1, 1, 1, 1, 0, 0]
    for params in ([], [1, 1], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match="malformed"):
            engine.forward(head, stream, params, *zeros)
    with pytest.raises(ValueError, match="malformed"):
        engine.backward(head, stream, [1] * 3, *[1] * 13, [0] * 5, [1] * 2)
    with pytest.raises(ValueError, match="wrong sizes"):
        engine.step(NAME, [0.0] * 4, [0.0] * 2, [0.0] * 2, [0.0] * 2)
