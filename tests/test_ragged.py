"""Batches of unequal lengths and with resets: PackedSequence, lengths= and resets= on every backend."""

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
    assert_equal,
    compare,
    error,
    gradients,
    inputs_of,
    leaves,
    pair,
    random_states,
    usable_backends,
)
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastrnn

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = {
    "mixed": [3, 7, 1, 6, 6],
    "zero rows": [0, 5, 0, 7, 2],
    "shorter than T": [2, 5, 1, 3, 4],
    "all equal": [7] * 5,
    "equal and short": [4] * 5,
    "all zero": [0] * 5,
}
MODES = [(1, False), (1, True), (3, True)]


def per_row(module, x, hx, lengths, resets=None):
    """The definition: each row, cut at its own length and at its resets, run alone by torch.nn, layer by layer."""
    directions = 2 if module.bidirectional else 1
    rows = [x[:n, b] for b, n in enumerate(lengths)]
    finals = [torch.zeros(a.shape, dtype=a.dtype).tolist() for a in leaves(hx)]
    for layer in range(module.num_layers):
        outputs = [[None] * directions for _ in rows]
        for d in range(directions):
            single = _one_direction(module, layer, d)
            index = layer * directions + d
            for b, row in enumerate(rows):
                state = [a[index, b] for a in leaves(hx)]
                cuts = [] if resets is None else [t for t in range(len(row)) if resets[t, b]]
                y, state = _run_pieces(single, row, state, cuts, d == 1)
                outputs[b][d] = y
                for k, a in enumerate(state):
                    finals[k][index][b] = a
        rows = [torch.cat(pieces, -1) for pieces in outputs]
    y = torch.stack([torch.cat((row, row.new_zeros(len(x) - len(row), row.shape[-1]))) for row in rows], 1)
    return y, *[torch.stack([torch.stack(list(s)) for s in f]) for f in finals]


def _one_direction(module, layer, d):
    """A function (row, state) -> (output, state) of torch.nn for one layer and direction, on the module's weights."""
    suffix = f"_l{layer}" + "_reverse" * d
    names = [n for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr") if hasattr(module, n + suffix)]
    features = getattr(module, "weight_ih" + suffix).shape[1]
    extra = {"nonlinearity": module.nonlinearity} if module.mode.startswith("RNN") else {}
    if module.mode == "LSTM":
        extra["proj_size"] = module.proj_size
    lone = type(module)(features, module.hidden_size, dtype=torch.float64, **extra)
    weights = {n + "_l0": getattr(module, n + suffix) for n in names}

    def run(row, state):
        hx = [a[None] for a in state]
        y, hx = torch.func.functional_call(lone, weights, (row, tuple(hx) if len(hx) > 1 else hx[0]))
        return y, [a[0] for a in leaves(hx)]

    return run


def _run_pieces(run, row, state, cuts, reverse):
    if not len(row):
        return row.new_zeros(0, state[0].shape[-1]), state
    bounds = [0, *[c for c in cuts if c > 0], len(row)]
    pieces = [row[a:b] for a, b in itertools.pairwise(bounds)]
    outputs = []
    clear = 0 in cuts and not reverse
    for piece in reversed(pieces) if reverse else pieces:
        if clear:
            state = [torch.zeros_like(a) for a in state]
        y, state = run(piece.flip(0) if reverse else piece, state)
        outputs.append(y.flip(0) if reverse else y)
        clear = True
    return torch.cat(outputs[::-1] if reverse else outputs), state


def check(label, theirs, ours, x, hx, row_lengths, cuts=None, **options):
    """Ours against the definition: outputs, final states and all gradients (fp64)."""
    got = leaves(ours(x, hx, **options))
    want = list(per_row(theirs, x, hx, row_lengths, cuts))
    for name, g, w in zip(("output", "h_n", "c_n"), got, want, strict=False):
        assert_equal(f"{label} {name}", g, w)
    live = [k for k, w in enumerate(want) if w.requires_grad]
    inputs = inputs_of(x, hx)
    named = {**inputs, **dict(theirs.named_parameters())}
    seeds = [torch.randn_like(want[k]) for k in live]
    expected = torch.autograd.grad([want[k] for k in live], list(named.values()), seeds, allow_unused=True)
    own = {**inputs, **dict(ours.named_parameters())}
    found = torch.autograd.grad([got[k] for k in live], list(own.values()), seeds, allow_unused=True)
    for name, g, w in zip(named, found, expected, strict=True):
        w = torch.zeros_like(own[name]) if w is None else w
        g = torch.zeros_like(own[name]) if g is None else g
        assert_equal(f"{label} gradient of {name}", g, w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(backend, kind, mode, lengths):
    layers, bidirectional = mode
    theirs, ours = pair(kind, I, H, layers, bidirectional=bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs)
    check(kind, theirs, ours, x, hx, lengths, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_lengths_of_any_integer_type(backend, dtype):
    _, ours = pair("lstm", I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    want = leaves(ours(x, lengths=[3, 7, 0, 6, 6]))
    got = leaves(ours(x, lengths=torch.tensor([3, 7, 0, 6, 6], dtype=dtype)))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_lengths_batch_first_and_unbatched(backend):
    _, ours = pair("gru", I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([3, 7, 0, 6, 5])
    y, h = ours(x, lengths=lengths)
    ours.batch_first = True
    y1, h1 = ours(x.transpose(0, 1), lengths=lengths)
    assert_equal("output", y1.transpose(0, 1), y)
    assert_equal("h_n", h1, h)
    y2, h2 = ours(x[:, 3], lengths=lengths[3])
    assert_equal("unbatched output", y2, y[:, 3])
    assert_equal("unbatched h_n", h2, h[:, 3])


def test_what_lies_beyond_a_row_is_never_read(backend):
    _, ours = pair("lstm", I, H, 2, bidirectional=True)
    lengths = torch.tensor(LENGTHS["mixed"])
    x = torch.randn(T, B, I, dtype=torch.float64)
    beyond = torch.arange(T)[:, None] >= lengths
    poisoned = x.masked_fill(beyond[..., None], float("nan"))
    for got, want in zip(leaves(ours(poisoned, lengths=lengths)), leaves(ours(x, lengths=lengths)), strict=True):
        assert_equal("with NaN beyond the lengths", got, want)
    assert not ours(x, lengths=lengths)[0][beyond].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("is_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given_hx", [True, False], ids=["hx", "nohx"])
def test_packed_sequence(backend, kind, mode, is_sorted, given_hx):
    layers, bidirectional = mode
    theirs, ours = pair(kind, I, H, layers, bidirectional=bidirectional)
    lengths = sorted(LENGTHS["mixed"], reverse=True) if is_sorted else LENGTHS["mixed"]
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs) if given_hx else None

    def packed(module):
        return module(pack_padded_sequence(x, lengths, enforce_sorted=is_sorted), hx)

    compare(kind, ours, theirs, lambda: packed(ours), lambda: packed(theirs), inputs_of(x, hx))
    got, want = packed(ours)[0], packed(theirs)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(got, field), getattr(want, field)
        assert (a is None and b is None) or torch.equal(a, b), field
    assert pad_packed_sequence(got)[1].tolist() == lengths


def test_packed_rows_of_one_length(backend):
    theirs, ours = pair("gru", I, H, 2, bidirectional=True)
    rows = [torch.randn(T, I, dtype=torch.float64) for _ in range(B)]
    for got, want in zip(leaves(ours(pack_sequence(rows))), leaves(theirs(pack_sequence(rows))), strict=True):
        assert_equal("equal rows", got, want)


def test_packed_equals_lengths(backend):
    _, ours = pair("lstm", I, H, 2, bidirectional=True)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), LENGTHS["mixed"]
    packed, hx = ours(pack_padded_sequence(x, lengths, enforce_sorted=False))
    y, hx2 = ours(x, lengths=lengths)
    assert_equal("output", pad_packed_sequence(packed, total_length=T)[0], y)
    for a, b in zip(hx, hx2, strict=True):
        assert_equal("states", a, b)


def random_resets(p=0.3):
    resets = torch.rand(T, B) < p
    resets[0, 0], resets[1, 1], resets[T - 1, 3] = True, True, True
    resets[:, 4] = True
    return resets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("lengths", [None, *LENGTHS.values()], ids=["full", *LENGTHS])
def test_resets(resets_backend, kind, mode, lengths):
    layers, bidirectional = mode
    theirs, ours = pair(kind, I, H, layers, bidirectional=bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx, resets = random_states(theirs), random_resets()
    options = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    check(kind, theirs, ours, x, hx, lengths or [T] * B, resets, resets=resets, **options)


def test_resets_batch_first_unbatched_and_packed(resets_backend):
    _, ours = pair("lstm", I, H, 2, bidirectional=True)
    x, resets, lengths = torch.randn(T, B, I, dtype=torch.float64), random_resets(), LENGTHS["mixed"]
    hx = random_states(ours)
    y, (h, c) = ours(x, hx, resets=resets, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    out, (h1, c1) = ours(packed, hx, resets=resets)
    assert_equal("packed output", pad_packed_sequence(out, total_length=T)[0], y)
    assert_equal("packed h_n", h1, h)
    assert_equal("packed c_n", c1, c)
    full, (h, _) = ours(x, hx, resets=resets)
    out, (h1, _) = ours(x[:, 2], tuple(a[:, 2] for a in hx), resets=resets[:, 2])
    assert_equal("unbatched output", out, full[:, 2])
    assert_equal("unbatched h_n", h1, h[:, 2])
    ours.batch_first = True
    out, (h1, _) = ours(x.transpose(0, 1), hx, resets=resets.t())
    assert_equal("batch_first output", out.transpose(0, 1), full)
    assert_equal("batch_first h_n", h1, h)


def test_no_reset_changes_nothing(resets_backend):
    _, ours = pair("gru", I, H, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for a, b in zip(leaves(ours(x, resets=torch.zeros(T, B, dtype=torch.bool))), leaves(ours(x)), strict=True):
        assert_equal("all false", a, b)


def test_single_precision_gradients_with_lengths(backend):
    truth, ours = pair("lstm", I, H, 2, bidirectional=True, dtype=torch.float32)
    exact, _ = pair("lstm", I, H, 2, bidirectional=True)
    exact.load_state_dict(truth.state_dict())
    x, lengths = torch.randn(T, B, I, requires_grad=True), LENGTHS["zero rows"]
    outputs = leaves(ours(x, lengths=lengths))
    x64 = x.detach().double().requires_grad_()
    hx = tuple(torch.zeros(4, B, H, dtype=torch.float64) for _ in range(2))
    want = list(per_row(exact, x64, hx, lengths))
    for name, g, w in zip(("output", "h_n", "c_n"), outputs, want, strict=True):
        assert error(g, w) < 2e-6, name
    expected = gradients(exact, {"input": x64}, want)
    for name, g in gradients(ours, {"input": x}, outputs).items():
        assert error(g, expected[name]) < 5e-6, name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(KINDS)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9), st.integers(2, 20)),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    with_resets=st.booleans(),
)
def test_random_ragged_batches(data, kind, sizes, layers, bidirectional, with_resets):
    steps, batch, features, hidden = sizes
    extra = {"proj_size": hidden // 2} if kind == "lstm_proj" else {}
    theirs, ours = pair(kind, features, hidden, layers, bidirectional=bidirectional, **extra)
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    resets = torch.rand(steps, batch) < 0.3 if with_resets else None
    x = torch.randn(steps, batch, features, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs, batch)
    name = data.draw(st.sampled_from(usable_backends(ragged=True, resets=with_resets)))
    options = {"lengths": lengths} if resets is None else {"lengths": lengths, "resets": resets}
    with fastrnn.backend(name):
        check(f"{name} {kind}", theirs, ours, x, hx, lengths, resets, **options)
