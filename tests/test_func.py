"""torch.func: vmap, grad, jvp and what they make together, in fp64 against a Python loop and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import KINDS, assert_equal, leaves, usable_backends
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.backends import BACKENDS

D = torch.float64
T, B, I, H, N = 5, 3, 4, 6, 3  # noqa: E741
pytestmark = [  # torch's own, in forward mode and in linearize
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]


def build(kind: str, **options: object) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    name, extra = KINDS[kind]
    extra = {key: 2 for key in extra if key == "proj_size"} or extra
    module = getattr(fastrnn, name)(I, H, dtype=D, **extra, **options)
    return module, {key: p.detach() for key, p in module.named_parameters()}


def outputs(module, parameters, x, **keywords):
    return leaves(functional_call(module, parameters, (x,), keywords))


def square(module):
    """A scalar of all outputs and states."""

    def loss(parameters, x, **keywords):
        return sum((k * o.square()).sum() for k, o in enumerate(outputs(module, parameters, x, **keywords), 1))

    return loss


def own_gradient(loss, parameters, *arguments, **keywords):
    leaf = {key: p.detach().requires_grad_() for key, p in parameters.items()}
    found = torch.autograd.grad(loss(leaf, *arguments, **keywords), list(leaf.values()), create_graph=True)
    return dict(zip(leaf, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_data_along_any_axis(backend, kind):
    module, p = build(kind, num_layers=2, bidirectional=True)
    x = torch.randn(N, T, B, I, dtype=D)
    want = [torch.stack(group) for group in zip(*(outputs(module, p, a) for a in x), strict=True)]
    for dim in range(4):
        got = vmap(lambda a: tuple(outputs(module, p, a)), in_dims=dim, out_dims=dim)(x.movedim(0, dim))
        for g, w in zip(got, want, strict=True):
            assert_equal(f"axis {dim}", g.movedim(dim, 0), w)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    ragged=st.booleans(),
    resets=st.booleans(),
    own_states=st.sampled_from(["none", "shared", "mapped"]),
    reverse=st.booleans(),
    save=st.sampled_from(["gates", "states"]),
    seed=st.integers(0, 1000),
)
def test_per_sample_gradients_of_any_call(kind, ragged, resets, own_states, reverse, save, seed):
    torch.manual_seed(seed)
    module, p = build(kind, bidirectional=reverse, save=save)
    loss = square(module)
    x = torch.randn(N, T, B, I, dtype=D)
    mapped = {"x": x}
    if ragged:
        mapped["lengths"] = torch.randint(0, T + 1, (N, B))
    if resets:
        mapped["resets"] = torch.rand(N, T, B) < 0.3
    shared = {}
    if own_states != "none":
        out = 2 if kind == "lstm_proj" else H
        sizes = [out, H] if "lstm" in kind else [out]
        hx = tuple(torch.randn(N, 1 + reverse, B, n, dtype=D) for n in sizes)
        hx = hx if len(hx) > 1 else hx[0]
        if own_states == "mapped":
            mapped["hx"] = hx
        else:
            shared["hx"] = tuple(a[0] for a in hx) if isinstance(hx, tuple) else hx[0]
    got = vmap(grad(lambda q, m: loss(q, **m, **shared)), (None, 0))(p, mapped)
    for i in range(N):
        each = {k: tuple(a[i] for a in v) if isinstance(v, tuple) else v[i] for k, v in mapped.items()}
        for key, want in own_gradient(loss, p, **each, **shared).items():
            assert_equal(f"sample {i}, {key}", got[key][i], want)


@pytest.mark.parametrize("kind", KINDS)
def test_nested_vmap(backend, kind):
    module, p = build(kind)
    loss, x = square(module), torch.randn(2, N, T, B, I, dtype=D)
    lengths = torch.randint(0, T + 1, (N, B))
    got = vmap(vmap(grad(lambda q, a, n: loss(q, a, lengths=n)), (None, 0, 0)), (None, 0, None))(p, x, lengths)
    for i in range(2):
        for j in range(N):
            for key, want in own_gradient(loss, p, x[i, j], lengths=lengths[j]).items():
                assert_equal(f"{i}, {j}, {key}", got[key][i, j], want)


@pytest.mark.parametrize("kind", KINDS)
def test_ensembles(backend, kind):
    modules = [build(kind)[0] for _ in range(N)]
    stacked = {key: a.detach() for key, a in stack_module_state(modules)[0].items()}
    loss, x = square(modules[0]), torch.randn(2, N, T, B, I, dtype=D)
    lengths = torch.randint(0, T + 1, (N, B))
    members = [dict(m.named_parameters()) for m in modules]
    shared = vmap(grad(loss), (0, None))(stacked, x[0, 0])
    own = vmap(grad(lambda q, a, n: loss(q, a, lengths=n)))(stacked, x[0], lengths)
    each = vmap(vmap(grad(loss), (None, 0)), (0, None))(stacked, x[:, 0])  # per sample of every member
    for i, p in enumerate(members):
        for key, want in own_gradient(loss, p, x[0, 0]).items():
            assert_equal(f"member {i}, {key}", shared[key][i], want)
        for key, want in own_gradient(loss, p, x[0, i], lengths=lengths[i]).items():
            assert_equal(f"member {i} on data of its own, {key}", own[key][i], want)
        for j in range(2):
            for key, want in own_gradient(loss, p, x[j, 0]).items():
                assert_equal(f"member {i}, sample {j}, {key}", each[key][i, j], want)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_made_outside_of_vmap_of_grad(kind, save):
    """The penalty of per-sample gradients: a second derivative that autograd takes, not torch.func."""
    module, p = build(kind, save=save)
    loss, x = square(module), torch.randn(N, T, B, I, dtype=D)
    lengths = torch.randint(0, T + 1, (N, B))
    found = []
    for way in ("vmap", "loop"):
        leaf = {key: a.clone().requires_grad_() for key, a in p.items()}
        y = x.clone().requires_grad_()
        if way == "vmap":
            grads = list(vmap(grad(lambda q, a, n: loss(q, a, lengths=n)), (None, 0, 0))(leaf, y, lengths).values())
        else:
            each = [
                torch.autograd.grad(loss(leaf, y[i], lengths=lengths[i]), list(leaf.values()), create_graph=True)
                for i in range(N)
            ]
            grads = [torch.stack(group) for group in zip(*each, strict=True)]
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [y, *leaf.values()]))
    for name, got, want in zip(["x", *p], *found, strict=True):
        assert_equal(f"penalty's gradient of {name}", got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_one_call(backend, kind):
    module, p = build(kind)
    x, t = torch.randn(2, T, B, I, dtype=D)
    call = lambda a: outputs(module, p, a)[0]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(call, x)
    assert_equal("jacrev", jacrev(call)(x), jacobian)
    assert_equal("jacfwd", jacfwd(call)(x), jacobian)
    pushed = torch.tensordot(jacobian, t, 3)
    assert_equal("jvp", jvp(call, (x,), (t,))[1], pushed)
    y, pull = vjp(call, x)
    assert_equal("vjp", pull(torch.ones_like(y))[0], jacobian.sum((0, 1, 2)))
    y, push = linearize(call, x)
    assert_equal("linearize", push(t), pushed)
    assert_equal("output", y, call(x))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_second_derivatives(backend, kind):
    module, p = build(kind)
    x = torch.randn(2, 2, I, dtype=D)
    call = lambda a: outputs(module, p, a)[0].square().sum()  # noqa: E731
    want = torch.autograd.functional.hessian(call, x)
    assert_equal("hessian", hessian(call)(x), want)
    assert_equal("jacrev of jacrev", jacrev(jacrev(call))(x), want)
    v = torch.randn_like(x)
    assert_equal("jvp of grad", jvp(grad(call), (x,), (v,))[1], torch.tensordot(want, v, 3))
    leaf = x.clone().requires_grad_()
    (outside,) = torch.autograd.grad((grad(call)(leaf) * v).sum(), leaf)
    assert_equal("autograd of grad", outside, torch.tensordot(want, v, 3))


def test_packed_sequences(backend):
    module, p = build("lstm", num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(T, B, I, dtype=D), torch.tensor([2, 5, 3]), enforce_sorted=False)
    loss = square(module)
    want = own_gradient(loss, p, packed)
    got = grad(loss)(p, packed)
    for key, w in want.items():
        assert_equal(key, got[key], w)
    _, pushed = jvp(lambda q: loss(q, packed), (p,), (p,))
    assert_equal("jvp", pushed, sum((want[key] * p[key]).sum() for key in p))


def test_packed_sequences_with_resets(resets_backend):
    module, p = build("gru")
    packed = pack_padded_sequence(torch.randn(T, B, I, dtype=D), torch.tensor([2, 5, 3]), enforce_sorted=False)
    resets, loss = torch.rand(T, B) < 0.3, square(module)
    got = grad(lambda q: loss(q, packed, resets=resets))(p)
    for key, want in own_gradient(loss, p, packed, resets=resets).items():
        assert_equal(key, got[key], want)


@pytest.mark.parametrize("ragged", [False, True])
def test_jacobian_by_batched_gradients(backend, ragged):
    module, _ = build("lstm")
    x, lengths = torch.randn(T, B, I, dtype=D), [2, 5, 0] if ragged else None
    found = [
        torch.autograd.functional.jacobian(lambda a: module(a, lengths=lengths)[0], x, vectorize=v) for v in (0, 1)
    ]
    assert_equal("jacobian", *found)


def test_all_states(resets_backend):
    module, p = build("lstm")
    x, lengths = torch.randn(N, T, B, I, dtype=D), torch.randint(0, T + 1, (N, B))
    call = lambda a, n: functional_call(module, p, (a,), {"lengths": n, "return_states": True})[2][1]  # noqa: E731
    got = vmap(call)(x, lengths)
    for i in range(N):
        assert_equal(f"c of sample {i}", got[i], call(x[i], lengths[i]))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(backend, name):
    cell = getattr(fastrnn, name)(I, H, dtype=D)
    p = {key: a.detach() for key, a in cell.named_parameters()}
    x = torch.randn(N, B, I, dtype=D)
    loss = square(cell)
    got = vmap(grad(loss), (None, 0))(p, x)
    rows = vmap(lambda a: leaves(functional_call(cell, p, (a,)))[0])(x[0])  # of unbatched cells
    for i in range(N):
        for key, want in own_gradient(loss, p, x[i]).items():
            assert_equal(f"sample {i}, {key}", got[key][i], want)
    assert_equal("rows", rows, leaves(cell(x[0]))[0])
    assert_equal("jvp", jvp(lambda a: loss(p, a), (x[0],), (x[1],))[1], (grad(loss, 1)(p, x[0]) * x[1]).sum())


@pytest.mark.parametrize("name", [n for n in usable_backends() if not BACKENDS[n].differentiable])
@pytest.mark.parametrize("ragged", [False, True])
def test_one_call_of_the_backend_serves_all_samples(monkeypatch, name, ragged):
    seen = []
    engine = BACKENDS[name]
    for what in ("forward", "backward"):
        own = getattr(engine, what)

        def counted(call, *rest, own=own, what=what, **keywords):
            seen.append((what, call.batch if call.batch_sizes is None else int(call.batch_sizes[0])))
            return own(call, *rest, **keywords)

        monkeypatch.setattr(engine, what, counted)
    module, p = build("lstm", backend=name)
    x, lengths = torch.randn(N, T, B, I, dtype=D), torch.randint(1, T + 1, (N, B)) if ragged else None
    loss = square(module)
    if ragged:
        vmap(grad(lambda q, a, n: loss(q, a, lengths=n)), (None, 0, 0))(p, x, lengths)
    else:
        vmap(grad(loss), (None, 0))(p, x)
    assert seen == [("forward", N * B), ("backward", N * B)]


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru"])
def test_autocast_within_and_around(kind, save):
    """Against eager autocast, whose forward and backward run on the same numbers."""
    name, extra = KINDS[kind]
    module = getattr(fastrnn, name)(I, H, save=save, **({"proj_size": 2} if "proj_size" in extra else {}))
    p, x = dict(module.named_parameters()), torch.randn(N, T, B, I)
    loss = lambda q, a: functional_call(module, q, (a,))[0].float().square().sum()  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        got = vmap(grad(loss), (None, 0))({key: a.detach() for key, a in p.items()}, x)
    for i in range(N):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(p, x[i])
        for key, want in zip(p, torch.autograd.grad(value, list(p.values())), strict=True):
            assert_equal(f"sample {i}, {key}", got[key][i], want, 2e-2)


def test_errors_say_the_same_within_vmap():
    module, _ = build("lstm")
    with pytest.raises(RuntimeError, match=f"input: expected {I} features in its last dimension, got 7"):
        vmap(lambda a: module(a)[0])(torch.randn(N, T, B, 7, dtype=D))
    with pytest.raises(ValueError, match=f"lengths: expected values from 0 to {T}, got values from 1 to 9"):
        vmap(lambda a, n: module(a, lengths=n)[0])(
            torch.randn(N, T, 2, I, dtype=D), torch.tensor([[1, 2], [1, 9], [1, 1]])
        )


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_torch_nn_has_no_batching_rule(name):
    module, x = getattr(nn, name)(I, H), torch.randn(N, T, B, I)
    modules = [getattr(nn, name)(I, H) for _ in range(N)]
    stacked = stack_module_state(modules)[0]
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda a: module(a)[0])(x)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda q: functional_call(module, q, (x[0],))[0])(stacked)
