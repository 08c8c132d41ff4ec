"""The short way back through the engine: taken after the short way there, with the bits of the usual way."""

import pytest
import torch
from support import B, H, I, T

import fastrnn
from fastrnn import recurrence
from fastrnn.backends.cpu import load

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        load()[0] is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        reason="needs the engine, and a torch that tells where tensors lie",
    ),
]
LAYERS = ["LSTM", "GRU", "RNN"]
FORMS = {"layer": (T, B), "short layer": (2, B), "cell": (B,)}
MODULES = [(name, form) for name in LAYERS for form in FORMS]


@pytest.fixture
def ways(monkeypatch):
    """What each backward's short way answered, and a function that closes it."""
    answers, run = [], recurrence._quick_backward

    def spy(*arguments):
        answers.append(run(*arguments))
        return answers[-1]

    monkeypatch.setattr(recurrence, "_quick_backward", spy)
    return answers, lambda: monkeypatch.setattr(recurrence, "_quick_backward", lambda *_: None)


class Net:
    """A module or cell, its inputs as leaves, and its outputs, all of them distinct."""

    def __init__(self, name, form, given=True, dtype=torch.float64):
        self.module = getattr(fastrnn, name + ("Cell" if form == "cell" else ""))(I, H, dtype=dtype, backend="cpu")
        count = 1 + (name == "LSTM")
        lead = () if form == "cell" else (1,)
        self.states = [torch.randn(*lead, B, H, dtype=dtype, requires_grad=True) for _ in range(count * given)]
        self.x = torch.randn(*FORMS[form], I, dtype=dtype, requires_grad=True)
        self.inputs = [self.x, *self.states, *self.module.parameters()]

    def __call__(self):
        hx = None if not self.states else self.states[0] if len(self.states) == 1 else tuple(self.states)
        return torch.utils._pytree.tree_leaves(self.module(self.x, hx))


def assert_same_both_ways(ways, run, taken=True):
    answers, close = ways
    got = run()
    assert len(answers) > 0
    assert (answers[-1] is not None) == taken
    close()
    for k, (a, b) in enumerate(zip(got, run(), strict=True)):
        assert (a is None) == (b is None), k
        if a is not None:
            assert not a.isnan().any(), k
            assert torch.equal(a, b), f"gradient {k} differs by {float((a - b).abs().max()):.1e}"


SEEDS = {
    "plain": lambda a: torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(a.numel())),
    "expanded": lambda a: torch.tensor(0.7, dtype=a.dtype).expand(a.shape),
    "transposed": lambda a: (
        torch.linspace(-1, 1, a.numel(), dtype=a.dtype).view(a.shape[::-1]).permute(*range(a.dim())[::-1])
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("name", "form"), MODULES)
def test_all_outputs(ways, name, form, given, seed, dtype):
    net = Net(name, form, given, dtype)

    def run():
        outs = net()
        return torch.autograd.grad(outs, net.inputs, [SEEDS[seed](a) for a in outs])

    assert_same_both_ways(ways, run)


@pytest.mark.parametrize(("name", "form"), MODULES)
def test_one_output_alone(ways, name, form):
    """The others' gradients come as None."""
    net = Net(name, form)
    for k in range(len(net())):
        got = torch.autograd.grad(net()[k].square().sum(), net.inputs, allow_unused=True)
        assert ways[0][-1] is not None
        again = net()
        want = torch.autograd.grad(
            sum((a.square() * (j == k)).sum() for j, a in enumerate(again)), net.inputs, allow_unused=True
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "form"), MODULES)
def test_some_inputs_only(ways, name, form):
    net = Net(name, form)
    for k in range(len(net.inputs)):
        for j, a in enumerate(net.inputs):
            a.requires_grad_(j == k)
        net()[0].square().sum().backward()
        assert [j for j, a in enumerate(net.inputs) if a.grad is not None] == [k]
        net.inputs[k].grad = None
    assert all(a is not None for a in ways[0])


@pytest.mark.parametrize(("name", "form"), MODULES)
def test_walking_a_graph_again(ways, name, form):
    net = Net(name, form)
    loss = net()[0].square().sum()
    walks = [torch.autograd.grad(loss, net.inputs, retain_graph=again) for again in (True, True, False)]
    assert all(a is not None for a in ways[0])
    for walk in walks[1:]:
        for a, b in zip(walks[0], walk, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, net.inputs)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hooked", [False, True])
def test_edited_output(ways, name, form, hooked):
    """Made anew where it was kept without a copy, and the edit's own derivative is autograd's."""
    net = Net(name, form)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda a: a, lambda a: a)

    def run(edit):
        if hooked:
            with hooks:
                y = net()[0]
        else:
            y = net()[0]
        loss = (edit(y) * 1.5).square().sum()
        first = torch.autograd.grad(loss, net.inputs, retain_graph=True)
        return first, torch.autograd.grad(loss, net.inputs)

    want, _ = run(lambda y: y * 2)
    for got in run(lambda y: y.mul_(2)):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert all(a is not None for a in ways[0])


def test_output_of_an_lstm_may_not_be_edited():
    """As that of torch.nn's."""
    net = Net("LSTM", "layer")
    y = net()[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_kept_of_an_output_goes_with_the_graph(name):
    net = Net(name, "layer", dtype=torch.float32)
    y = net()[0]
    node = y.grad_fn
    y.sum().backward()
    kept = [a for a in vars(node).values() if isinstance(a, torch.Tensor)] if hasattr(node, "__dict__") else []
    assert not kept
    assert getattr(node, "y", None) is None


@pytest.mark.parametrize("name", LAYERS)
def test_batched_gradients_go_the_usual_way(ways, name):
    net = Net(name, "layer")
    y = net()[0]
    seeds = torch.randn(3, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, net.inputs, seeds, is_grads_batched=True, retain_graph=True)
    assert not [a for a in ways[0] if a is not None]
    for k, seed in enumerate(seeds):
        for a, b in zip(got, torch.autograd.grad(y, net.inputs, seed, retain_graph=True), strict=True):
            torch.testing.assert_close(a[k], b)
