"""Barriers, rounding and activations of the Triton kernels: what the parity tests would only show by chance."""

import pytest
import torch
import triton_support
from engine_support import Case
from triton_support import DEVICE, TRITON, Form, call_of, run

import fastrnn
from fastrnn.backends.triton import device, watchdog

triton_support.require()
triton = pytest.importorskip("triton")
tl = triton.language

from fastrnn.backends.triton import persistent, steps  # noqa: E402  (imports Triton)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # NumPy's, in the interpreter
interpreted = pytest.mark.skipif(not device.interpreted(), reason="plants errors in the interpreter")
BARRIERS = Case("lstm", B=5, H=40, T=4)


@pytest.fixture
def persistent_schedule(monkeypatch):
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", "persistent")


def _wrong(call):
    """Does a result differ from the one that all barriers give?"""
    want = run(call, reference=True)
    got = run(call, backend=TRITON)
    return any(not torch.allclose(got[name], a, atol=1e-4) for name, a in want.items())


@interpreted
@pytest.mark.usefixtures("persistent_schedule", "poisoned")
def test_a_missing_barrier_is_caught(monkeypatch):
    call = call_of(BARRIERS, Form(), torch.float32)
    assert not _wrong(call)

    @triton.jit
    def no_wait(ARRIVED, ERROR, target, limit):
        return limit

    monkeypatch.setattr(persistent, "wait", no_wait)
    assert any(_wrong(call) for _ in range(10))


@interpreted
@pytest.mark.usefixtures("persistent_schedule")
@pytest.mark.parametrize("backward", [False, True])
def test_a_wait_in_vain_raises_and_leaves_nan(monkeypatch, backward):
    call = call_of(BARRIERS, Form(), torch.float32)
    (y, *_) = triton_support.outputs(call, backend=TRITON)

    @triton.jit
    def no_arrival(ARRIVED):
        tl.debug_barrier()

    monkeypatch.setattr(persistent, "arrive", no_arrival)
    monkeypatch.setattr(watchdog, "LIMIT", 3)
    if backward:
        results = torch.autograd.grad(y.sum(), [call.x, *call.states])
    else:
        results = triton_support.outputs(call, backend=TRITON)
        assert not results[0][0].isnan().any()  # before the first wait
        results = [results[0][1:], *results[1:]]
    assert all(a.isnan().any() for a in results)
    with pytest.raises(RuntimeError, match=f"a persistent Triton kernel on {DEVICE}.* gave up at a barrier"):
        triton_support.outputs(call, backend=TRITON)
    watchdog.check(call.x.device)  # it is raised once
    monkeypatch.undo()
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", "persistent")
    assert not _wrong(call)


@triton.jit
def _round(X, Y, Z, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, steps.narrow(tl.load(X + at), Y.dtype.element_ty))
    tl.store(Z + at, steps.wide(tl.load(Y + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_to_the_nearest_even(dtype):
    x = torch.randn(256, device=DEVICE) * torch.logspace(-4, 4, 256, device=DEVICE)
    x[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11])
    y, z = torch.empty(256, dtype=dtype, device=DEVICE), torch.empty(256, device=DEVICE)
    _round[1,](x, y, z, 256)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, y.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _activate(X, S, T, A, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(S + at, steps.sigmoid(x))
    tl.store(T + at, steps.tanh(x))
    tl.store(A + at, steps.tanh_approx(x))


def test_activations():
    x = torch.cat(
        [torch.linspace(-12, 12, 1000), torch.logspace(-30, 2, 1000), torch.tensor([200.0, -200.0, torch.inf])]
    )
    x = torch.cat([x, torch.zeros(2048 - x.numel())]).to(DEVICE)
    s, t, a = (torch.empty_like(x) for _ in range(3))
    _activate[1,](x, s, t, a, 2048)
    for name, got, want, limit in (
        ("sigmoid", s, x.double().sigmoid(), 1e-6),
        ("tanh", t, x.double().tanh(), 1e-6),
        ("approximate tanh", a, x.double().tanh(), 1e-3),
    ):
        wrong = (got.double() - want).abs() / want.abs().clamp(min=1e-30)
        assert wrong.max() < limit, f"{name}: {wrong.max():.1e} at {x[wrong.argmax()]}"


@triton.jit
def _multiply(A, B, C, N: tl.constexpr):
    at = tl.arange(0, N)
    block = at[:, None] * N + at[None, :]
    tl.store(C + block, steps.dot(tl.load(A + block), tl.load(B + block), None, "ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_summed_in_fp32(dtype):
    a, b = (torch.randn(64, 64, device=DEVICE).to(dtype) for _ in range(2))
    c = torch.empty(64, 64, device=DEVICE)
    _multiply[1,](a, b, c, 64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_nan_and_inf_stay_in_their_rows():
    for name in ("LSTM", "GRU", "RNN"):
        module = getattr(fastrnn, name)(11, 19, backend="triton").to(DEVICE)
        x = torch.randn(7, 5, 11, device=DEVICE)
        want = module(x)[0]
        x[3, 2, 0] = torch.nan
        got = module(x)[0]
        assert got[3:, 2].isnan().any(-1).all()
        torch.testing.assert_close(got[:3], want[:3])
        torch.testing.assert_close(got[:, [0, 1, 3, 4]], want[:, [0, 1, 3, 4]])


def test_a_reset_clears_even_nan():
    module = fastrnn.LSTM(11, 19, backend="triton").to(DEVICE)
    x = torch.randn(7, 5, 11, device=DEVICE)
    x[2, 1] = torch.nan
    resets = torch.zeros(7, 5, dtype=torch.bool, device=DEVICE)
    resets[3, 1] = True
    y = module(x, resets=resets)[0]
    assert y[2, 1].isnan().all()
    assert not y[3:].isnan().any()


def test_equal_bits_from_run_to_run():
    call = call_of(Case("gru", B=19, H=40, lengths=True, reverse=(False, True)), Form(), torch.float32)
    first, second = run(call, backend=TRITON), run(call, backend=TRITON)
    assert all(torch.equal(a, second[name]) for name, a in first.items())
