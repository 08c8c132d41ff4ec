"""H as the CUDA kernels have it: rounded up to 16 bytes, with units that stay zero."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.backends.base import Call


class Sizes:
    """Of a call."""

    def __init__(self, call: Call) -> None:
        self.steps, self.batch = call.x.shape[:2]
        self.hidden, self.streams = call.hidden, len(call.weights)
        self.padded = padded(self.hidden, call.x.dtype)

    def pad(self, a: Tensor, blocks: int = 1) -> Tensor:
        """(..., blocks * hidden) to (..., blocks * padded), contiguous and on 16 bytes."""
        if self.padded != self.hidden:
            split = a.reshape(*a.shape[:-1], blocks, self.hidden)
            return torch.nn.functional.pad(split, (0, self.padded - self.hidden)).flatten(-2)
        a = a.contiguous()
        return a if a.data_ptr() % 16 == 0 else a.clone()

    def cut(self, a: Tensor, blocks: int) -> Tensor:
        """The reverse of `pad`, contiguous."""
        if self.padded == self.hidden:
            return a
        return a.view(*a.shape[:-1], blocks, self.padded)[..., : self.hidden].flatten(-2).contiguous()

    def pad_rows(self, w: Tensor, gates: int) -> Tensor:
        """(gates * hidden, n) to (gates * padded, n)."""
        if self.padded == self.hidden:
            return w
        split = w.view(gates, self.hidden, -1)
        return torch.nn.functional.pad(split, (0, 0, 0, self.padded - self.hidden)).flatten(0, 1)

    def states(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        return two(tuple([self.pad(a) for a in call.states]))

    def params(self, call: Call) -> Tensor | None:
        """The cell's per-unit parameters, (S, K, padded)."""
        if not call.cell.params:
            return None
        return self.pad(torch.stack([torch.stack(own) for own in call.params]).to(call.x.dtype))


def padded(hidden: int, dtype: torch.dtype) -> int:
    """The number of units that the kernels run: H rounded up to 16 bytes."""
    unit = 128 // torch.finfo(dtype).bits
    return -(-hidden // unit) * unit


def two(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The two of a cell's states, None for what it has not."""
    return (*tensors, None, None)[:2]  # type: ignore[return-value]
