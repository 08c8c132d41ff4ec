"""torch.compile(fullgraph=True) of every module and cell, in training and inference."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, assert_equal, leaves, random_states, usable_backends
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn

D = torch.float64
T, B, I, H = 7, 5, 4, 6  # noqa: E741


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def build(kind, library=fastrnn, **options):
    name, extra = KINDS[kind]
    return getattr(library, name)(I, H, dtype=D, **({"proj_size": 2} if "proj_size" in extra else extra), **options)


class Compiled:
    """A function in one graph; `graphs` counts those that were kept.

    Dynamo calls its backend again when it finds that a float, such as `dropout`, is a constant of the graph.
    That is one compilation still, which CompileCounterWithBackend counts twice.
    """

    def __init__(self, function, dynamic=None):
        self.graphs = 0
        self.call = torch.compile(function, fullgraph=True, backend=self._backend, dynamic=dynamic)

    def _backend(self, graph, inputs):
        made = lookup_backend("aot_eager")(graph, inputs)
        self.graphs += 1
        return made

    def __call__(self, *arguments, **keywords):
        return self.call(*arguments, **keywords)


def compare(compiled, eager, parameters, *arguments, **keywords):
    """Outputs and, where there are parameters, gradients of a compiled and an eager function."""
    found, parameters = [], list(parameters)
    for f in (compiled, eager):
        torch.manual_seed(5)
        outs = leaves(f(*arguments, **keywords))
        wanted = [*(a for a in leaves(list(arguments)) if a.requires_grad), *parameters]
        grads = torch.autograd.grad([o.square().sum() for o in outs], wanted) if wanted else ()
        found.append([*outs, *grads])
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        assert_equal(f"result {k}", a, b)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_all_sizes(kind, options):
    module = build(kind, **options)
    compiled = Compiled(module, dynamic=True)
    for steps, batch in ((7, 5), (9, 3), (3, 8)):
        x = torch.randn(*((batch, steps) if "batch_first" in options else (steps, batch)), I, dtype=D)
        compare(compiled, module, module.parameters(), x.requires_grad_())
    assert compiled.graphs == 1
    with torch.no_grad():
        for shape in ((7, 5, I), (9, 3, I), (3, 8, I)):
            compare(compiled, module, (), torch.randn(shape, dtype=D))
    assert compiled.graphs == 2


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("keywords", [("lengths",), ("lengths", "resets", "return_states", "hx")], ids=str)
def test_one_graph_for_all_sizes_of_every_argument(kind, keywords):
    module = build(kind, bidirectional=True)
    compiled = Compiled(module, dynamic=True)
    for steps, batch in ((7, 5), (9, 3), (3, 8)):
        given = {
            "lengths": torch.randint(0, steps + 1, (batch,)),
            "resets": torch.rand(steps, batch) < 0.3,
            "return_states": True,
            "hx": random_states(module, batch),
        }
        x = torch.randn(steps, batch, I, dtype=D, requires_grad=True)
        compare(compiled, module, module.parameters(), x, **{key: given[key] for key in keywords})
    assert compiled.graphs == 1


def test_sizes_become_dynamic_by_themselves():
    """With torch.compile's default, the second size makes a graph for all further ones."""
    module = build("lstm")
    compiled = Compiled(module)
    for steps, batch in ((7, 5), (9, 3), (4, 8), (11, 2)):
        compare(compiled, module, module.parameters(), torch.randn(steps, batch, I, dtype=D))
    assert compiled.graphs == 2


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_in_a_loop(name):
    cell = getattr(fastrnn, name)(I, H, dtype=D)

    def loop(x):
        h = None
        for t in range(3):
            h = cell(x[t], h)
        return h

    x = torch.randn(3, B, I, dtype=D, requires_grad=True)
    compare(Compiled(loop), loop, cell.parameters(), x)
    compare(Compiled(cell), cell, cell.parameters(), x[0, 0].detach())


def test_unbatched_and_given_states():
    module = build("lstm", num_layers=2)
    compiled = Compiled(module)
    compare(compiled, module, module.parameters(), torch.randn(T, I, dtype=D), random_states(module, None))
    compare(compiled, module, module.parameters(), torch.randn(T, B, I, dtype=D), random_states(module))


@pytest.mark.parametrize("name", usable_backends())
def test_packed_sequences(name):
    module = build("lstm", num_layers=2, bidirectional=True, backend=name)

    def run(packed):
        y, h = module(packed)
        return y.data, h

    compiled = Compiled(run)
    for lengths in ([3, 7, 2, 2, 5], [6, 6, 4, 1, 2]):
        packed = pack_padded_sequence(torch.randn(T, B, I, dtype=D), torch.tensor(lengths), enforce_sorted=False)
        compare(compiled, run, module.parameters(), packed._replace(data=packed.data.requires_grad_()))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_autocast(name):
    module, x = getattr(fastrnn, name)(I, H), torch.randn(T, B, I)

    def within(a):
        with torch.autocast("cpu", torch.bfloat16):
            return module(a)

    got, want = leaves(Compiled(within)(x)), leaves(within(x))
    with torch.autocast("cpu", torch.bfloat16):
        around = leaves(Compiled(module)(x))
    for a, b, c in zip(got, want, around, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
        assert torch.equal(c, b)


def test_dropout():
    module = build("gru", num_layers=3, dropout=0.5)
    compiled = Compiled(module)
    compare(compiled, module, module.parameters(), torch.randn(T, B, I, dtype=D))
    module.eval()
    compare(compiled, module, module.parameters(), torch.randn(T, B, I, dtype=D))


@pytest.mark.parametrize("name", usable_backends())
def test_backends(name):
    x = torch.randn(T, B, I, dtype=D, requires_grad=True)
    module = build("lstm", backend=name, save="states")
    compare(Compiled(module), module, module.parameters(), x)
    free = build("lstm")
    compiled = Compiled(free)
    compiled(x)
    with fastrnn.backend(name):
        compare(compiled, free, free.parameters(), x)


def test_another_backend_is_another_graph():
    seen = []

    def record(graph, inputs):
        seen.extend(str(n.args[1]) for n in graph.graph.nodes if "fastrnn.forward" in str(n.target))
        return graph.forward

    module = build("lstm")
    compiled = torch.compile(module, fullgraph=True, backend=record)
    x = torch.randn(T, B, I, dtype=D)
    compiled(x)
    with fastrnn.backend("reference"):
        compiled(x)
    assert seen == [usable_backends(dtype=D)[0], "reference"]


def test_parametrized_weights():
    module = nn.utils.parametrizations.weight_norm(build("lstm"), "weight_hh_l0")
    x = torch.randn(T, B, I, dtype=D)
    compare(Compiled(module), module, module.parameters(), x)


def test_checkpoint_inside():
    module = build("gru")
    run = lambda a: checkpoint(lambda b: module(b)[0], a, use_reentrant=False)  # noqa: E731
    compare(Compiled(run), run, module.parameters(), torch.randn(T, B, I, dtype=D, requires_grad=True))


def test_torch_func_inside():
    module = build("lstm")
    p = {key: a.detach() for key, a in module.named_parameters()}
    x = torch.randn(3, T, B, I, dtype=D)
    each = vmap(grad(lambda q, a: functional_call(module, q, (a,))[0].square().sum()), (None, 0))
    got, want = Compiled(each)(p, x), each(p, x)
    for key in p:
        assert_equal(key, got[key], want[key])


def test_the_graph_holds_the_op_whole():
    """One op for forward, one for backward: the loop over time is not unrolled."""
    counter = CompileCounterWithBackend("eager")
    module = build("lstm", num_layers=2)
    torch.compile(module, fullgraph=True, backend=counter)(torch.randn(50, B, I, dtype=D))
    called = [str(n.target) for n in counter.graphs[0].graph.nodes if "fastrnn" in str(n.target)]
    assert called == ["fastrnn.forward"] * 2 or called == ["fastrnn.forward.default"] * 2
    assert len(counter.graphs[0].graph.nodes) < 60


def test_errors():
    module = build("lstm")
    compiled = Compiled(module)
    with pytest.raises(Exception, match=r"input: expected 4 features in its last dimension, got 7"):
        compiled(torch.randn(T, B, 7, dtype=D))
    with pytest.raises(Exception, match=r"hx: expected a tuple \(h_0, c_0\) of Tensors"):
        compiled(torch.randn(T, B, I, dtype=D), torch.randn(3, dtype=D))
    with pytest.raises(ValueError, match="lengths: expected values from 0 to 7, got values from 1 to 9"):
        compiled(torch.randn(T, 3, I, dtype=D), lengths=torch.tensor([1, 2, 9]))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_torch_nn_is_not_supported(name):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Dynamo does not support RNN, GRU, or LSTM"):
        torch.compile(getattr(nn, name)(I, H), fullgraph=True, backend="eager")(torch.randn(T, B, I))


@pytest.mark.slow  # a C++ compiler runs
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_inductor(kind):
    module, head = build(kind, bidirectional=kind == "gru"), nn.Linear(2 * H if kind == "gru" else H, 3, dtype=D)
    run = lambda a, n: head(module(a, lengths=n)[0]).relu()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for steps, batch in ((7, 5), (9, 3)):
        x = torch.randn(steps, batch, I, dtype=D, requires_grad=True)
        lengths = torch.randint(0, steps + 1, (batch,))
        parameters = [*module.parameters(), *head.parameters()]
        found = [
            [o := f(x, lengths), *torch.autograd.grad(o.square().sum(), [x, *parameters])] for f in (compiled, run)
        ]
        for k, (a, b) in enumerate(zip(*found, strict=True)):
            assert_equal(f"result {k}", a, b)
