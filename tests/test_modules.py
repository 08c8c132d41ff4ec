"""Numbers: every kind, layer count, direction, option and dtype against torch.nn, on every backend."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    KINDS,
    B,
    H,
    I,
    T,
    assert_as_good,
    compare,
    gradients,
    inputs_of,
    leaves,
    pair,
    random_states,
    usable_backends,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = list(itertools.product(KINDS, (1, 2, 3), (False, True)))


@pytest.mark.parametrize(("kind", "layers", "bidirectional"), SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_layers_and_directions(backend, kind, layers, bidirectional, bias):
    theirs, ours = pair(kind, I, H, layers, bidirectional=bidirectional, bias=bias)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs)
    compare(kind, ours, theirs, lambda: ours(x, hx), lambda: theirs(x, hx), inputs_of(x, hx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given_hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
def test_layouts(backend, kind, given_hx, layout):
    theirs, ours = pair(kind, I, H, 2, bidirectional=True, batch_first=layout == "batch_first")
    shape = {"time_first": (T, B, I), "batch_first": (B, T, I), "unbatched": (T, I)}[layout]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs, None if layout == "unbatched" else B) if given_hx else None
    compare(kind, ours, theirs, lambda: ours(x, hx), lambda: theirs(x, hx), inputs_of(x, hx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (1, 4, 3, 2), (9, 1, 2, 33), (3, 70, 5, 16), (65, 2, 3, 8)], ids=str)
def test_sizes(backend, kind, sizes):
    steps, batch, features, hidden = sizes
    extra = {"proj_size": 1} if kind == "lstm_proj" else {}
    theirs, ours = pair(kind, features, hidden, **extra)
    x = torch.randn(steps, batch, features, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs, batch)
    compare(kind, ours, theirs, lambda: ours(x, hx), lambda: theirs(x, hx), inputs_of(x, hx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_dtypes(kind, dtype, bidirectional):
    truth, _ = pair(kind, I, H, 2, bidirectional=bidirectional)
    theirs, ours = pair(kind, I, H, 2, bidirectional=bidirectional, dtype=dtype)
    truth.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    results = [leaves(m(a)) for m, a in ((truth, exact), (theirs, x))]
    grads = [gradients(m, {"input": a}, r) for (m, a), r in zip(((truth, exact), (theirs, x)), results, strict=True)]
    cell = "lstm" if kind == "lstm_proj" else kind
    for name in usable_backends(cell, dtype):
        with fastrnn.backend(name):
            outputs = leaves(ours(x))
        for which, got, torchs, want in zip(("output", "h_n", "c_n"), outputs, results[1], results[0], strict=False):
            assert_as_good(f"{name} {kind} {which}", got, torchs, want)
        for which, got in gradients(ours, {"input": x}, outputs).items():
            assert_as_good(f"{name} {kind} gradient of {which}", got, grads[1][which], grads[0][which])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_the_same_mask(backend, kind):
    theirs, ours = pair(kind, I, H, 3, dropout=0.4, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs)

    def seeded(module):
        torch.manual_seed(5)
        return module(x, hx)

    compare(kind, ours, theirs, lambda: seeded(ours), lambda: seeded(theirs), inputs_of(x, hx))
    ours.eval(), theirs.eval()
    compare(kind, ours, theirs, lambda: seeded(ours), lambda: seeded(theirs), inputs_of(x, hx))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(backend, kind):
    theirs, ours = pair(kind, I, H)
    base = torch.randn(2 * I, B, 3 * T, dtype=torch.float64)
    views = {
        "transposed": base.permute(2, 1, 0)[::3, :, ::2],
        "expanded": base[:I, :1, :T].permute(2, 1, 0).expand(T, B, I),
        "expanded in time": base[:I, :, :1].permute(2, 1, 0).expand(T, B, I),
    }
    one = torch.randn(1, 1, H, dtype=torch.float64)
    hx = random_states(theirs, grad=False)
    expanded = tuple(one[..., : a.shape[-1]].expand(1, B, -1) for a in leaves(hx))
    for name, view in views.items():
        assert not view.is_contiguous()
        for states in (hx, expanded if len(expanded) > 1 else expanded[0]):
            x = view.detach().requires_grad_()
            label = f"{kind} {name}"
            compare(label, ours, theirs, lambda x=x, s=states: ours(x, s), lambda x=x, s=states: theirs(x, s), {"x": x})


@pytest.mark.parametrize("kind", KINDS)
def test_strided_weights(backend, kind):
    theirs, ours = pair(kind, I, H)
    with torch.no_grad():
        for module in (theirs, ours):
            for name, p in list(module.named_parameters()):
                wide = torch.cat((p, torch.full_like(p, float("nan"))), -1)
                setattr(module, name, torch.nn.Parameter(wide[..., : p.shape[-1]]))
    assert not ours.weight_hh_l0.is_contiguous()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    compare(kind, ours, theirs, lambda: ours(x), lambda: theirs(x), {"input": x})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["output", "h_n", "c_n"])
def test_gradient_of_one_output_alone(backend, kind, which):
    """The other outputs get no gradient, which backward must not take for a tensor."""
    theirs, ours = pair(kind, I, H, 2, bidirectional=True)
    index = ("output", "h_n", "c_n").index(which)
    if index == 2 and theirs.mode != "LSTM":
        return
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def one(module):
        return leaves(module(x))[index]

    def used(module):  # the last layer's c_n depends on everything, its h_n through w_hr too
        loss = (one(module) ** 2).sum()
        return dict(
            zip(
                dict(module.named_parameters()),
                torch.autograd.grad(loss, list(module.parameters()), allow_unused=True),
                strict=True,
            )
        )

    want = used(theirs)
    for name, g in used(ours).items():
        if want[name] is None or not want[name].any():
            assert g is None or not g.any(), name
        else:
            torch.testing.assert_close(g, want[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parts(backend, kind):
    """Gradients of some inputs only: those are right, the others None."""
    theirs, ours = pair(kind, I, H)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for name, _ in ours.named_parameters():
        for module in (theirs, ours):
            module.zero_grad()
            for other, p in module.named_parameters():
                p.requires_grad_(other == name)
            module(x)[0].square().sum().backward()
        for other, p in ours.named_parameters():
            if other == name:
                torch.testing.assert_close(p.grad, theirs.get_parameter(name).grad, rtol=1e-9, atol=1e-10)
            else:
                assert p.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
def test_gradcheck_twice(kind, ragged):
    extra = {"lengths": torch.tensor([3, 1])} if ragged else {}
    module = pair(kind, 2, 3, bidirectional=True, **({"proj_size": 2} if kind == "lstm_proj" else {}))[1]
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = random_states(module, 2)

    def function(x, *rest):
        states, weights = rest[: len(leaves(hx))], rest[len(leaves(hx)) :]
        states = states if len(states) > 1 else states[0]
        swapped = dict(zip(names, weights, strict=True))
        return tuple(leaves(torch.func.functional_call(module, swapped, (x, states), extra)))

    inputs = (x, *leaves(hx), *(p.detach().clone().requires_grad_() for p in module.parameters()))
    for name in usable_backends("lstm" if kind == "lstm_proj" else kind, torch.float64, ragged):
        if name == "native":
            continue  # torch.nn's own: oneDNN's and PackedSequence's double backward are not ours to test
        with fastrnn.backend(name):
            assert gradcheck(function, inputs, fast_mode=True)
            assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_inference_mode_and_training_agree(backend, kind):
    _, ours = pair(kind, I, H, 2, dtype=torch.float32)
    x = torch.randn(T, B, I)
    trained = leaves(ours(x))
    with torch.no_grad():
        plain = leaves(ours(x))
    with torch.inference_mode():
        inferred = leaves(ours(x))
    for a, b, c in zip(trained, plain, inferred, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c)
        assert not b.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_from_run_to_run(backend, kind):
    _, ours = pair(kind, I, H, 2, bidirectional=True, dtype=torch.float32)
    x = torch.randn(T, B, I, requires_grad=True)
    runs = [(leaves(out := ours(x)), gradients(ours, {"input": x}, leaves(out))) for _ in range(3)]
    for outputs, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, runs[0][0], strict=True))
        assert all(torch.equal(grads[n], runs[0][1][n]) for n in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_pass_through(backend, kind, poison):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    x[2, 1, 3] = poison
    for got, want in zip(leaves(ours(x)), leaves(theirs(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20), st.integers(2, 40)),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    given_hx=st.booleans(),
    name=st.sampled_from(usable_backends()),
)
def test_random_configurations(kind, sizes, layers, bidirectional, bias, batch_first, given_hx, name):
    steps, batch, features, hidden = sizes
    extra = {"proj_size": hidden // 2} if kind == "lstm_proj" else {}
    theirs, ours = pair(
        kind, features, hidden, layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first, **extra
    )
    x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), features, dtype=torch.float64)
    x.requires_grad_()
    hx = random_states(theirs, batch) if given_hx else None
    with fastrnn.backend(name):
        compare(kind, ours, theirs, lambda: ours(x, hx), lambda: theirs(x, hx), inputs_of(x, hx))


@pytest.mark.parametrize("ragged", [None, "packed", "lengths", "a list"])
@pytest.mark.parametrize("save", ["gates", "states"])
def test_another_default_device(backend, save, ragged):
    """torch.set_default_device is for whoever makes tensors without naming a device."""
    m = fastrnn.LSTM(I, H, 2, bidirectional=True, backend=backend, save=save)
    x, lengths = torch.randn(T, B, I), torch.randint(1, T + 1, (B,))
    resets = torch.rand(T, B) < 0.2 if backend != "native" else None

    def run():
        m.zero_grad()
        if ragged == "packed":
            y, _ = m(pack_padded_sequence(x, lengths, enforce_sorted=False), resets=resets)
            y = y.data
        else:
            y, _ = m(x, lengths={"lengths": lengths, "a list": lengths.tolist()}.get(ragged), resets=resets)
        y.pow(2).sum().backward()
        return [y.detach(), *[p.grad.clone() for p in m.parameters()]]

    want = run()
    with torch.device("meta"):
        got = run()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
