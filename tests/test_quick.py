"""The short way through the engine gives the bits of the usual way, and is taken when it should be, only then."""

import copy
import threading
import time

import pytest
import torch
from support import B, H, I, T
from torch import nn

import fastrnn
from fastrnn import quick
from fastrnn.backends.cpu import load

pytestmark = pytest.mark.skipif(
    load()[0] is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="needs the engine, and a torch that tells where tensors lie",
)
LAYERS = [("LSTM", {}), ("LSTM", {"proj_size": 3}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def ways(monkeypatch):
    """What each call's short way answered, and a switch that closes it."""
    answers, run = [], quick._start()

    def spy(*arguments):
        answers.append(run(*arguments))
        return answers[-1]

    def close(closed=True):
        monkeypatch.setattr(quick, "_start", lambda: None if closed else spy)

    close(False)
    return answers, close


def leaves(result):
    return torch.utils._pytree.tree_leaves(result)


def states_of(module, rows, dtype, batch=B):
    h = torch.randn(rows, batch, getattr(module, "proj_size", 0) or H, dtype=dtype)
    return (h, torch.randn(rows, batch, H, dtype=dtype)) if module.mode == "LSTM" else h


def assert_same_both_ways(ways, run):
    """`run` on the short way and on the usual one: the same bits."""
    answers, close = ways
    got = run()
    assert answers, "the short way was not asked"
    assert answers[-1] is not None, "the short way was not taken"
    close()
    want = run()
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), k
        assert torch.equal(a, b), f"tensor {k} differs by {float((a - b).abs().max()):.1e}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_inference_of_a_layer(ways, name, options, bias, bidirectional, dtype):
    m = getattr(fastrnn, name)(I, H, bias=bias, bidirectional=bidirectional, dtype=dtype, **options)
    x, hx = torch.randn(T, B, I, dtype=dtype), states_of(m, 1 + bidirectional, dtype)
    with torch.no_grad():
        assert_same_both_ways(ways, lambda: leaves(m(x)) + leaves(m(x, hx)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "options"), [c for c in LAYERS if "proj_size" not in c[1]])
@pytest.mark.parametrize("steps", [1, T])
def test_training_of_a_layer(ways, name, options, bidirectional, dtype, steps):
    m = getattr(fastrnn, name)(I, H, bidirectional=bidirectional, dtype=dtype, **options)
    x, hx = torch.randn(steps, B, I, dtype=dtype), states_of(m, 1 + bidirectional, dtype)

    def run():
        inputs = [a.clone().requires_grad_() for a in (x, *leaves(hx))]
        outs = leaves(m(inputs[0], tuple(inputs[1:]) if len(inputs) > 2 else inputs[1]))
        loss = sum((a * (k + 1)).pow(2).sum() for k, a in enumerate(outs))
        return [a.detach() for a in outs] + list(torch.autograd.grad(loss, inputs + list(m.parameters())))

    assert_same_both_ways(ways, run)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells(ways, name, bias, given, dtype):
    m = getattr(fastrnn, name)(I, H, bias=bias, dtype=dtype)
    x, h, c = torch.randn(B, I, dtype=dtype), torch.randn(B, H, dtype=dtype), torch.randn(B, H, dtype=dtype)

    def run():
        inputs = [a.clone().requires_grad_() for a in (x, h, c)][: 3 if name == "LSTMCell" else 2]
        hx = (tuple(inputs[1:]) if name == "LSTMCell" else inputs[1]) if given else None
        outs = leaves(m(inputs[0], hx))
        wanted = (inputs if given else inputs[:1]) + list(m.parameters())
        with torch.no_grad():
            plain = leaves(m(x, hx))
        return [a.detach() for a in outs] + plain + list(torch.autograd.grad(sum(a.pow(2).sum() for a in outs), wanted))

    assert_same_both_ways(ways, run)


def test_frozen_parameters_are_not_recorded(ways):
    m = fastrnn.LSTM(I, H).requires_grad_(False)
    y, _ = m(torch.randn(T, B, I))
    assert ways[0][-1] is not None
    assert not y.requires_grad
    y, _ = m(torch.randn(T, B, I, requires_grad=True))
    assert ways[0][-1] is not None
    assert y.requires_grad


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", *CELLS])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_short_way_is_the_choice_that_is_explained(ways, name, grad, frozen):
    m = getattr(fastrnn, name)(I, H).requires_grad_(not frozen)
    x = X[0] if name in CELLS else X
    with torch.set_grad_enabled(grad):
        chosen = fastrnn.explain(m, x).backend.name
        m(x)
    ran_here = ways[0][-1][0] is not None
    assert ran_here == (chosen == "cpu")


def test_one_step_with_batch_first(ways):
    m = fastrnn.GRU(I, H, batch_first=True)
    with torch.no_grad():
        assert_same_both_ways(ways, lambda: leaves(m(torch.ones(1, 1, I))))


def transposed(m):
    m.weight_hh_l0.data = m.weight_hh_l0.data.t().contiguous().t()


def normed(m):
    nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")


def native(m):
    m.backend = "native"


CHANGES = {
    "a weight that is not contiguous": transposed,
    "a parametrized weight": normed,
    "another backend": native,
    "states saved, not gates": lambda m: setattr(m, "save", "states"),
    "two layers": lambda m: m.__init__(I, H, 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unusual_modules_go_the_usual_way(ways, change):
    m = fastrnn.LSTM(I, H)
    change(m)
    x = torch.randn(T, B, I)
    plain = copy.deepcopy(m)
    got = m(x)
    assert not ways[0] or ways[0][-1] is None
    with fastrnn.backend("reference"):
        for a, b in zip(leaves(got), leaves(plain(x)), strict=True):
            torch.testing.assert_close(a, b)


X = torch.randn(T, B, I)
INPUTS = {
    "not contiguous": lambda m: m(X.transpose(0, 1).contiguous().transpose(0, 1)),
    "negated lazily": lambda m: m(torch._neg_view(-X)),
    "of another type": lambda m: m(nn.Parameter(X)),
    "unbatched": lambda m: m(X[:, 0]),
    "of no steps": lambda m: m(X[:0]),
    "lengths": lambda m: m(X, lengths=torch.full((B,), T)),
    "states wanted": lambda m: m(X, return_states=True),
    "states as a list": lambda m: m(X, [torch.zeros(1, B, H)] * 2),
    "vmap": lambda m: torch.func.vmap(lambda x: m(x)[0])(X[None]),
    "autocast": lambda m: torch.autocast("cpu", dtype=torch.bfloat16)(m)(X),
}


@pytest.mark.parametrize("call", INPUTS.values(), ids=INPUTS)
def test_unusual_inputs_go_the_usual_way(ways, call):
    call(fastrnn.LSTM(I, H))
    assert not ways[0] or ways[0][-1] is None


MISTAKES = {
    "features": lambda m: m(torch.randn(T, B, I + 1)),
    "dtype": lambda m: m(X.double()),
    "integers": lambda m: m(X.long()),
    "rank": lambda m: m(X[None]),
    "device": lambda m: m(X.to("meta")),
    "batch of hx": lambda m: m(X, (torch.zeros(1, B + 1, H), torch.zeros(1, B, H))),
    "width of c": lambda m: m(X, (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))),
    "dtype of hx": lambda m: m(X, (torch.zeros(1, B, H).double(), torch.zeros(1, B, H))),
    "no tuple": lambda m: m(X, torch.zeros(1, B, H)),
    "no tensor": lambda m: m([1.0]),
}


@pytest.mark.parametrize("call", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_the_messages_of_the_usual_way(ways, call):
    messages = []
    for closed in (False, True):
        ways[1](closed)
        with pytest.raises((RuntimeError, ValueError, AttributeError, IndexError)) as raised:
            call(fastrnn.LSTM(I, H))
        messages.append((raised.type, str(raised.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("grow", [1, -1])
def test_a_parameter_of_another_shape_is_refused(ways, name, grow):
    m = fastrnn.LSTM(I, H)
    old = getattr(m, name)
    setattr(m, name, nn.Parameter(torch.randn(old.shape[0] + 4 * grow, *old.shape[1:])))
    with pytest.raises(RuntimeError, match="weights"), torch.no_grad():
        m(X)


class Doubled(torch.overrides.TorchFunctionMode):
    """Makes something else of new tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made.double() if function is torch.Tensor.new_empty else made


def test_a_mode_that_changes_new_tensors(ways):
    with Doubled(), torch.no_grad():
        ways[0].clear()
        quick.forward(fastrnn.LSTM(I, H), fastrnn.cells.CELLS["lstm"], X, None)
    assert ways[0] == [None]


def test_without_the_exchange_interface(monkeypatch):
    class Older:
        """A Tensor of an older torch."""

    quick._start.cache_clear()
    monkeypatch.setattr(quick, "Tensor", Older)
    assert quick._start() is None
    with torch.no_grad():
        fastrnn.LSTM(I, H)(X)
    monkeypatch.undo()
    quick._start.cache_clear()
    assert quick._start() is not None


def test_a_module_made_anew_with_two_directions(ways):
    m = fastrnn.LSTM(I, H)
    m(X)
    m.__init__(I, H, bidirectional=True)
    assert_same_both_ways(ways, lambda: [m(X)[0].detach()])
    assert m(X)[0].shape == (T, B, 2 * H)


@pytest.mark.parametrize("name", CELLS)
def test_biases_given_to_a_cell_without_them_and_taken_away(ways, name):
    ours, theirs = getattr(fastrnn, name)(I, H, bias=False), getattr(nn, name)(I, H, bias=False)
    theirs.load_state_dict(ours.state_dict())
    ours(X[0])
    for bias in (torch.randn(ours.weight_ih.shape[0]), None):
        for m in (ours, theirs):
            m.bias_ih = m.bias_hh = None if bias is None else nn.Parameter(bias.clone())
        got = leaves(ours(X[0]))
        assert ways[0][-1] is not None
        for a, b in zip(got, leaves(theirs(X[0])), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_a_parameter_negated_lazily(name, layers):
    m = fastrnn.LSTM(I, H, layers)
    setattr(m, name, nn.Parameter(-getattr(m, name).detach()))
    want, _ = m(X)
    setattr(m, name, nn.Parameter(torch._neg_view(-getattr(m, name).detach())))
    assert getattr(m, name).is_neg()
    torch.testing.assert_close(m(X)[0], want)


def test_a_parameter_taken_away_while_the_engine_reads_it(ways):
    """By another thread, which the engine lets run: its memory, given back, would be filled with NaN here."""
    m, rounds = fastrnn.GRU(I, 700).requires_grad_(False), 50
    x, done = torch.randn(12, 1, I), threading.Event()  # few rows: the engine reads the weights at each step
    weight, expected = m.weight_hh_l0.detach().clone(), m(x)[0]

    def replace():
        while not done.is_set():
            m.weight_hh_l0 = nn.Parameter(weight.clone(), requires_grad=False)
            for _ in range(2):
                torch.full_like(weight, float("nan"))
            time.sleep(1e-4)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        outs = [m(x)[0] for _ in range(rounds)]
    finally:
        done.set()
        thread.join()
    assert ways[0][-1] is not None
    assert all(torch.equal(y, expected) for y in outs)
