"""Wrong arguments: the exception type of torch.nn for the same mistake, and a message that says what is wrong."""

import re

import pytest
import torch
from support import B, H, I, T, usable_backends
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional

LAYERS = ("RNN", "LSTM", "GRU")


def wrap(name, *states):
    """hx in the form that the class takes, from one tensor or two."""
    return (states[0], states[-1]) if name.startswith("LSTM") else states[0]


def sequence(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


X, H0 = sequence(T, B, I), sequence(1, B, H)
FALLING = [7, 5, 4, 2, 1]  # with equal lengths torch.nn.LSTM reads past the end of wrong ones and says nothing

# what: (call of a layer, what the message must contain)
CALLS = {
    "rank 4": (lambda m, n: m(sequence(1, T, B, I)), ["input", "dimensions", (1, T, B, I)]),
    "rank 1": (lambda m, n: m(sequence(I)), ["input", "dimensions", (I,)]),
    "no tensor": (lambda m, n: m([1.0]), ["input", "Tensor", "list"]),
    "no input": (lambda m, n: m(None), ["input", "Tensor", "NoneType"]),
    "features": (lambda m, n: m(sequence(T, B, I + 1)), ["input", I, I + 1]),
    "packed features": (lambda m, n: m(pack_padded_sequence(sequence(T, B, I + 1), FALLING)), ["input", I, I + 1]),
    "fp64 input": (lambda m, n: m(X.double()), ["input", torch.float32, torch.float64]),
    "integer input": (lambda m, n: m(X.long()), ["input", torch.float32, torch.int64]),
    "input elsewhere": (lambda m, n: m(X.to("meta")), ["input", "cpu", "meta"]),
    "hx batch": (lambda m, n: m(X, wrap(n, sequence(1, B + 1, H))), ["hx", (1, B, H), (1, B + 1, H)]),
    "hx layers": (lambda m, n: m(X, wrap(n, sequence(2, B, H))), ["hx", (1, B, H), (2, B, H)]),
    "hx size": (lambda m, n: m(X, wrap(n, sequence(1, B, H + 1))), ["hx", (1, B, H), (1, B, H + 1)]),
    "hx rank": (lambda m, n: m(X, wrap(n, sequence(B, H))), ["hx", "3 dimensions", (B, H)]),
    "hx rank, unbatched": (lambda m, n: m(X[:, 0], wrap(n, H0)), ["hx", "2 dimensions", (1, B, H)]),
    "hx dtype": (lambda m, n: m(X, wrap(n, H0.double())), ["hx", torch.float32, torch.float64]),
    "hx elsewhere": (lambda m, n: m(X, wrap(n, H0.to("meta"))), ["hx", "cpu", "meta"]),
    "hx of None": (lambda m, n: m(X, (None, None)), ["hx", "Tensor"]),
    "sparse": (lambda m, n: m(X.to_sparse()), ["input", "dense", torch.sparse_coo]),
    "packed hx": (
        lambda m, n: m(pack_padded_sequence(X, FALLING), wrap(n, sequence(1, B + 1, H))),
        ["hx", (1, B, H), (1, B + 1, H)],
    ),
}
LSTM_CALLS = {
    "tuple missing": (lambda m, n: m(X, H0), ["hx", "tuple", (1, B, H)]),
    "three states": (lambda m, n: m(X, (H0, H0, H0)), ["hx", "tuple", 3]),
    "one state": (lambda m, n: m(X, (H0,)), ["hx", "tuple", 1]),
    "c batch": (lambda m, n: m(X, (H0, sequence(1, B + 1, H))), ["cx", (1, B, H), (1, B + 1, H)]),
    "c rank": (lambda m, n: m(X, (H0, sequence(B, H))), ["cx", "3 dimensions", (B, H)]),
    "c of None": (lambda m, n: m(X, (H0, None)), ["cx", "Tensor", "NoneType"]),
    "c dtype": (lambda m, n: m(X, (H0, H0.double())), ["cx", torch.float32, torch.float64]),
}
OTHER_CALLS = {"tuple too many": (lambda m, n: m(X, (H0, H0)), ["hx", "Tensor", "tuple"])}

X1, H1 = sequence(B, I), sequence(B, H)
CELL_CALLS = {
    "rank 3": (lambda m, n: m(X), ["input", "dimensions", (T, B, I)]),
    "no input": (lambda m, n: m(None), ["input", "Tensor", "NoneType"]),
    "features": (lambda m, n: m(sequence(B, I + 1)), ["input", I, I + 1]),
    "fp64 input": (lambda m, n: m(X1.double()), ["input", torch.float32, torch.float64]),
    "input elsewhere": (lambda m, n: m(X1.to("meta")), ["input", "cpu", "meta"]),
    "hx batch": (lambda m, n: m(X1, wrap(n, sequence(B + 1, H))), ["hx", (B, H), (B + 1, H)]),
    "hx size": (lambda m, n: m(X1, wrap(n, sequence(B, H + 1))), ["hx", (B, H), (B, H + 1)]),
    "hx rank": (lambda m, n: m(X1, wrap(n, H0)), ["hx", "dimensions", (1, B, H)]),
    "hx dtype": (lambda m, n: m(X1, wrap(n, H1.double())), ["hx", torch.float32, torch.float64]),
    "hx unbatched": (lambda m, n: m(X1, wrap(n, sequence(H))), ["hx", (B, H), (H,)]),
    "hx batched": (lambda m, n: m(X1[0], wrap(n, H1)), ["hx", (H,), (B, H)]),
}
LSTM_CELL_CALLS = {
    "tuple missing": (lambda m, n: m(X1, H1), ["hx", "tuple", (B, H)]),
    "three states": (lambda m, n: m(X1, (H1, H1, H1)), ["hx", "tuple", 3]),
    "one state": (lambda m, n: m(X1, (H1,)), ["hx", "tuple", 1]),
    "c of None": (lambda m, n: m(X1, (H1, None)), ["cx", "Tensor", "NoneType"]),
}
OTHER_CELL_CALLS = {"tuple too many": (lambda m, n: m(X1, (H1, H1)), ["hx", "Tensor", "tuple"])}


def table():
    for name in LAYERS:
        for what, case in {**CALLS, **(LSTM_CALLS if name == "LSTM" else OTHER_CALLS)}.items():
            yield pytest.param(name, *case, id=f"{name}-{what}")
        cell = name + "Cell"
        for what, case in {**CELL_CALLS, **(LSTM_CELL_CALLS if name == "LSTM" else OTHER_CELL_CALLS)}.items():
            yield pytest.param(cell, *case, id=f"{cell}-{what}")


@pytest.mark.parametrize(("name", "call", "words"), list(table()))
def test_calls(backend, name, call, words):
    with pytest.raises(Exception) as theirs:  # noqa: PT011  any: its type is what we compare with
        call(getattr(nn, name)(I, H), name)
    with pytest.raises(theirs.type) as ours:
        call(getattr(fastrnn, name)(I, H), name)
    assert ours.type is theirs.type
    for word in words:
        assert str(word) in str(ours.value), f"{word} is missing in: {ours.value}"


CONSTRUCTORS = {
    "input_size negative": (LAYERS, (-1, H), {}, ["input_size", -1]),
    "input_size zero": (LAYERS, (0, H), {}, ["input_size", 0]),
    "hidden_size negative": (LAYERS, (I, -H), {}, ["hidden_size", -H]),
    "num_layers": (LAYERS, (I, H, 0), {}, ["num_layers", 0]),
    "input_size float": (LAYERS, (4.0, H), {}, ["input_size", "int", "float"]),
    "hidden_size float": (LAYERS, (I, 4.0), {}, ["hidden_size", "int", "float"]),
    "bias": (LAYERS, (I, H), {"bias": 1}, ["bias", "bool", "int"]),
    "batch_first": (LAYERS, (I, H), {"batch_first": 1}, ["batch_first", "bool", "int"]),
    "dropout": (LAYERS, (I, H, 2), {"dropout": 1.5}, ["dropout", "[0, 1]"]),
    "dropout bool": (LAYERS, (I, H, 2), {"dropout": True}, ["dropout", "number"]),
    "proj_size equal": (("LSTM",), (I, H), {"proj_size": H}, ["proj_size", H - 1, H]),
    "proj_size negative": (("LSTM",), (I, H), {"proj_size": -1}, ["proj_size", -1]),
    "proj_size elsewhere": (("RNN", "GRU"), (I, H), {"proj_size": 3}, ["proj_size", "LSTM"]),
    "nonlinearity": (("RNN",), (I, H), {"nonlinearity": "sin"}, ["nonlinearity", "tanh", "sin"]),
    "unknown keyword": (LAYERS, (I, H), {"foo": 1}, ["foo"]),
    "hidden_size missing": (LAYERS, (I,), {}, ["hidden_size"]),
    "cell input_size": (("RNNCell", "LSTMCell", "GRUCell"), (-1, H), {}, ["input_size", -1]),
    "cell hidden_size": (("RNNCell", "LSTMCell", "GRUCell"), (I, -1), {}, ["hidden_size", -1]),
}


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "words"),
    [pytest.param(n, a, k, w, id=f"{n}-{what}") for what, (names, a, k, w) in CONSTRUCTORS.items() for n in names],
)
def test_constructors(name, args, kwargs, words):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(nn, name)(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(fastrnn, name)(*args, **kwargs)
    assert ours.type is theirs.type
    for word in words:
        assert str(word) in str(ours.value), f"{word} is missing in: {ours.value}"


def test_cell_nonlinearity_is_found_at_the_call():
    for library in (nn, fastrnn):
        with pytest.raises(RuntimeError, match="sin"):
            library.RNNCell(I, H, nonlinearity="sin")(X1)


# what torch.nn does not have: lengths, resets, backend
EXTRA = {
    "float lengths": ({"lengths": torch.ones(B)}, TypeError, ["lengths", "integer", torch.float32]),
    "list of floats": ({"lengths": [1.5] * B}, TypeError, ["lengths", "integer", "float"]),
    "lengths of text": ({"lengths": "abc"}, TypeError, ["lengths", "list of ints", "'abc'"]),
    "lengths of lists": ({"lengths": [[1], [2, 3]]}, TypeError, ["lengths", "list of ints", "[[1], [2, 3]]"]),
    "bool lengths": ({"lengths": torch.ones(B, dtype=torch.bool)}, TypeError, ["lengths", "integer", torch.bool]),
    "too many lengths": ({"lengths": [1] * (B + 1)}, ValueError, ["lengths", (B,), (B + 1,)]),
    "lengths of rank 2": ({"lengths": torch.ones(B, 1).long()}, ValueError, ["lengths", (B,), (B, 1)]),
    "length > T": ({"lengths": [T + 1] + [1] * (B - 1)}, ValueError, ["lengths", T, T + 1]),
    "negative length": ({"lengths": [-1] + [1] * (B - 1)}, ValueError, ["lengths", "from 0", -1]),
    "resets shape": ({"resets": torch.zeros(B, T).bool()}, ValueError, ["resets", (T, B), (B, T)]),
    "resets dtype": ({"resets": torch.zeros(T, B)}, TypeError, ["resets", torch.bool, torch.float32]),
    "resets type": ({"resets": [True] * T}, TypeError, ["resets", "Tensor", "list"]),
    "resets elsewhere": ({"resets": torch.zeros(T, B, device="meta").bool()}, RuntimeError, ["resets", "cpu", "meta"]),
}


@pytest.mark.parametrize(("options", "kind", "words"), EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_and_resets(name, options, kind, words):
    with pytest.raises(kind) as raised:
        getattr(fastrnn, name)(I, H)(X, **options)
    for word in words:
        assert str(word) in str(raised.value), f"{word} is missing in: {raised.value}"


def test_no_lengths_for_no_rows():
    assert fastrnn.GRU(I, H)(X[:, :0], lengths=[])[0].shape == (T, 0, H)


def test_replace_takes_modules():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        fastrnn.replace(3)


def test_lengths_with_a_packed_sequence():
    with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
        fastrnn.GRU(I, H)(pack_padded_sequence(X, [T] * B), lengths=[T] * B)


def test_unknown_backend():
    for attempt in (
        lambda: fastrnn.LSTM(I, H, backend="fpga"),
        lambda: fastrnn.LSTMCell(I, H, backend="fpga"),
        lambda: fastrnn.backend("fpga").__enter__(),
        lambda: fastrnn.replace(nn.LSTM(I, H), backend="fpga"),
        lambda: functional.gru(X, None, [fastrnn.GRU(I, H)._weights()[0]], backend="fpga"),
    ):
        with pytest.raises(ValueError, match=re.escape("backend: expected one of auto")) as raised:
            attempt()
        assert "'fpga'" in str(raised.value)


def test_functional_weights():
    w = fastrnn.GRU(I, H, 2)._weights()
    bad = {
        "multiple of 2": lambda: functional.gru(X, None, w[:1], bidirectional=True),
        r"w_ih of layer 1, direction 0: expected shape \(57, 19\), got \(57, 11\)": lambda: functional.gru(
            X, None, [w[0], w[0]]
        ),
        r"w_hh of a lstm has shape \(4\*H, H\), got \(57, 19\)": lambda: functional.lstm(X, None, w),
        "b_ih of layer 0, direction 0: expected torch.float32 on cpu, got torch.float64": lambda: functional.gru(
            X, None, [w[0]._replace(b_ih=w[0].b_ih.double())]
        ),
        r"b_hh of layer 0, direction 0: expected shape \(57,\), got None": lambda: functional.gru(
            X, None, [w[0]._replace(b_hh=None)]
        ),
        "nonlinearity: expected 'tanh' or 'relu', got 'sin'": lambda: functional.rnn(X, None, w, nonlinearity="sin"),
        "dropout: expected a probability, got 2": lambda: functional.gru(X, None, w, dropout=2),
    }
    for message, call in bad.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


def test_weights_that_changed_shape_are_refused(backend):
    module = fastrnn.LSTM(I, H)
    module.weight_hh_l0.data = torch.zeros(4 * H, H - 1)
    with pytest.raises(RuntimeError, match="weights: w_hh"):
        module(X)
    module = fastrnn.LSTM(I, H)
    module.bias_hh_l0.data = torch.zeros(4 * H - 1)
    with pytest.raises(RuntimeError, match="b_hh of layer 0"):
        module(X)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(0, B, I), (T, 0, I), (0, 0, I)], ids=str)
@pytest.mark.parametrize("extra", [{}, {"lengths": "zeros"}, {"resets": "zeros"}], ids=["plain", "lengths", "resets"])
def test_empty_input_gives_empty_results(backend, name, shape, extra):
    """Where torch.nn raises on T = 0 for no good reason."""
    module = getattr(fastrnn, name)(I, H, 2, bidirectional=True)
    steps, batch, _ = shape
    options = {}
    if "lengths" in extra:
        options["lengths"] = torch.zeros(batch, dtype=torch.long)
    if "resets" in extra:
        options["resets"] = torch.zeros(steps, batch, dtype=torch.bool)
    h = torch.randn(4, batch, H)
    x = torch.zeros(shape, requires_grad=True)
    y, states = module(x, wrap(name, h, h + 1), **options)
    assert y.shape == (steps, batch, 2 * H)
    for k, state in enumerate(states if name == "LSTM" else [states]):
        assert torch.equal(state, h + k)
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(not p.grad.any() for p in module.parameters())
    with torch.no_grad():
        assert module(x)[0].shape == (steps, batch, 2 * H)
    if name == "LSTM" and batch:
        cell = fastrnn.LSTMCell(I, H)
        assert cell(torch.zeros(0, I))[0].shape == (0, H)


@pytest.mark.skipif("cpu" not in usable_backends(), reason="the engine is not built")
@pytest.mark.parametrize("name", ["input", "weight_hh_l0", "bias_ih_l0"])
def test_memory_given_back(name):
    """As FSDP does with parameters that are not in use; torch.nn's kernels read there all the same."""
    m, x = fastrnn.LSTM(I, H, backend="cpu"), torch.randn(T, B, I)
    (x if name == "input" else getattr(m, name).detach()).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory"):
        m(x)
