"""Second derivatives: gradgradcheck in fp64, penalties, Hessian-vector products, on every backend."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, assert_equal, leaves, usable_backends
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.backends import BACKENDS

D = torch.float64
T, B, I, H = 3, 2, 3, 4  # noqa: E741
LAYERS = [
    {},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"save": "states"},
    {"batch_first": True, "bidirectional": True, "save": "states"},
]


def build(kind, library=fastrnn, **options):
    name, extra = KINDS[kind]
    extra = {"proj_size": 2} if "proj_size" in extra else extra
    return getattr(library, name)(I, H, dtype=D, **extra, **options)


def function_of(module, **keywords):
    """Of the input and the parameters to every output that takes a gradient."""
    names = [name for name, _ in module.named_parameters()]

    def call(x, *parameters):
        outs = leaves(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,), keywords))
        return tuple(o for o in outs if o.requires_grad)

    return call, list(module.parameters())


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(backend, kind, options):
    call, parameters = function_of(build(kind, **options))
    x = torch.randn(T, B, I, dtype=D, requires_grad=True)
    assert gradcheck(call, (x, *parameters), fast_mode=True)
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("keywords", ["lengths", "resets", "return_states", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_resets_and_all_states(resets_backend, kind, keywords, save):
    given = {"lengths": torch.tensor([2, 3]), "resets": torch.rand(T, B) < 0.4, "return_states": True}
    chosen = given if keywords == "all" else {keywords: given[keywords]}
    call, parameters = function_of(build(kind, bidirectional=True, save=save), **chosen)
    x = torch.randn(T, B, I, dtype=D, requires_grad=True)
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


def test_lengths_on_every_backend(backend):
    call, parameters = function_of(build("gru", num_layers=2, bidirectional=True), lengths=torch.tensor([0, 2]))
    x = torch.randn(T, B, I, dtype=D, requires_grad=True)
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(backend, kind):
    module = build(kind, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(T, B, I, dtype=D), torch.tensor([2, 3]), enforce_sorted=False)
    assert gradgradcheck(
        lambda a: tuple(leaves(module(packed._replace(data=a)))), packed.data.requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(backend, name):
    cell = getattr(fastrnn, name)(I, H, dtype=D)
    call, parameters = function_of(cell)
    x = torch.randn(B, I, dtype=D, requires_grad=True)
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_chain_of_cells_as_in_torch(backend, name):
    ours, theirs = getattr(fastrnn, name)(I, H, dtype=D), getattr(nn, name)(I, H, dtype=D)
    theirs.load_state_dict(ours.state_dict())
    start, results = torch.randn(B, I, dtype=D), []
    for m in (ours, theirs):
        x, h = start.clone().requires_grad_(), None
        for _ in range(3):
            h = m(x, h)
        (g,) = torch.autograd.grad(leaves(h)[0].pow(2).sum(), x, create_graph=True)
        g.pow(2).sum().backward()
        results.append([g.detach(), x.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        assert_equal("chain", a, b)


def test_an_input_given_twice_counts_once_in_each_place(backend):
    ours, theirs = (library.LSTM(4, 4, dtype=D) for library in (fastrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    x, h0 = torch.randn(T, B, 4, dtype=D), torch.randn(1, B, 4, dtype=D)
    grads = []
    for m in (ours, theirs):
        h = h0.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(x, (h, h))[0].pow(2).sum(), h, create_graph=True)
        grads.append(g)
    assert_equal("gradient of h and c", *grads)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_gradient_penalty_and_hessian_vector_product(backend, kind, dtype):
    """In the dtype and the mode (eval) that people run them in, against torch.nn's in fp64."""
    ours, theirs = build(kind).to(dtype).eval(), build(kind, nn)
    theirs.load_state_dict({key: a.to(D) for key, a in ours.state_dict().items()})
    start, v, found = torch.randn(T, B, I, dtype=dtype), torch.randn(T, B, I, dtype=dtype), []
    for m in (ours, theirs):
        own = next(m.parameters()).dtype
        x = start.to(own).requires_grad_()
        (g,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
        penalty = (g.norm(2, dim=-1) - 1).square().mean()
        hvp = torch.autograd.grad(g, x, v.to(own), retain_graph=True)[0]
        found.append([hvp, *torch.autograd.grad(penalty, list(m.parameters()), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_equal("second derivative", a, b.to(dtype))


def test_third_derivative(backend):
    found = []
    ours, theirs = (library.LSTM(I, H, dtype=D) for library in (fastrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    start = torch.randn(T, B, I, dtype=D)
    for m in (ours, theirs):
        x = start.clone().requires_grad_()
        value = m(x)[0].pow(3).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.square().sum()
        found.append(g.detach())
    assert_equal("third derivative", *found)


class Logged(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_ops_derivative_by_the_dispatcher():
    """A dispatch mode sees registered ops, whose backward has a derivative of its own."""
    for name in usable_backends():
        module = fastrnn.GRU(I, H, dtype=D, backend=name)
        x = torch.randn(T, B, I, dtype=D, requires_grad=True)
        with Logged() as log:
            (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
            seen = torch.autograd.grad(g.square().sum(), [x, *module.parameters()], allow_unused=True)
        assert ("fastrnn.backward.default" in log.seen) != BACKENDS[name].differentiable
        (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        want = torch.autograd.grad(g.square().sum(), [x, *module.parameters()], allow_unused=True)
        for a, b in zip(seen, want, strict=True):
            assert (a is None) == (b is None) or not (b if a is None else a).any()
            if a is not None and b is not None:
                assert_equal(name, a, b)
