"""torch.onnx.export: the standard operators, run in ONNX Runtime at lengths and batch sizes not the example's."""

import io

import pytest
import torch
from export_support import ALL, CELLS, SIZES, Model, cell_dims, cell_inputs
from new_cell_support import page, peephole
from support import B, H, I, T, assert_equal, both, leaves
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence

import fastrnn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [  # what torch does within
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
__all__ = ["page"]
OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
LOOPS = {*OPERATORS.values(), "Scan"}


def exported(model, args, dims):
    """ModelProto, by way of an ExportedProgram."""
    return converted(torch.export.export(model, args, dynamic_shapes=dims))


def converted(model, *args, **options):
    made = torch.onnx.export(model, *args, dynamo=True, verbose=False, **options).model_proto
    onnx.checker.check_model(made, full_check=True)
    return made


def operators(made):
    """Those of the graph that go through time."""
    return [node.op_type for node in made.graph.node if node.op_type in LOOPS]


class Session:
    """Call it as the model was called."""

    def __init__(self, made):
        self.session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, *args):
        names = [i.name for i in self.session.get_inputs()]
        feed = dict(zip(names, [a.numpy() for a in leaves(args)], strict=True))
        return [torch.from_numpy(a) for a in self.session.run(None, feed)]


def check(made, model, inputs, sizes=SIZES):
    """ONNX Runtime against the model, for `inputs(*size)` of each size."""
    run = Session(made)
    for size in sizes:
        args = inputs(*size)
        for k, (got, want) in enumerate(zip(run(*args), leaves(model(*args)), strict=True)):
            assert_equal(f"output {k} at {size}", got, want.detach())


class Each(nn.Module):
    """A layer of each kind, on the same input."""

    def __init__(self, **options):
        super().__init__()
        self.models = nn.ModuleList([Model(kind, **options) for kind in OPERATORS])

    def forward(self, x, hx, lengths):
        return [model(x, h, lengths) for model, h in zip(self.models, hx, strict=True)]

    def inputs(self, steps, batch):
        each = [model.inputs(steps, batch, ("hx", "lengths")) for model in self.models]
        return each[0][0], [hx for _, hx, _, _ in each], each[0][2]

    def dims(self):
        each = [model.dims(("hx", "lengths")) for model in self.models]
        return each[0][0], [hx for _, hx, _, _ in each], each[0][2]


def test_standard_operators():
    """Two layers in both directions, with states in and out, and lengths, zeros among them and zeros alone."""
    model = Each(num_layers=2, bidirectional=True)
    made = exported(model, model.inputs(T, B), model.dims())
    assert sorted(operators(made)) == sorted(2 * list(OPERATORS.values()))
    check(made, model, model.inputs)

    def of_nothing(steps, batch):
        x, hx, _ = model.inputs(steps, batch)
        return x, hx, torch.zeros(batch, dtype=torch.int64)

    check(made, model, of_nothing)


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_a_module_where_torch_nn_does_not_export():
    theirs, ours = both("LSTM", I, H, batch_first=True, bias=False)
    x, shapes = torch.randn(B, T, I), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    with pytest.raises(Exception, match="Failed to export the model"):
        converted(theirs.eval(), (x,), dynamic_shapes=shapes)
    made = converted(ours.eval(), (x,), dynamic_shapes=shapes)
    assert operators(made) == ["LSTM"]
    check(made, theirs, lambda *size: (torch.randn(*size, I),))


def test_cells():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleList([getattr(fastrnn, name)(I, H) for name in CELLS])

        def forward(self, *args):
            return [cell(*a) for cell, a in zip(self.cells, args, strict=True)]

    def inputs(batch):
        return tuple([cell_inputs(name, batch) for name in CELLS])

    model = All()
    made = exported(model, inputs(B), (tuple([cell_dims(name) for name in CELLS]),))
    assert sorted(operators(made)) == ["GRU", "LSTM", "RNN"]
    check(made, model, inputs, [(B,), (3,), (1,)])


@pytest.mark.parametrize(
    ("kind", "options", "given"),
    [
        ("lstm_proj", {"trail": True, "batch_first": True}, ("hx", "lengths")),
        ("gru", {"trail": True, "bidirectional": True, "bias": False}, ALL),
    ],
    ids=["proj_size, return_states", "resets"],
)
def test_what_the_operators_lack_is_a_scan(kind, options, given):
    model = Model(kind, **options)
    made = exported(model, model.inputs(T, B, given), model.dims(given))
    assert operators(made) == ["Scan"] * (1 + model.layer.bidirectional)
    check(made, model, lambda *size: model.inputs(*size, given))


def test_bfloat16_is_computed_in_float():
    model = Model("rnn_tanh").bfloat16()
    made = exported(model, model.inputs(T, B, ("lengths",)), model.dims(("lengths",)))  # which passes onnx.checker
    assert operators(made) == ["RNN"]
    assert {o.type.tensor_type.elem_type for o in made.graph.output} == {onnx.TensorProto.BFLOAT16}


def test_a_model_on_another_device():
    """What stands for ONNX's operators during an export lies on the CPU. Tensors without values will do."""
    given = ("hx", "lengths")
    with torch.device("meta"):
        model = Model("gru")
        args = torch.empty(T, B, I), torch.empty(1, B, H), torch.empty(B, dtype=torch.int64), None
        program = torch.export.export(model, args, dynamic_shapes=model.dims(given))
    graph = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model.graph
    assert [node.op_type for node in graph if node.op_type in LOOPS] == ["GRU"]


def test_a_packed_sequence_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.LSTM(I, H)

        def forward(self, data, sizes, order):
            return self.layer(PackedSequence(data, sizes, order, order))[0].data

    args = torch.randn(9, I), torch.tensor([3, 3, 2, 1]), torch.arange(3)
    program = torch.export.export(Packed(), args)
    with pytest.raises(Exception, match=r"PackedSequence: .* give the module the padded input and lengths="):
        converted(program)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_the_exporter_of_torchscript():
    model, file = nn.Sequential(fastrnn.GRU(I, H, bidirectional=True)).eval(), io.BytesIO()
    axes = {"x": {0: "T", 1: "B"}}
    torch.onnx.export(model, (torch.randn(T, B, I),), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    made = onnx.load_from_string(file.getvalue())
    assert operators(made) == ["GRU"]
    check(made, model, lambda *size: (torch.randn(*size, I),))


def test_a_cell_with_parameters_of_its_own(page):
    module = peephole(page, I, H, dtype=torch.float32, bidirectional=True)
    made = exported(module, (torch.randn(T, B, I),), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    assert operators(made) == ["Scan", "Scan"]
    check(made, module, lambda steps, batch: (torch.randn(steps, batch, I),))
