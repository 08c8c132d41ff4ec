"""The C++ text of the cells against the Python one, the engine's functions, special values, malformed calls."""

import pytest
import torch
from engine_support import CPU, ENGINE, Case, make_call, run

from fastrnn.backends import choose
from fastrnn.backends.base import Query, Weights
from fastrnn.cells import CELLS
from fastrnn.functional import lstm
from fastrnn.recurrence import recurrence

pytestmark = pytest.mark.skipif(ENGINE is None, reason="the engine is not built")


def test_same_cells_in_both_languages():
    assert ENGINE.cells() == list(CELLS)
    assert ENGINE.sizes() == {name: cell.sizes for name, cell in CELLS.items()}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_both_texts_agree(cell):
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        draw = lambda n, g=g: [torch.randn((), generator=g, dtype=torch.float64) * 2 for _ in range(n)]  # noqa: E731
        x, r, s, ds, p = draw(cell.gates), draw(cell.gates), draw(cell.states), draw(cell.states), draw(cell.params)
        functions = (torch.sigmoid, torch.tanh, torch.where)
        s1, tape = cell.step(x, r, s, p, *functions)
        dx, dr, ds0, dp = cell.step_backward(tape, s, s1, p, ds, *functions)
        # The engine's pre-activations: x + r of the plain gates, then x of the split ones, then their r.
        plain = [g for g in range(cell.gates) if g not in cell.split]
        assert cell.split in ((), (cell.gates - 1,)), "the C++ struct has its split gates last"
        a = [x[g] + r[g] for g in plain] + [x[g] for g in cell.split] + [r[g] for g in cell.split]
        want = (s1, tape, ds0, [*dx, *(dr[g] for g in cell.split)], dp)
        got = ENGINE.step(cell.name, *([float(v) for v in values] for values in (a, s, p, ds)))
        names = ("states", "tape", "state gradients", "gate gradients", "parameter gradients")
        for what, g, w in zip(names, got, want, strict=True):
            values = torch.tensor([float(v) for v in w], dtype=torch.float64)
            found = torch.tensor(g, dtype=torch.float64)
            torch.testing.assert_close(found, values, rtol=1e-12, atol=1e-14, msg=lambda m, w=what: f"{w}: {m}")


def _grid(dtype):
    fine = torch.linspace(-100, 100, 40001, dtype=torch.float64)
    tiny = torch.logspace(-300 if dtype == torch.float64 else -37, 1, 4000, dtype=torch.float64)
    return torch.cat((fine, tiny, -tiny)).to(dtype)


def _pass_through(cell, x, **biases):
    """One step of a cell of one unit, whose every gate is given by x or, if named, by a constant."""
    gates = CELLS[cell].gates
    w_ih, b_ih = torch.ones(gates, 1, dtype=x.dtype), torch.zeros(gates, dtype=x.dtype)
    for gate, value in biases.items():
        k = "ifgo".index(gate)
        w_ih[k], b_ih[k] = 0, value
    zero = torch.zeros(1, x.numel(), 1, dtype=x.dtype)
    call = make_call(Case(cell, 1, x.numel(), 1, 1), x.dtype, grad=False)
    weights = Weights(w_ih, torch.zeros(gates, 1, dtype=x.dtype), b_ih, None, None)
    return recurrence(CPU, call._replace(x=x.view(1, -1, 1), states=(zero,) * len(call.states), weights=(weights,)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tanh_and_sigmoid_to_the_last_digits(dtype):
    x, unit = _grid(dtype), torch.finfo(dtype).eps
    normal = torch.finfo(dtype).tiny
    tanh = _pass_through("rnn_tanh", x).y.flatten().double()
    # i alone in c: g is 1, c_0 is 0
    sigmoid = _pass_through("lstm", x, f=0.0, g=100.0, o=0.0).finals[1].flatten().double()
    for name, got, want in (("tanh", tanh, x.double().tanh()), ("sigmoid", sigmoid, x.double().sigmoid())):
        sure = want.abs() > 4 * normal
        worst = ((got - want).abs() / want.abs())[sure].max()
        assert worst < 4 * unit, f"{name}: relative error {float(worst / unit):.1f} units in the last place"
        assert (got - want)[~sure].abs().max() <= 4 * normal if (~sure).any() else True


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 1e-40, -0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_special_values_come_out_as_in_torch(cell, dtype, value):
    """In any place: NaN where the reference has NaN, infinities alike, and no row disturbs another."""
    for batch in (2, 14):
        for name in ("x", "state 0", "b_ih of stream 0"):
            call = make_call(Case(cell, 3, batch, 5, 19), dtype, grad=False)
            if name == "x":
                call.x[1, 1, 2] = value
            elif name == "state 0":
                call.states[0][0, 1, 4] = value
            else:
                call.weights[0].b_ih[3] = value
            got, want = run(call, backward=False), run(call, reference=True, backward=False)
            for what, a in got.items():
                torch.testing.assert_close(
                    a.float(), want[what].float(), rtol=2e-2, atol=2e-2, equal_nan=True,
                    msg=lambda m, w=what, n=name: f"{value} in {n}, {w}: {m}",
                )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_sixteen_bit_number_is_read_and_rounded(dtype):
    """relu(x) of all 65536 of them, and of sums that lie between two of them, is torch's own rounding."""
    x = torch.arange(65536).to(torch.uint16).view(dtype)
    y = _pass_through("rnn_relu", x).y.flatten()
    assert torch.equal(y.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(y[known], x[known].relu())
    halves = torch.randn(100_000).exp().to(dtype)
    w_ih = torch.tensor([[1.0]], dtype=dtype)
    call = make_call(Case("rnn_relu", 1, halves.numel(), 1, 1), dtype, grad=False)
    bias = torch.tensor([0.37], dtype=dtype)
    weights = Weights(w_ih, torch.zeros(1, 1, dtype=dtype), bias, None, None)
    zero = torch.zeros(1, halves.numel(), 1, dtype=dtype)
    y = recurrence(CPU, call._replace(x=halves.view(1, -1, 1), states=(zero,), weights=(weights,))).y.flatten()
    assert torch.equal(y, (halves.float() + bias.float()).relu().to(dtype))


HEAD, STREAM = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]
POINTERS = [1] * 13  # of backward; the ninth is dgates


@pytest.mark.parametrize(
    ("head", "stream"),
    [
        ([], STREAM),
        (HEAD[:-1], STREAM),
        ([*HEAD, 0], STREAM),
        (HEAD, []),
        (HEAD, STREAM[:-1]),
        *(([*HEAD[:k], bad, *HEAD[k + 1 :]], STREAM) for k, bad in ((2, 0), (3, 0), (4, 0), (6, 4), (7, 4))),
    ],
)
def test_malformed_calls_are_refused(head, stream):
    with pytest.raises(ValueError, match="malformed"):
        ENGINE.forward(head, stream, [], 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="malformed"):
        ENGINE.backward(head, stream, [], *POINTERS, [], [])


def test_malformed_gradients_and_steps_are_refused():
    """Too many or too few, for a weight that is not there, of 16 bits, or none and no place for the gates."""
    narrow = [ENGINE.few_rows + 1, *HEAD[1:7], 2, *HEAD[8:]]
    nowhere = [*POINTERS[:8], 0, *POINTERS[9:]]
    for head, pointers, gradients in (
        *((HEAD, POINTERS, [0] * n) for n in (4, 6, 10)),
        (HEAD, POINTERS, [0, 0, 0, 0, 1]),
        (narrow, POINTERS, [0] * 5),
        (HEAD, nowhere, []),
        ([*HEAD[:7], 2, *HEAD[8:]], nowhere, [0] * 5),
    ):
        with pytest.raises(ValueError, match="malformed"):
            ENGINE.backward(head, STREAM, [], *pointers, gradients, [])
    with pytest.raises(ValueError, match="malformed"):
        ENGINE.forward(HEAD, STREAM, [1], *[0] * 6)  # an LSTM has no values of its own
    with pytest.raises(ValueError, match="malformed"):
        ENGINE.backward(HEAD, STREAM, [], *POINTERS, [0] * 5, [1])
    with pytest.raises(ValueError, match="wrong sizes"):
        ENGINE.step("lstm", [0.0], [0.0], [], [0.0])
    with pytest.raises(ValueError, match="wrong sizes"):
        ENGINE.step("lstm", [0.0] * 4, [0.0] * 2, [0.0], [0.0] * 2)
    with pytest.raises(ValueError, match="unknown cell"):
        ENGINE.step("elman", [0.0], [0.0], [], [0.0])


def test_what_the_engine_does_not_run_goes_elsewhere():
    query = Query("lstm", "cpu", torch.float32, 3, 2, 0, 4, 4, 1)
    assert CPU.unsupported(query) == "the engine needs at least one feature and one unit"
    assert CPU.unsupported(query._replace(I=1, H=0)) == CPU.unsupported(query)
    assert CPU.unsupported(query._replace(I=1)) is None
    assert "float8" in CPU.unsupported(query._replace(I=1, dtype=torch.float8_e5m2))
    assert choose(query).backend is not CPU
    weights = Weights(torch.zeros(16, 0), torch.randn(16, 4), torch.randn(16), torch.randn(16), None)
    states = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    y, _ = lstm(torch.zeros(3, 2, 0), states, [weights])
    want, _ = lstm(torch.zeros(3, 2, 1), states, [weights._replace(w_ih=torch.zeros(16, 1))])
    torch.testing.assert_close(y, want)
