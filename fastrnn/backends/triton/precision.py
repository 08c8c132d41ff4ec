"""How fp32 products are made: exactly, or in TF32 as torch's settings ask for.

The input's product and the gradients of the weights are torch's own and follow `torch.backends.cuda.matmul`. The
recurrent product stands in the place of cuDNN's and follows `torch.backends.cudnn.rnn`. `fp32_precision` overrides it;
as torch's settings it holds for the whole process, since backward runs on threads of autograd's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

NAMES = ("auto", "ieee", "tf32", "tf32x3")
_requested = "auto"


@contextlib.contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """Within this context the Triton kernels make fp32's recurrent products as `name` says.

    Args:
        name: "ieee", exact; "tf32", operands rounded to 10 bits; "tf32x3", three products of rounded operands, nearly
            exact; "auto", as `torch.backends.cudnn.rnn.fp32_precision` says, as torch.nn's own do.

    Raises:
        ValueError: no precision has this name.
    """
    if name not in NAMES:
        raise ValueError(f"fp32_precision: expected one of {', '.join(NAMES)}, got {name!r}")
    global _requested
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def of(dtype: torch.dtype) -> str:
    """The precision of products of this type's operands, as tl.dot names it."""
    if dtype is not torch.float32:
        return "ieee"
    if _requested != "auto":
        return _requested
    return "tf32" if _cudnn_asks_for_tf32() else "ieee"


def _cudnn_asks_for_tf32() -> bool:
    rnn: Any = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is None:  # before the setting of its own
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(rnn.fp32_precision == "tf32")
