"""Helpers that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from tolerances import EXACT, FLOOR, TORCH_FACTOR
from torch import Tensor, nn

import fastrnn
from fastrnn.backends import BACKENDS, unsupported
from fastrnn.backends.base import Query

T, B, I, H, P = 7, 5, 11, 19, 6  # noqa: E741  odd sizes, no multiple of a vector

# Each kind of layer: (class name, constructor arguments that make it so).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": P}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}


def usable_backends(
    cell: str = "lstm", dtype: torch.dtype = torch.float32, ragged: bool = False, resets: bool = False
) -> list[str]:
    """Names of the backends that can run a call of this sort here."""
    query = Query(cell, "cpu", dtype, T, B, I, H, H, 1, True, ragged, resets)
    return [name for name, b in BACKENDS.items() if unsupported(b, query) is None]


def pair(kind: str, *args: Any, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
    """torch.nn's module and ours, made from the same seed."""
    name, extra = KINDS[kind]
    made = []
    for library in (nn, fastrnn):
        torch.manual_seed(seed)
        made.append(getattr(library, name)(*args, **{**extra, **kwargs}, dtype=dtype))
    return made[0], made[1]


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch.nn's class of this name and ours, made from the same seed."""
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(3)
    return theirs, getattr(fastrnn, name)(*args, **kwargs)


def random_states(module: Any, batch: int | None = B, dtype: torch.dtype = torch.float64, grad: bool = True) -> Any:
    """hx for `module`; batch None for unbatched input."""
    lead = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    states = [
        torch.randn(lead, *(() if batch is None else (batch,)), n, dtype=dtype).requires_grad_(grad) for n in sizes
    ]
    return tuple(states) if len(states) > 1 else states[0]


def leaves(value: Any) -> list[Tensor]:
    """The tensors of an output or an hx, in order."""
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in leaves(v)]
    return [] if value is None else [value]


def gradients(module: nn.Module, inputs: dict[str, Tensor], outputs: list[Tensor], seed: int = 1) -> dict[str, Tensor]:
    """d(outputs . random) for every parameter and every named input."""
    generator = torch.Generator().manual_seed(seed)
    named = {**inputs, **dict(module.named_parameters())}
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, list(named.values()), seeds)
    return dict(zip(named, found, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def assert_equal(name: str, got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Same shape and dtype, and values up to the table's EXACT."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    limit = EXACT[want.dtype] if tolerance is None else tolerance
    assert (e := error(got, want)) <= limit, f"{name}: relative error {e:.2e} > {limit:.0e}"


def assert_as_good(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most TORCH_FACTOR times torch.nn's own error against the fp64 truth, or the table's FLOOR."""
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, expected {theirs.dtype}"
    limit = max(TORCH_FACTOR * error(theirs, truth), FLOOR[ours.dtype])
    assert (e := error(ours, truth)) <= limit, f"{name}: error {e:.2e}, torch.nn's own {error(theirs, truth):.2e}"


def compare(kind: str, ours: Any, theirs: Any, run_ours: Any, run_theirs: Any, inputs: dict[str, Tensor]) -> None:
    """Outputs, final states and every gradient of two modules, naming what disagrees."""
    got, want = leaves(run_ours()), leaves(run_theirs())
    assert len(got) == len(want)
    for name, g, w in zip(("output", "h_n", "c_n"), got, want, strict=False):
        assert_equal(f"{kind} {name}", g, w)
    expected = gradients(theirs, inputs, want)
    for name, g in gradients(ours, inputs, got).items():
        assert_equal(f"{kind} gradient of {name}", g, expected[name])


def inputs_of(x: Tensor, hx: Any) -> dict[str, Tensor]:
    return {"input": x, **dict(zip(("h_0", "c_0"), leaves(hx), strict=False))}
