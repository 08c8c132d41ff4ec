"""Models for torch.export and torch.onnx.export, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
from support import KINDS, B, H, I, P, T, random_states
from torch import Tensor, nn
from torch.export import Dim

import fastrnn

SIZES = [(T, B), (4, 3), (1, 1), (12, 2)]  # the first is the example's
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
ALL = ("hx", "lengths", "resets")


class Model(nn.Module):
    """A layer of one of the KINDS, with everything that its forward takes."""

    def __init__(self, kind: str, trail: bool = False, **options: Any) -> None:
        super().__init__()
        name, extra = KINDS[kind]
        self.layer = getattr(fastrnn, name)(I, H, **{**extra, **options})
        self.trail = trail

    def forward(self, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None) -> Any:
        return self.layer(x, hx, lengths=lengths, resets=resets, return_states=self.trail)

    def inputs(self, steps: int, batch: int, given: tuple[str, ...]) -> tuple[Any, ...]:
        """Random arguments of forward: x, and those that are `given`. Some lengths are zero."""
        layer, dtype = self.layer, self.layer.weight_ih_l0.dtype
        lead = (batch, steps) if layer.batch_first else (steps, batch)
        return (
            torch.randn(*lead, I, dtype=dtype),
            random_states(layer, batch, dtype, grad=False) if "hx" in given else None,
            torch.randint(0, steps + 1, (batch,)) if "lengths" in given else None,
            torch.rand(lead) < 0.3 if "resets" in given else None,
        )

    def dims(self, given: tuple[str, ...], steps: Any = Dim.DYNAMIC, batch: Any = Dim.DYNAMIC) -> tuple[Any, ...]:
        """dynamic_shapes for `inputs`."""
        states = {1: batch}
        lead = {0: batch, 1: steps} if self.layer.batch_first else {0: steps, 1: batch}
        return (
            lead,
            ((states, states) if self.layer.mode == "LSTM" else states) if "hx" in given else None,
            {0: batch} if "lengths" in given else None,
            lead if "resets" in given else None,
        )


def cell_inputs(name: str, batch: int, given: bool = True) -> tuple[Any, ...]:
    """x and hx for a cell of this name."""
    states = [torch.randn(batch, H) for _ in range(1 + (name == "LSTMCell"))]
    hx = tuple(states) if len(states) > 1 else states[0]
    return torch.randn(batch, I), hx if given else None


def cell_dims(name: str, given: bool = True) -> tuple[Any, ...]:
    rows = {0: Dim.DYNAMIC}
    return rows, ((rows, rows) if name == "LSTMCell" else rows) if given else None


__all__ = ["ALL", "CELLS", "SIZES", "Model", "P", "cell_dims", "cell_inputs"]
