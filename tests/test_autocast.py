"""Autocast, in bf16 and fp16, on the CPU and, where there is one, a GPU; with and without GradScaler.

Layers give what torch.nn.Linear gives: the autocast dtype, for outputs and states alike. Cells give what
torch.nn's cells give. What torch.nn's layers do on the CPU is asserted at the end.
"""

from __future__ import annotations

import pytest
import torch
from support import KINDS, B, H, I, P, T, both, leaves, random_states, usable_backends
from tolerances import AUTOCAST
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

DTYPES = (torch.bfloat16, torch.float16)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [*(f"cpu {name}" for name in usable_backends()), pytest.param("cuda auto", marks=NEEDS_GPU)]
LENGTHS = (3, T, 1, 5, 4)
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=DEVICES)
def device(request):
    """A device, and one of its backends asked for by name."""
    name, backend = request.param.split()
    with fastrnn.backend(backend):
        yield name


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, of the whole."""
    return float((got.detach() - want.detach()).float().norm() / want.detach().float().norm().clamp(min=1e-30))


def module_of(kind: str, device: str, **options: object) -> nn.Module:
    name, extra = KINDS[kind]
    return getattr(fastrnn, name)(I, H, **{**extra, **options}).to(device)


def forms(x: torch.Tensor, batch_first: bool) -> dict[str, tuple[object, dict[str, object]]]:
    """Input and keywords of a padded, a ragged and a packed batch."""
    lengths = torch.tensor(LENGTHS)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    return {"padded": (x, {}), "lengths": (x, {"lengths": lengths.to(x.device)}), "packed": (packed, {})}


def backward(outputs: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    weighted = [(o.float() * torch.randn(o.shape, generator=generator).to(o.device)).sum() for o in outputs]
    torch.stack(weighted).sum().backward()


def grads(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, options, device, dtype):
    """Outputs and states in autocast's dtype; gradients in the parameters', close to those of fp32."""
    module = module_of(kind, device, **options)
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, device=device)
    if kind == "rnn_relu":  # all above zero: what is rounded to the other side of relu's corner would be far off
        x = x.abs()
        for p in module.parameters():
            p.data.abs_().mul_(0.3)
    for form, (inputs, keywords) in forms(x, module.batch_first).items():
        want = leaves(module(inputs, **keywords))
        backward(want)
        expected = grads(module)
        with torch.autocast(device, dtype):
            linear = nn.functional.linear(x, torch.zeros(1, I, device=device))
            got = leaves(module(inputs, **keywords))
        backward(got)
        for name, g, w in zip(("output", "h_n", "c_n"), got, want, strict=False):
            assert g.dtype == linear.dtype == dtype, f"{form} {name}"
            assert g.shape == w.shape, f"{form} {name}"
            assert error(g, w) < AUTOCAST[dtype], f"{form} {name}"
        for name, g in grads(module).items():
            assert g.dtype == torch.float32, f"{form} gradient of {name}"
            assert error(g, expected[name]) < AUTOCAST[dtype], f"{form} gradient of {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_states_handed_on_in_either_dtype(kind, device, dtype):
    """h_n of a call inside autocast, or of one outside, is welcome as hx inside; its gradient has its dtype."""
    module = module_of(kind, device, num_layers=2)
    x = torch.randn(T, B, I, device=device)
    outside = module(x)[1]
    with torch.autocast(device, dtype):
        inside = module(x)[1]
        results = []
        for states in (outside, inside):
            given = [a.detach().requires_grad_() for a in leaves(states)]
            got = leaves(module(x, tuple(given) if len(given) > 1 else given[0]))
            assert {a.dtype for a in got} == {dtype}
            backward(got)
            assert [a.grad.dtype for a in given] == [a.dtype for a in leaves(states)]
            assert all(a.grad.any() for a in given)
            results.append(got)
    for a, b in zip(*results, strict=True):
        assert error(a, b) < AUTOCAST[dtype]


@pytest.mark.parametrize("states", ["none", "fp32", "narrow", "the other narrow"])
@pytest.mark.parametrize("inputs", ["fp32", "narrow", "the other narrow"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_give_the_dtypes_and_values_of_torch(name, inputs, states, device, dtype):
    """An LSTM and a GRU add to the state that they are given, and both dtypes count; an RNN gives autocast's."""
    theirs, ours = (m.to(device) for m in both(name, I, H))
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    dtypes = {"fp32": torch.float32, "narrow": dtype, "the other narrow": other}
    x = torch.randn(B, I, device=device).to(dtypes[inputs])
    hx = None
    if states != "none":
        state = [torch.randn(B, H, device=device).to(dtypes[states]).requires_grad_() for _ in range(2)]
        hx = tuple(state) if name == "LSTMCell" else state[0]
    with torch.autocast(device, dtype):
        want, got = leaves(theirs(x, hx)), leaves(ours(x, hx))
    assert [a.dtype for a in got] == [a.dtype for a in want]
    assert all(error(a, b) < AUTOCAST[dtype] for a, b in zip(got, want, strict=True))
    backward(got)
    backward(want)
    expected = grads(theirs)
    for key, g in grads(ours).items():
        assert g.dtype == torch.float32, key
        assert error(g, expected[key]) < AUTOCAST[dtype], key


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", *CELLS])
def test_fp64_stays_fp64(name, device, dtype):
    """As for Linear: autocast leaves fp64 alone, to the last bit."""
    module = getattr(fastrnn, name)(I, H).double().to(device)
    x = torch.randn(*((B, I) if name in CELLS else (T, B, I)), dtype=torch.float64, device=device)
    want = leaves(module(x))
    with torch.autocast(device, dtype):
        got = leaves(module(x))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_of_casts_changes_nothing(kind, device, dtype):
    """A call, a changed weight, and a call again, inside one autocast with its cache on, and with it off."""
    module, x = module_of(kind, device), torch.randn(T, B, I, device=device)
    results = []
    for cached in (True, False):
        with torch.autocast(device, dtype, cache_enabled=cached):
            first = module(x)[0]
            backward([first])
            with torch.no_grad():
                module.weight_hh_l0.mul_(-1)
            second = module(x)[0]
            backward([second])
            with torch.no_grad():
                module.weight_hh_l0.mul_(-1)
        assert error(second, first) > 0.02, "the changed weight was not seen"
        results.append([first, second, *grads(module).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", *CELLS])
def test_nested_disabled_autocast_is_none(name, device, dtype):
    module = getattr(fastrnn, name)(I, H).to(device)
    x = torch.randn(*((B, I) if name in CELLS else (T, B, I)), device=device)
    want = leaves(module(x))
    with torch.autocast(device, dtype), torch.autocast(device, enabled=False):
        got = leaves(module(x))
        with pytest.raises((RuntimeError, ValueError), match=r"expected the weights' dtype torch\.float32"):
            module(x.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_under_no_grad_and_inference_mode(device, dtype):
    for kind in KINDS:
        module, x = module_of(kind, device, num_layers=2), torch.randn(T, B, I, device=device)
        with torch.autocast(device, dtype):
            want = leaves(module(x))
            for mode in (torch.no_grad(), torch.inference_mode()):
                with mode:
                    got = leaves(module(x))
                assert {a.dtype for a in got} == {dtype}
                assert all(error(a, b) < AUTOCAST[dtype] for a, b in zip(got, want, strict=True))


class Classifier(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        name, extra = KINDS[kind]
        self.rnn = getattr(fastrnn, name)(I, H, 2, bidirectional=True, **extra)
        self.head = nn.Linear(2 * (self.rnn.proj_size or H), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x, lengths=torch.tensor(LENGTHS, device=x.device))[0].sum(0))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, scaled, device, dtype):
    """Some steps with autocast reach the loss that they reach in fp32, with and without a scaler."""
    x, target = torch.randn(T, B, I, device=device), torch.randint(3, (B,), device=device)
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(2)
        model = Classifier(kind).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=scaled and enabled)
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=enabled):
                loss = nn.functional.cross_entropy(model(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.setdefault(enabled, []).append(loss.item())
    assert losses[False][-1] < 0.9 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=AUTOCAST[dtype], abs=AUTOCAST[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_skips_the_step_and_halves_the_scale(kind, device, dtype):
    model = Classifier(kind).to(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**127, growth_interval=1)
    x, target = torch.randn(T, B, I, device=device), torch.randint(3, (B,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(x), target)
        scaler.scale(loss * 64).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    assert not all(p.grad.isfinite().all() for p in model.rnn.parameters()), "infinities reach the parameters"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert scaler.get_scale() == 2.0**126
    scaler.update(2.0**8)
    step()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_cast_of_the_module_needs_no_autocast(device, dtype):
    """module.to(dtype) and autocast agree where both round the same things."""
    for kind in KINDS:
        module, x = module_of(kind, device), torch.randn(T, B, I, device=device)
        hx = random_states(module, dtype=torch.float32, grad=False)
        hx = tuple(a.to(device) for a in hx) if isinstance(hx, tuple) else hx.to(device)
        with torch.autocast(device, dtype):
            want = leaves(module(x, hx))
        narrow = tuple(a.to(dtype) for a in hx) if isinstance(hx, tuple) else hx.to(dtype)
        got = leaves(module.to(dtype)(x.to(dtype), narrow))
        assert got[0].shape == (T, B, P if kind == "lstm_proj" else H)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_torch_does_on_the_cpu(dtype):
    """Not what Linear does: the GRU stays in fp32, so does a packed LSTM, and one of fp16 may not run at all."""
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    with torch.autocast("cpu", dtype):
        assert nn.GRU(I, H)(x)[0].dtype == torch.float32
        assert nn.LSTM(I, H)(packed)[0].data.dtype == torch.float32
        assert nn.RNN(I, H)(x)[0].dtype == dtype
        for name in ("GRU", "LSTM", "RNN"):
            assert getattr(fastrnn, name)(I, H)(x)[0].dtype == dtype
            assert getattr(fastrnn, name)(I, H)(packed)[0].data.dtype == dtype
