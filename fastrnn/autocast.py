"""Autocast: what goes into a call is cast as torch.nn casts it, before anything else looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.base import Weights


def autocasts(x: Any) -> bool:
    if not torch._C._is_any_autocast_enabled():  # as torch.nn asks
        return False
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast(
    x: Tensor, hx: Any, weights: Sequence[Weights], dtype: torch.dtype | None = None
) -> tuple[Tensor, Any, Sequence[Weights]]:
    """Under autocast everything takes its dtype (or `dtype`), but fp64, as for torch.nn on a GPU."""
    dtype = dtype or torch.get_autocast_dtype(x.device.type)

    def cast(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.to(dtype) if a.is_floating_point() and a.dtype != torch.float64 else a
        return a if a is None else tuple(cast(v) for v in a)

    return cast(x), cast(hx), [Weights(*cast(w)) for w in weights]
