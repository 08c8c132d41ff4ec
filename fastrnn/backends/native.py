"""torch.nn's own kernels (cuDNN, oneDNN, ATen), one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _VF, Tensor

from fastrnn.backends.base import Backend, Call, Query, Result
from fastrnn.cells import CELLS, Cell
from fastrnn.ordinary import traced


class Native(Backend):
    name = "native"
    ragged_layouts = ("packed",)
    differentiable = True
    takes_single_steps = True

    def unsupported(self, query: Query) -> str | None:
        if query.cell not in _STEPS:
            return f"torch.nn has no {query.cell}"
        if query.resets:
            return "torch.nn has no mid-sequence resets"
        if not (query.T and query.B):
            return "torch.nn takes no empty input"
        if query.trail:
            return "torch.nn returns the last of c only"
        return None

    def forward(self, call: Call, save: str) -> Result:
        if call.single_step:
            finals = step(call.cell, call.x, call.initial(), call.weights[0][:4])
            return Result(finals[0], finals)
        function = getattr(_VF, call.cell.name)
        flat: list[Tensor] = [w for stream in call.weights for w in stream if w is not None]
        bias = call.weights[0].b_ih is not None
        states = call.initial()
        hx = list(states) if call.cell.states > 1 else states[0]
        # cuDNN must know of a backward to come, whatever the module's mode; a trace is to serve with and without.
        train = torch.is_grad_enabled() and not traced()
        layer = (flat, bias, 1, 0.0, train, len(call.weights) == 2)  # one layer, no dropout
        if call.batch_sizes is not None:
            y, *finals = function(call.x, call.batch_sizes, hx, *layer)
        else:
            y, *finals = function(call.x, hx, *layer, False)
        return Result(y, tuple(finals))


NATIVE = Native()
_STEPS = {name: getattr(_VF, f"{name}_cell") for name in CELLS if hasattr(_VF, f"{name}_cell")}


def step(cell: Cell, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """One step of a cell; weights are w_ih, w_hh, b_ih and b_hh."""
    if cell.states > 1:
        return _STEPS[cell.name](x, states, *weights)  # type: ignore[no-any-return]
    return (_STEPS[cell.name](x, states[0], *weights),)
