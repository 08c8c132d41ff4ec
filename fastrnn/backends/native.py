"""torch.nn's own kernels (cuDNN, oneDNN, ATen), one layer at a time."""

from __future__ import annotations

import torch
from torch import _VF, Tensor

from fastrnn.backends.base import Backend, Call, Query, Result
from fastrnn.ordinary import traced


class Native(Backend):
    name = "native"
    ragged_layout = "packed"
    differentiable = True
    takes_single_steps = True

    def unsupported(self, query: Query) -> str | None:
        if query.resets:
            return "torch.nn has no mid-sequence resets"
        if not (query.T and query.B):
            return "torch.nn takes no empty input"
        if query.trail:
            return "torch.nn returns the last of c only"
        return None

    def forward(self, call: Call, save: str) -> Result:
        function = getattr(_VF, call.cell.name)
        flat: list[Tensor] = [w for stream in call.weights for w in stream if w is not None]
        bias = call.weights[0].b_ih is not None
        states = call.initial()
        if call.single_step:
            w = call.weights[0]
            step = getattr(_VF, f"{call.cell.name}_cell")
            made = step(call.x, states if call.cell.states > 1 else states[0], w.w_ih, w.w_hh, w.b_ih, w.b_hh)
            finals = made if call.cell.states > 1 else (made,)
            return Result(finals[0], finals)
        hx = list(states) if call.cell.states > 1 else states[0]
        # cuDNN must know of a backward to come, whatever the module's mode; a trace is to serve with and without.
        train = torch.is_grad_enabled() and not traced()
        layer = (flat, bias, 1, 0.0, train, len(call.weights) == 2)  # one layer, no dropout
        if call.batch_sizes is not None:
            y, *finals = function(call.x, call.batch_sizes, hx, *layer)
        else:
            y, *finals = function(call.x, hx, *layer, False)
        return Result(y, tuple(finals))
