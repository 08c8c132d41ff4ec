"""The C++ of docs/adding-a-cell.md, whose cell has per-unit parameters, in the CUDA kernels on the emulator."""

from __future__ import annotations

import importlib.util

import emulator_build
import pytest
import torch
from emulator_support import Emulated, emulated, needs_emulator
from engine_support import Case
from new_cell_support import NAME, page, sources
from test_emulator_grid import K2
from test_emulator_kernels import BOTH, REVERSE, assert_parity, make, run, same_bits

from fastrnn import backends

__all__ = ["emulated", "page"]
pytestmark = [needs_emulator, pytest.mark.slow, pytest.mark.usefixtures("poisoned")]
# What knows the list of cells, and the new cell's own kernels, of two number types.
CHANGED = ["gpu.cpp", "plan.cpp", "launch.cpp"]
CHANGED += [f"{way}_LstmPeephole_{number}.cpp" for way in ("forward", "backward") for number in ("Bf16", "Fp32")]
CASES = {
    "odd": Case(NAME),
    "lengths and resets": Case(NAME, T=6, B=11, I=3, H=33, reverse=BOTH, lengths=True, resets=True),
    "reverse, no bias": Case(NAME, T=3, B=17, I=3, H=40, reverse=REVERSE, bias=False, lengths=True),
}
# What the plan is asked for, and the (blocks, variant) of both directions
WAYS = {
    "K1": ({"kernel": 1}, {}),
    "K1 in clusters": ({}, {False: (2, 2), True: (2, 4)}),
    "K2": (K2, {}),
    "K2, tiles one after another": ({**K2, "groups": 1, "warps": 1}, {}),
}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The emulator compiled with the page's files."""
    folder = tmp_path_factory.mktemp("new-cell")
    emulator_build.sources(folder)
    for path, text in sources().items():
        (folder / path).write_text(text)
    emulator_build.replace(folder / "csrc" / "cuda" / "find.cuh", "DO(C, Fp16) DO(C, Tf32) ", "")
    # In a package of its own: pybind11 knows the other emulator by its name.
    spec = importlib.util.spec_from_file_location("new_cell._emulator", emulator_build.build(folder, CHANGED))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert NAME in module.cells
    return module


@pytest.fixture
def prepare(module, emulated, page, monkeypatch):
    """A function that returns the backend set up for a number type and one of WAYS."""

    def of(number, way):
        emulated(number)
        backend = Emulated(module)
        backend.asked, backend.forced = WAYS[way]
        monkeypatch.setitem(backends.BACKENDS, "cuda", backend)
        backends.clear_choices()
        return backend

    yield of
    module.schedule()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", ["bf16", "fp32"])
def test_parity(prepare, number, way, case):
    """Outputs, states and every gradient, those of the parameters included, against the reference in fp64."""
    found = assert_parity(prepare(number, way), make(CASES[case], number), number)
    assert all(found[f"gradient of parameter {k} of stream 0"].any() for k in range(3))


@pytest.mark.parametrize("way", WAYS)
def test_no_schedule_changes_a_bit(module, prepare, way):
    backend = prepare("bf16", way)
    call = make(Case(NAME, T=5, B=11, I=3, H=40, lengths=True, resets=True), "bf16")
    runs = []
    for seed in range(4):
        module.schedule(seed=seed)
        runs.append(run(backend, call))
    assert all(same_bits(runs[0], r) for r in runs)


@pytest.mark.parametrize("way", WAYS)
def test_no_races(module, prepare, way):
    if not module.detects_races:
        pytest.skip("no detector of races in this build")
    backend = prepare("fp32", way)
    call = make(Case(NAME, T=3, B=9, I=3, H=40, lengths=True, resets=True), "fp32")
    for seed in range(2):
        module.schedule(seed=seed, races=True)
        assert_parity(backend, call, "fp32")


def test_a_module_by_name(prepare, page):
    """Two layers and directions, trained: as on the reference."""
    backend = prepare("fp32", "K1")
    modules = []
    for name in ("cuda", "reference"):
        torch.manual_seed(0)
        modules.append(page["PeepholeLSTM"](5, 19, num_layers=2, bidirectional=True, backend=name))
        for p in modules[-1].peepholes:
            torch.nn.init.normal_(p)
    x = torch.randn(4, 3, 5)
    assert "K1" in backend.how(backends.Query(NAME, "cpu", torch.float32, 4, 3, 5, 19, 19, 2))
    for m in modules:
        m(x)[0].square().sum().backward()
    for (name, p), q in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_without_its_parameters_a_launch_is_refused(module):
    code = module.cells.index(NAME)
    plan = module.plan(code, 0, False, 1, 5, 24, module.limits(0), kernel=1)
    with pytest.raises(ValueError, match="the values of the cell's units are missing"):
        module.forward(plan, code, 0, [1, 5, 24, 1, 0, 24], [0] * 16, 0, 4)
