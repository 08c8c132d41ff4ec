"""The truth: a plain loop over the cell's own text, for any dtype and device, differentiable at will."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.backends.base import STATES, Backend, Call, Query, Result, Saved, Weights


class Reference(Backend):
    name = "reference"
    takes_params = True
    differentiable = True

    def unsupported(self, query: Query) -> str | None:
        return None

    def forward(self, call: Call, save: str) -> Result:
        kind = call.x.device.type
        if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(kind):
            with torch.autocast(kind, enabled=False):  # the call has been cast; products are summed in fp32
                return self._run(call, save)
        return self._run(call, save)

    def _run(self, call: Call, save: str) -> Result:
        if call.x.dtype in (torch.float16, torch.bfloat16):
            return narrow(self._run(widen(call), save), call.x.dtype)
        call = call._replace(states=call.initial())
        outs = [_stream(call, s) for s in range(len(call.weights))]
        y = torch.cat([o[0] for o in outs], -1)
        finals = tuple(torch.stack(f) for f in zip(*(o[1] for o in outs), strict=True))
        if save != STATES or call.cell.states < 2:
            return Result(y, finals)
        return Result(y, finals, Saved(c=torch.stack([o[2].flatten(0, 1) for o in outs])))


REFERENCE = Reference()


def widen(call: Call) -> Call:
    """16-bit types are storage: the arithmetic, and the states between steps, are fp32."""

    def wide(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        return tuple(None if a is None else a.float() for a in tensors)

    return call._replace(
        x=call.x.float(),
        states=wide(call.states),
        weights=tuple(Weights(*wide(w)) for w in call.weights),
        params=tuple(map(wide, call.params)),
    )


def narrow(result: Result, dtype: torch.dtype) -> Result:
    """Back to a type of 16 bits, but for what is saved."""
    return result._replace(y=result.y.to(dtype), finals=tuple(a.to(dtype) for a in result.finals))


def _stream(call: Call, s: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """y, the final states and the last state at every step, (T, B, H)."""
    cell, w, p = call.cell, call.weights[s], call.params[s] if call.params else ()
    steps = call.x.shape[0]
    xg = linear(call.x, w.w_ih, w.b_ih)  # (T, B, G*H)
    state = tuple(a[s] for a in call.states)
    y: list[Tensor] = [call.x] * steps
    trail = list(y)
    for t in reversed(range(steps)) if call.reverse[s] else range(steps):
        # A reset lies between t-1 and t: forward streams meet it before step t, reverse ones after.
        boundary = t + 1 if call.reverse[s] else t
        if call.resets is not None and boundary < steps:
            cut = call.resets[boundary][:, None]
            state = tuple(torch.where(cut, 0.0, a) for a in state)
        r = linear(state[0], w.w_hh, w.b_hh)
        new, _ = cell.step(
            xg[t].chunk(cell.gates, -1), r.chunk(cell.gates, -1), state, p, torch.sigmoid, torch.tanh, torch.where
        )
        if w.w_hr is not None:
            new = (linear(new[0], w.w_hr), *new[1:])
        if call.lengths is None:
            state, y[t], trail[t] = new, new[0], new[-1]
        else:
            live = (t < call.lengths)[:, None]
            state = tuple(torch.where(live, a, b) for a, b in zip(new, state, strict=True))
            y[t], trail[t] = torch.where(live, new[0], 0.0), torch.where(live, new[-1], 0.0)
    if not steps:
        return call.x.new_empty(0, call.x.shape[1], call.out), state, call.x.new_empty(0, call.x.shape[1], call.hidden)
    return torch.stack(y), state, torch.stack(trail)
