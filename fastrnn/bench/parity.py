"""The gate before every timing: both sides must give the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype: (outputs and states, gradients). The largest difference, relative to the largest entry of
# torch.nn's tensor. torch.nn itself rounds its states to the 16-bit types at every step.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (1e-2, 3e-2),
    torch.bfloat16: (4e-2, 1e-1),
}


class Mismatch(Exception):
    """The two sides differ; no time may be reported."""


def check(expected: dict[str, Tensor], actual: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """The relative difference of each tensor; Mismatch names the first one that is out of tolerance.

    Names that begin with "grad " get the tolerance of gradients.
    """
    if expected.keys() != actual.keys():
        raise Mismatch(f"torch.nn gives {sorted(expected)}, the subject {sorted(actual)}")
    outputs, gradients = TOLERANCE[dtype]
    return {
        name: _difference(name, want, actual[name], gradients if name.startswith("grad ") else outputs)
        for name, want in expected.items()
    }


def _difference(name: str, want: Tensor, got: Tensor, tolerance: float) -> float:
    if want.shape != got.shape or want.dtype != got.dtype:
        raise Mismatch(f"{name}: torch.nn gives {_kind(want)}, the subject {_kind(got)}")
    if not want.numel():
        return 0.0
    a, b = want.detach().double(), got.detach().double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise Mismatch(f"{name}: not finite")
    scale = float(a.abs().max())
    worst = float((a - b).abs().max())
    if worst > tolerance * scale:
        raise Mismatch(f"{name}: differs by {worst:.2e}, torch.nn's largest entry is {scale:.2e}, allowed {tolerance}")
    return worst / scale if scale else 0.0


def _kind(a: Tensor) -> str:
    return f"{str(a.dtype).removeprefix('torch.')} {tuple(a.shape)}"
