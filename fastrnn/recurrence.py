"""The one op: a layer's recurrence on any backend, with its gradients.

A backend does the sequential part only and hands back the gradients at the gates; the gradients of
the input, the weights and the biases follow here, by one GEMM each over all time steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastrnn.backends.base import Backend, Call, Result, Weights
from fastrnn.backends.reference import Reference
from fastrnn.cells import Cell
from fastrnn.packing import pad_call, previous_rows

REFERENCE = Reference()
_FIELDS = len(Weights._fields)
_MASKS = 3  # lengths, batch_sizes, resets: saved with the other tensors, so that a change in place is noticed
_functorch = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


def recurrence(backend: Backend, call: Call) -> Result:
    """Run `call` on `backend`, recording it for autograd when a gradient may be asked for."""
    if backend.differentiable:
        return _with_axes(backend, call) if call.single_step else backend.forward(call, save=False)
    flat = (call.x, *call.states, *[w for stream in call.weights for w in stream])
    if not _plain(flat):
        return recurrence(REFERENCE, call) if call.batch_sizes is None else pad_call(call, REFERENCE)
    if torch.is_grad_enabled():
        for a in flat:
            if a is not None and a.requires_grad:
                return _recorded(backend, call, flat)
    if not backend.takes_single_steps and call.single_step:
        return _with_axes(backend, call)
    return backend.forward(call, save=False)


def _recorded(backend: Backend, call: Call, flat: tuple[Tensor | None, ...]) -> Result:
    if call.single_step:
        return _with_axes(backend, call)
    meta = _Meta(backend, call.cell, call.reverse)
    y, *finals = _Recurrence.apply(meta, call.lengths, call.batch_sizes, call.resets, *flat)  # type: ignore[no-untyped-call]
    return Result(y, tuple(finals))


def _with_axes(backend: Backend, call: Call) -> Result:
    """A single step as a sequence of one."""
    full = call._replace(x=call.x.unsqueeze(0), states=tuple([a.unsqueeze(0) for a in call.states]))
    finals = tuple([a.squeeze(0) for a in recurrence(backend, full).finals])
    return Result(finals[0], finals)


def _plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Are these tensors memory and nothing else?

    Backends take addresses. What torch.func, forward-mode differentiation, tracing and dispatch modes do
    to tensors they would not see, so such calls run on the reference, which is made of PyTorch operations.
    """
    if _functorch() is not None or forward_ad._current_level >= 0 or _dispatch_modes() or _tracing() is not None:
        return False
    for a in tensors:
        kind = type(a)
        if kind is Parameter or a is None:
            continue
        if kind is not Tensor or a.is_neg() or a._is_zerotensor():
            return False
    return True


class _Meta(NamedTuple):
    """The part of a call that is no tensor."""

    backend: Backend
    cell: Cell
    reverse: tuple[bool, ...]

    def call(self, masks: tuple[Tensor | None, ...], flat: tuple[Tensor, ...]) -> Call:
        n = self.cell.states
        rest = flat[1 + n :]
        weights = tuple(Weights(*rest[i : i + _FIELDS]) for i in range(0, len(rest), _FIELDS))
        return Call(self.cell, flat[0], flat[1 : 1 + n], weights, self.reverse, *masks)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meta: _Meta, *tensors: Tensor) -> Any:
        masks, flat = tensors[:_MASKS], tensors[_MASKS:]
        result = meta.backend.forward(meta.call(masks, flat), save=True)
        # torch.nn's GRU and RNN allow to edit their output in place, its LSTM does not: so here.
        y = result.y if meta.cell.states > 1 else result.y.clone()
        ctx.meta, ctx.inputs = meta, len(tensors)
        ctx.hooked = _hooks() is not None
        ctx.save_for_backward(*tensors, y, *result.saved)
        ctx.set_materialize_grads(False)
        return (result.y, *result.finals)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinals: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        masks, flat = tensors[:_MASKS], tensors[_MASKS : ctx.inputs]
        y, saved = tensors[ctx.inputs], tensors[ctx.inputs + 1 :]
        head: tuple[None, ...] = (None,) * (1 + _MASKS)
        if dy is None and all(d is None for d in dfinals):
            return head + (None,) * len(flat)
        needed = ctx.needs_input_grad[1 + _MASKS :]
        call = ctx.meta.call(masks, flat)
        douts = (dy, *dfinals)
        if torch.is_grad_enabled() or not _plain(douts):  # create_graph=True, or a transformation
            return head + tuple(_differentiable_backward(call, flat, douts, needed))
        dy = torch.zeros_like(y) if dy is None else dy.contiguous()
        # Whoever hooks into saved tensors may keep the tape, which must then not be overwritten.
        last = not (ctx.hooked or _keeps_graph())
        if torch._C._is_any_autocast_enabled():  # which is about the forward
            with torch.autocast(y.device.type, enabled=False):
                return head + tuple(call_backward(ctx.meta.backend, call, saved, y, dy, dfinals, needed, last))
        return head + tuple(call_backward(ctx.meta.backend, call, saved, y, dy, dfinals, needed, last))


def _hooks() -> Any:
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if ask is None else ask(True)


def _keeps_graph() -> bool:
    """Will this graph be walked again? Assumed where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def _differentiable_backward(
    call: Call, flat: tuple[Tensor, ...], douts: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same gradients as a graph that can be differentiated again: autograd through the reference.

    It differentiates with respect to views of the inputs, one each, so that it ends at this call and
    counts an input that comes twice once in each place.
    """
    with torch.enable_grad():
        own = tuple([None if a is None else a.view_as(a) for a in flat])
        meta = _Meta(REFERENCE, call.cell, call.reverse)
        call = meta.call((call.lengths, call.batch_sizes, call.resets), own)
        result = pad_call(call, REFERENCE) if call.batch_sizes is not None else recurrence(REFERENCE, call)
        pairs = [(o, d) for o, d in zip((result.y, *result.finals), douts, strict=True) if d is not None]
        wanted = [a for a, need in zip(own, needed, strict=True) if need]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [d for _, d in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(grads) if need else None for need in needed]


def call_backward(
    backend: Backend,
    call: Call,
    saved: tuple[Tensor, ...],
    y: Tensor,
    dy: Tensor,
    dfinals: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    last: bool = False,
) -> list[Tensor | None]:
    """Gradients of x, the states and each stream's weights, in the order of the op's inputs."""
    cell, hidden = call.cell, call.hidden
    grads = backend.backward(call, saved, y, dy, dfinals, needed, last)
    if grads.dweights is not None:
        return [grads.dx, *grads.dstates, *(w for stream in grads.dweights for w in stream)]
    assert grads.dgates is not None
    x = call.x.reshape(-1, call.x.shape[-1])
    dx = grads.dx
    out: list[Tensor | None] = [None, *grads.dstates]
    first = 1 + cell.states
    for s, w in enumerate(call.weights):
        need = needed[first + s * _FIELDS : first + (s + 1) * _FIELDS]
        dgates = grads.dgates[s]  # (N, D*H)
        dxg = dgates[:, : cell.gates * hidden]
        if needed[0] and grads.dx is None:
            dx = dxg @ w.w_ih if dx is None else dx.addmm_(dxg, w.w_ih)
        db_ih = dxg.sum(0) if need[2] or need[3] else None
        out.append(dxg.t() @ x if need[0] else None)
        out.append(_recurrent_weight_grad(call, s, dgates, y) if need[1] else None)
        out.append(db_ih if need[2] else None)
        out.append(_recurrent_bias_grad(cell, dgates, db_ih, hidden) if need[3] else None)
        out.append(grads.dh[s].t() @ grads.m[s] if need[4] and grads.dh is not None and grads.m is not None else None)
    out[0] = None if dx is None else dx.view(call.x.shape)
    return out


def _recurrent_blocks(cell: Cell, hidden: int) -> list[tuple[slice, slice]]:
    """Runs of recurrent gates: (rows of W_hh, columns of dgates that hold their dr)."""
    blocks, start = [], 0
    for k, gate in enumerate(cell.split):
        if gate > start:
            blocks.append((slice(start * hidden, gate * hidden), slice(start * hidden, gate * hidden)))
        column = cell.gates + k
        blocks.append((slice(gate * hidden, (gate + 1) * hidden), slice(column * hidden, (column + 1) * hidden)))
        start = gate + 1
    if start < cell.gates:
        blocks.append((slice(start * hidden, cell.gates * hidden), slice(start * hidden, cell.gates * hidden)))
    return blocks


def _recurrent_bias_grad(cell: Cell, dgates: Tensor, db_ih: Tensor | None, hidden: int) -> Tensor | None:
    if db_ih is None or not cell.split:
        return None if db_ih is None else db_ih.clone()  # not one tensor for two parameters
    db = torch.empty_like(db_ih)
    for rows, columns in _recurrent_blocks(cell, hidden):
        db[rows] = db_ih[rows] if rows == columns else dgates[:, columns].sum(0)
    return db


def _recurrent_weight_grad(call: Call, s: int, dgates: Tensor, y: Tensor) -> Tensor:
    """sum over t of dr_t^T h_{t-1}."""
    pieces = _previous_h(call, s, y)
    w_hh = call.weights[s].w_hh
    dw = torch.zeros_like(w_hh, dtype=dgates.dtype)
    for rows, columns in _recurrent_blocks(call.cell, call.hidden):
        for span, h in pieces:
            dw[rows].addmm_(dgates[span, columns].t(), h)
    return dw


def _previous_h(call: Call, s: int, y: Tensor) -> list[tuple[slice, Tensor]]:
    """The h that entered each row's step, as runs (rows, h); views of y where that is possible."""
    out, reverse = call.out, call.reverse[s]
    h = y.reshape(-1, y.shape[-1])[:, s * out : (s + 1) * out]
    h0 = call.states[0][s]
    rows, batch = h.shape[0], h0.shape[0]
    if not rows:
        return []
    if call.batch_sizes is None and call.resets is None and call.lengths is None:
        if reverse:
            return [(slice(0, rows - batch), h[batch:]), (slice(rows - batch, rows), h0)]
        return [(slice(batch, rows), h[: rows - batch]), (slice(0, batch), h0)]
    source = torch.cat((h, h0, h.new_zeros(1, out)))  # rows, then initial states, then a cleared one
    return [(slice(0, rows), source.index_select(0, previous_rows(call, reverse)))]
