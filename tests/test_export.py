"""torch.export: T and B stay symbolic, where torch.nn's layers take those of the example for constants."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from export_support import ALL, CELLS, SIZES, Model, cell_dims, cell_inputs
from support import KINDS, B, H, I, T, assert_equal, leaves
from torch import nn
from torch.export import Dim

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch's own use

LAYOUTS = {
    "plain": ({}, ()),
    "two layers, both directions": ({"num_layers": 2, "bidirectional": True}, ("hx",)),
    "batch_first": ({"batch_first": True, "bias": False}, ("lengths",)),
    "resets": ({"batch_first": True, "bidirectional": True}, ("resets",)),
    "everything": ({"num_layers": 2, "bidirectional": True, "trail": True}, ALL),
}


def exported(model, given, strict=False):
    return torch.export.export(model, model.inputs(T, B, given), dynamic_shapes=model.dims(given), strict=strict)


def check(program, model, given, sizes=SIZES):
    run = program.module()
    for steps, batch in sizes:
        args = model.inputs(steps, batch, given)
        for k, (got, want) in enumerate(zip(leaves(run(*args)), leaves(model(*args)), strict=True)):
            assert_equal(f"output {k} at T={steps}, B={batch}", got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_at_any_length_and_batch_size(kind, layout):
    options, given = LAYOUTS[layout]
    model = Model(kind, **options)
    check(exported(model, given), model, given)


@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
def test_strict_export(kind):
    model = Model(kind, bidirectional=True, trail=True)
    check(exported(model, ALL, strict=True), model, ALL)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_named_dimensions_are_in_the_program(strict):
    model = Model("gru")
    shapes = model.dims(("lengths",), Dim("T", min=1), Dim("B", min=1))
    program = torch.export.export(model, model.inputs(T, B, ("lengths",)), dynamic_shapes=shapes, strict=strict)
    assert len(program.range_constraints) == 2
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fastrnn.forward.default") == 1  # whole: no step of it was unrolled
    check(program, model, ("lengths",))


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, given):
    cell = getattr(fastrnn, name)(I, H)
    program = torch.export.export(cell, cell_inputs(name, B, given), dynamic_shapes=cell_dims(name, given))
    for _, batch in SIZES:
        args = cell_inputs(name, batch, given)
        for got, want in zip(leaves(program.module()(*args)), leaves(cell(*args)), strict=True):
            assert_equal(f"{name} at B={batch}", got, want)


def test_nothing_to_run():
    model = Model("lstm", bidirectional=True)
    check(exported(model, ("hx",)), model, ("hx",), [(0, B), (T, 0), (0, 0)])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind):
    model, file = Model(kind), io.BytesIO()
    torch.export.save(exported(model, ALL), file)
    file.seek(0)
    check(torch.export.load(file), model, ALL)


def test_decompositions_leave_the_op_whole():
    model = Model("lstm", num_layers=2)
    program = exported(model, ALL).run_decompositions()
    assert [str(n.target) for n in program.graph.nodes].count("fastrnn.forward.default") == 2
    check(program, model, ALL)


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "under no_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_after_export(kind, grad):
    """Also a program exported where no gradient was wanted, which says that nothing is to be saved for one."""
    model = Model(kind, bidirectional=True)
    with torch.set_grad_enabled(grad):
        program = copy.deepcopy(exported(model, ("hx", "lengths")).module())
    args = model.inputs(9, 4, ("hx", "lengths"))
    for run in (program, model):
        sum(a.square().sum() for a in leaves(run(*args))).backward()
    for name, p in program.named_parameters():
        assert_equal(f"gradient of {name}", p.grad, model.get_parameter(name).grad, 5e-5)


def test_errors_are_raised_by_the_program_too():
    model = Model("lstm")
    run = exported(model, ("lengths",)).module()
    x = torch.randn(4, 2, I)
    with pytest.raises(ValueError, match="lengths: expected values from 0 to 4, got values from 1 to 5"):
        run(x, None, torch.tensor([5, 1]), None)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.slow  # half a minute of compiling C++
def test_compiled_ahead_of_time(tmp_path):
    model = Model("lstm", num_layers=2).eval()
    with torch.no_grad():
        program = exported(model, ("lengths",))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for steps, batch in SIZES:
            args = model.inputs(steps, batch, ("lengths",))
            for got, want in zip(leaves(run(*args)), leaves(model(*args)), strict=True):
                assert_equal(f"T={steps}, B={batch}", got, want)


def test_import_brings_neither_compiler_nor_exporter():
    """They come with torch.compile and torch.export themselves, of which not every user makes use."""
    code = "import sys, torch; before = set(sys.modules); import fastrnn; print(*set(sys.modules) - before)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "fastrnn.ops" in out.split()
    assert not {"onnx", "onnxscript", "torch.onnx", "torch._dynamo", "sympy"}.intersection(out.split())


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")
def test_torch_nn_makes_the_length_a_constant():
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    layer, x = nn.LSTM(I, H), torch.randn(T, B, I)
    with pytest.raises(Exception, match=r"specialized it to be a constant \(7\)"):
        torch.export.export(layer, (x,), dynamic_shapes=shapes)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(x[:4])
