"""save="states": the gates are made anew in backward. return_states=True: h and c at every step."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, assert_equal, leaves, random_states, usable_backends
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.cells import CELLS

D = torch.float64
T, B, I, H, P = 7, 5, 4, 9, 3  # noqa: E741
ENGINES = [name for name in usable_backends() if not BACKENDS[name].differentiable]
WITH_STATES = usable_backends(resets=True)


def build(kind, dtype=D, **options):
    name, extra = KINDS[kind]
    torch.manual_seed(1)
    extra = {"proj_size": P} if "proj_size" in extra else extra
    return getattr(fastrnn, name)(I, H, dtype=dtype, **extra, **options)


def forms(dtype):
    """A name, an input and keywords for each form of a batch."""
    x, lengths = torch.randn(T, B, I, dtype=dtype), torch.tensor([3, 7, 0, 1, 7])
    resets = torch.rand(T, B) < 0.3
    packed = pack_padded_sequence(x, lengths + 1 - (lengths > 6).long(), enforce_sorted=False)
    yield "plain", x, {}
    yield "lengths", x, {"lengths": lengths}
    yield "no tokens", x, {"lengths": torch.zeros(B, dtype=torch.int64)}
    yield "packed", packed, {}
    yield "resets", x, {"resets": resets}
    yield "lengths and resets", x, {"resets": resets, "lengths": lengths}
    yield "packed and resets", packed, {"resets": resets[:]}
    yield "unbatched", x[:, 0], {}
    yield "one step", x[:1], {}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_save_gates(name, kind, options, dtype):
    for form, given, keywords in forms(dtype):
        steps = given.batch_sizes.numel() if form.startswith("packed") else given.shape[0]
        if form == "packed and resets":
            keywords = {"resets": keywords["resets"][:steps]}
        found = []
        for save in ("gates", "states"):
            module = build(kind, dtype, save=save, backend=name, **options)
            torch.manual_seed(2)
            hx = random_states(module, None if form == "unbatched" else B, dtype)
            data = (given.data if form.startswith("packed") else given).clone().requires_grad_()
            own = given._replace(data=data) if form.startswith("packed") else data
            outs = leaves(module(own, hx, **keywords))
            seeds = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype) for o in outs]
            wanted = [data, *leaves(hx), *module.parameters()]
            grads = torch.autograd.grad(outs, wanted, seeds, allow_unused=True)
            found.append(
                [*outs, *[torch.zeros_like(a) if g is None else g for a, g in zip(wanted, grads, strict=True)]]
            )
        limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype)
        for k, (gates, states) in enumerate(zip(*found, strict=True)):
            assert_equal(f"{form}, {k}", states, gates, limit)


def saved_bytes(module, *arguments, **keywords):
    """Of what is kept for backward beside the module's parameters and the input, each memory counted once."""
    seen = {}

    def pack(a):
        seen[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        out = module(*arguments, **keywords)
    for a in (*module.parameters(), *leaves(list(arguments))):
        seen.pop(a.untyped_storage().data_ptr(), None)
    return sum(seen.values()), out


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_saved(name, kind):
    """y, and per row and unit: the second state, and with "gates" the tape and what a projection is applied to."""
    cell = CELLS[KINDS[kind][0].lower() if KINDS[kind][0] != "RNN" else kind]
    projected = kind.endswith("proj")
    size, rows = 8, T * B
    for bidirectional in (False, True):
        streams = 1 + bidirectional
        y = rows * streams * (P if projected else H)
        state = rows * streams * H * (cell.states > 1)
        tape = rows * streams * H * (cell.tape + projected)
        x = torch.randn(T, B, I, dtype=D)
        for save, want in (("gates", y + state + tape), ("states", y + state)):
            module = build(kind, save=save, backend=name, bidirectional=bidirectional)
            found, _out = saved_bytes(module, x)
            assert found == size * want, (kind, save, found, size * want)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_checkpoint_compile_and_vmap(name, kind):
    x = torch.randn(3, T, B, I, dtype=D)
    found = []
    for save in ("gates", "states"):
        module = build(kind, save=save, backend=name)
        p = {key: a.detach() for key, a in module.named_parameters()}
        each = vmap(grad(lambda q, a, m=module: functional_call(m, q, (a,))[0].square().sum()), (None, 0))(p, x)
        again = checkpoint(lambda a, m=module: m(a)[0], x[0], use_reentrant=False).square().sum()
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x[0])[0].square().sum()
        grads = [torch.autograd.grad(v, list(module.parameters())) for v in (again, compiled)]
        found.append([*each.values(), *grads[0], *grads[1]])
    for gates, states in zip(*found, strict=True):
        assert_equal(kind, states, gates)


def test_bad_save():
    for bad in ("tape", "", None, True):
        with pytest.raises(ValueError, match="save: expected 'gates' or 'states'"):
            fastrnn.LSTM(I, H, save=bad)
    assert "save='states'" in repr(fastrnn.GRU(I, H, save="states"))
    w = fastrnn.LSTM(I, H)._weights()
    with pytest.raises(ValueError, match="save: expected 'gates' or 'states'"):
        fastrnn.functional.lstm(torch.randn(T, B, I), None, w, save="x")


def step_by_step(module, x, hx, lengths):
    """(h, c) of one layer and direction at all steps, by the cell of the same weights: each (T, B, H)."""
    cell = getattr(fastrnn, type(module).__name__ + "Cell")(I, H, dtype=D, **_nonlinearity(module))
    weights = {name: getattr(module, name + "_l0") for name, _ in cell.named_parameters()}
    state, rows = hx, []
    for t in range(x.shape[0]):
        new = functional_call(cell, weights, (x[t], state))
        live = (t < lengths)[:, None]
        both = [torch.where(live, a, b) for a, b in zip(leaves(new), leaves(state), strict=True)]
        state = tuple(both) if len(both) > 1 else both[0]
        rows.append([torch.where(live, a, 0.0) for a in leaves(new)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _nonlinearity(module):
    return {"nonlinearity": module.nonlinearity} if isinstance(module, fastrnn.RNN) else {}


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("proj")])
@pytest.mark.parametrize("name", WITH_STATES)
def test_all_states_are_those_of_the_cells(name, kind, ragged, save):
    module = build(kind, backend=name, save=save)
    x = torch.randn(T, B, I, dtype=D, requires_grad=True)
    hx = tuple(torch.randn(B, H, dtype=D, requires_grad=True) for _ in range(1 + (kind == "lstm")))
    lengths = torch.tensor([3, 7, 0, 1, 7]) if ragged else torch.full((B,), T)
    lead = tuple(a[None] for a in hx)
    y, _, states = module(x, lead if len(hx) > 1 else lead[0], lengths=lengths if ragged else None, return_states=True)
    assert len(states) == len(hx)
    assert torch.equal(states[0][0], y)
    want = step_by_step(module, x, hx if len(hx) > 1 else hx[0], lengths)
    wanted, found = [x, *hx, *module.parameters()], []
    for label, got, w in zip("hc", states, want, strict=False):
        assert_equal(label, got[0], w)
    seeds = [torch.randn_like(w) for w in want]
    for outs in (want, [a[0] for a in states]):
        found.append(torch.autograd.grad(outs, wanted, seeds, retain_graph=True))
    for k, (w, got) in enumerate(zip(*found, strict=True)):
        assert_equal(f"gradient {k}", got, w)
    if kind == "lstm":  # through c alone
        for outs in (want[1], states[1][0]):
            found.append(torch.autograd.grad(outs, wanted, seeds[1], retain_graph=True, allow_unused=True))
        for k, (w, got) in enumerate(zip(*found[2:], strict=True)):
            assert_equal(f"gradient {k} through c", got, w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_STATES)
def test_the_forms_of_all_states(name, kind):
    """(L, T, B, S*H), in the layout of the input; the two directions and the layers as torch.nn orders them."""
    module = build(kind, backend=name, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, B, I, dtype=D), torch.tensor([3, 7, 2, 1, 7])
    y, hx, states = module(x, return_states=True)
    h, c = states[0], states[-1]
    out = P if kind.endswith("proj") else H
    assert h.shape == (2, T, B, 2 * out)
    assert len(states) == 1 + ("lstm" in kind)
    last = [
        s[k, -1 if d == 0 else 0, :, d * (s.shape[-1] // 2) :][:, : s.shape[-1] // 2]
        for s in states
        for k in (0, 1)
        for d in (0, 1)
    ]
    for k, (a, f) in enumerate(zip(last, [f for s in leaves(hx) for f in s], strict=True)):
        assert_equal(f"final state {k}", a, f)
    first = build(kind, backend=name, num_layers=2, bidirectional=True, batch_first=True)
    for a, b in zip(states, first(x.transpose(0, 1), return_states=True)[2], strict=True):
        assert torch.equal(b, a.transpose(1, 2))
    for a, b in zip(states, module(x[:, 1], return_states=True)[2], strict=True):
        assert_equal("unbatched", b, a[:, :, 1])
    ragged = module(x, lengths=lengths, return_states=True)[2]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    rows = module(packed, return_states=True)[2]
    for a, b in zip(ragged, rows, strict=True):
        beyond = torch.arange(T)[:, None] >= lengths
        assert not a[:, beyond].any()
        for k in range(2):
            want = pack_padded_sequence(a[k], lengths, enforce_sorted=False).data
            assert_equal("packed", b[k], want)
    assert torch.equal(h[-1], y)
    assert c.shape[-1] == 2 * H or "lstm" not in kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, B, I), (T, 0, I)], ids=["T=0", "B=0"])
def test_nothing_to_run(backend, kind, shape):
    y, _, states = build(kind, num_layers=2)(torch.randn(shape, dtype=D), return_states=True)
    assert torch.equal(states[0][1], y)
    assert [a.shape[:-1] for a in states] == [(2, *shape[:2])] * (1 + ("lstm" in kind))


def test_native_says_why_not():
    module = fastrnn.LSTM(I, H, backend="native")
    with pytest.raises(RuntimeError, match=r"native.*returns the last of c only"):
        module(torch.randn(T, B, I), return_states=True)
    y, _, (h,) = fastrnn.GRU(I, H, backend="native")(torch.randn(T, B, I), return_states=True)
    assert torch.equal(h[0], y)
