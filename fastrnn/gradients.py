"""What follows from a backend's backward: the gradients of the input, the weights and the biases.

A backend hands back the gradients at the gates, dgates; everything else is a matrix product over all
time steps, made here unless the backend has made it already. Symbols as in `fastrnn.backends.base`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.backends.base import FIELDS, Backend, Call, Gradients, Saved
from fastrnn.cells import Cell
from fastrnn.packing import Packing, pack_call, previous_rows

Optional = Tensor | None
_RECOMPUTED = 1 << 22  # pre-activations at a time where the tape is made anew


def backward(
    backend: Backend,
    call: Call,
    saved: Saved,
    y: Tensor,
    dy: Tensor,
    dfinals: tuple[Optional, ...],
    needed: tuple[bool, ...],
    last: bool = False,
    dc: Optional = None,
) -> list[Optional]:
    """Gradients of x, the states given, each stream's weights and per-unit parameters, None where not `needed`.

    Args:
        call: padded, or packed, in the form that `backend` takes.
        saved: as forward left it, with or without the tape.
        dy, dfinals: gradients of y and of the final states. dc: of the second state at every step, (S, N, H).
        last: the graph is not walked again, so that `saved.tape` may be overwritten.
    """
    grads = at_the_gates(backend, call, saved, y, dy, dfinals, needed, last, dc)
    dstates = grads.dstates
    dparams = [d for stream in grads.dparams for d in stream]
    if grads.dweights is not None:
        return [grads.dx, *dstates, *(w for stream in grads.dweights for w in stream), *dparams]
    first = 1 + len(call.states)
    assert grads.dgates is not None
    dx = grads.dx if grads.dx is not None or not needed[0] else input_gradient(call, grads.dgates)
    return [dx, *dstates, *weight_gradients(call, grads, y, needed[first:]), *dparams]


class _Entered(NamedTuple):
    """A call and the gradients of its outputs in the form that its backend takes."""

    packing: Packing | None
    call: Call | None  # None: no token at all
    y: Tensor
    dy: Tensor
    dfinals: tuple[Optional, ...]
    dc: Optional


def _enter(backend: Backend, call: Call, y: Tensor, douts: tuple[Optional, ...]) -> _Entered:
    count = call.cell.states
    dy = torch.zeros_like(y) if douts[0] is None else douts[0].contiguous()
    dfinals = douts[1 : 1 + count]
    trail = douts[1 + count] if len(douts) > 1 + count else None
    if call.lengths is None or "padded" in backend.ragged_layouts:
        return _Entered(None, call, y, dy, dfinals, None if trail is None else trail.flatten(1, -2))
    packing, packed = pack_call(call)
    dc = None if trail is None else torch.stack([packing.pack(a) for a in trail])
    live = tuple([None if d is None else packing.sort_live([d])[0] for d in dfinals])
    return _Entered(packing, packed, packing.pack(y), packing.pack(dy), live, dc)


def in_form(
    backend: Backend,
    call: Call,
    saved: Saved,
    y: Tensor,
    douts: tuple[Optional, ...],
    needed: tuple[bool, ...],
    last: bool = False,
) -> list[Optional]:
    """`backward` for a call in the form that users have, whichever its backend takes.

    `douts` are the gradients of y, of the final states and, where it was asked for, of the trail.
    """
    packing, own, own_y, dy, dfinals, dc = _enter(backend, call, y, douts)
    if own is None:
        return _of_nothing(call, douts[1 : 1 + call.cell.states], needed)
    grads = backward(backend, own, saved, own_y, dy, dfinals, needed, last, dc)
    if packing is None:
        return grads
    dx, first = grads[0], 1 + len(call.states)
    dstates = packing.unsort([a for a in grads[1:first] if a is not None], douts[1:first])
    return [None if dx is None else packing.unpack(dx), *dstates, *grads[first:]]


def of_each_sample(
    backend: Backend, call: Call, saved: Saved, y: Tensor, douts: tuple[Optional, ...], needed: tuple[bool, ...], n: int
) -> list[Optional]:
    """As `in_form`, for a batch made of n samples of B / n rows each: the weights' gradients are (n, ...).

    For cells without per-unit parameters, see `transforms`.
    """
    packing, own, own_y, dy, dfinals, dc = _enter(backend, call, y, douts)
    first = 1 + len(call.states)
    if own is None:
        grads = _of_nothing(call, douts[1 : 1 + call.cell.states], needed)
        return grads[:first] + [None if a is None else a.expand(n, *a.shape) for a in grads[first:]]
    raw = at_the_gates(backend, own, saved, own_y, dy, dfinals, needed, False, dc, gates=True)
    assert raw.dgates is not None
    dx = raw.dx if raw.dx is not None or not needed[0] else input_gradient(own, raw.dgates)
    dstates = raw.dstates
    if packing is not None:
        dx = None if dx is None else packing.unpack(dx)
        dstates = packing.unsort(dstates, douts[1:first])
        raw = raw._replace(
            dgates=_unpacked(packing, raw.dgates),
            dh=None if raw.dh is None else _unpacked(packing, raw.dh),
            m=None if raw.m is None else _unpacked(packing, raw.m),
        )
    return [dx, *dstates, *_weight_gradients_of_each(call, raw, y, needed[first:], n)]


def _unpacked(packing: Packing, rows: Tensor) -> Tensor:
    """(S, N, k) to (S, T * B, k)."""
    return torch.stack([packing.unpack(a).flatten(0, 1) for a in rows])


def _weight_gradients_of_each(
    call: Call, grads: Gradients, y: Tensor, needed: tuple[bool, ...], n: int
) -> list[Optional]:
    steps = call.x.shape[0]

    def each(rows: Tensor) -> Tensor:  # (T * n * B, k) to (n, T * B, k)
        return rows.view(steps, n, -1, rows.shape[-1]).transpose(0, 1).flatten(1, 2)

    assert grads.dgates is not None
    x, initial, out = each(call.x.flatten(0, 1)), call.initial(), []
    blocks = recurrent_blocks(call.cell, call.hidden)
    for s in range(len(call.weights)):
        need = needed[s * FIELDS : (s + 1) * FIELDS]
        dgates = each(grads.dgates[s])
        dr = torch.cat([dgates[..., columns] for _, columns in blocks], -1)  # in the order of W_hh's rows
        dxg = dgates[..., : call.cell.gates * call.hidden]
        out.append(dxg.mT @ x if need[0] else None)
        h = previous(call, s, _of_stream(y, s, call.out), initial[0][s])
        out.append(dr.mT @ each(_whole(h)) if need[1] else None)
        out.append(dxg.sum(1) if need[2] else None)
        out.append(dr.sum(1) if need[3] else None)
        out.append(each(grads.dh[s]).mT @ each(grads.m[s]) if need[4] and grads.dh is not None else None)  # type: ignore[index]
    return out


def _of_nothing(call: Call, dfinals: tuple[Optional, ...], needed: tuple[bool, ...]) -> list[Optional]:
    """No token in the batch: the states went through as they came."""
    grads: list[Optional] = [torch.zeros_like(a) if n and a is not None else None for a, n in zip(call.flat, needed)]  # noqa: B905
    for k in range(len(call.states)):
        d = dfinals[k]
        grads[1 + k] = grads[1 + k] if d is None else d.clone()
    return grads


def at_the_gates(
    backend: Backend,
    call: Call,
    saved: Saved,
    y: Tensor,
    dy: Tensor,
    dfinals: tuple[Optional, ...],
    needed: tuple[bool, ...],
    last: bool,
    dc: Optional,
    gates: bool = False,
) -> Gradients:
    """The backend's own part, its tape made anew where it was not saved."""
    if not call.states:
        needed = (needed[0], *(False,) * call.cell.states, *needed[1:])
    if call.cell.tape and saved.tape is None:
        saved, last = recompute(call, saved, y, backend.saved_dtypes(y.dtype)[0]), True
    return backend.backward(call, saved, y, dy, dfinals, needed, last, dc, gates)


def recompute(call: Call, saved: Saved, y: Tensor, dtype: torch.dtype) -> Saved:
    """The tape, in `dtype`, and m, from y and c: all states are known, so that no step waits for another."""
    cell, hidden, rows = call.cell, call.hidden, y.numel() // (len(call.weights) * call.out)
    kind = torch.float64 if y.dtype is torch.float64 else torch.float32
    x = call.x.reshape(-1, call.x.shape[-1])
    initial = call.initial()
    tape = x.new_empty(len(call.weights), rows, cell.tape * hidden, dtype=dtype)
    m = None if call.weights[0].w_hr is None else x.new_empty(len(call.weights), rows, hidden, dtype=kind)
    for s, w in enumerate(call.weights):
        w_ih, w_hh, b_ih, b_hh = [None if a is None else a.to(kind) for a in w[:4]]
        own = tuple([p.to(kind) for p in call.params[s]]) if call.params else ()
        before = [_whole(previous(call, s, _of_stream(y, s, call.out), initial[0][s]))]
        if saved.c is not None:
            before.append(_whole(previous(call, s, saved.c[s], initial[1][s].to(saved.c.dtype))))
        count = max(1, _RECOMPUTED // (cell.gates * hidden))
        for first in range(0, rows, count):  # a part at a time, as what is calculated with is wider than what is kept
            part = slice(first, first + count)
            states = tuple([a[part].to(kind) for a in before])
            xg = linear(x[part].to(kind), w_ih, b_ih).chunk(cell.gates, -1)  # type: ignore[arg-type]
            r = linear(states[0], w_hh, b_hh).chunk(cell.gates, -1)  # type: ignore[arg-type]
            new, values = cell.step(xg, r, states, own, torch.sigmoid, torch.tanh, torch.where)
            tape[s, part] = torch.cat(values, -1)
            if m is not None:
                m[s, part] = new[0]
    return Saved(tape, saved.c, m)


def input_gradient(call: Call, dgates: Tensor) -> Tensor:
    """dx from dgates (S, N, D*H), summed over the streams."""
    dx: Optional = None
    for w, d in zip(call.weights, dgates, strict=True):
        dxg = d[:, : call.cell.gates * call.hidden]
        dx = dxg @ w.w_ih if dx is None else dx.addmm_(dxg, w.w_ih)
    assert dx is not None
    return dx.view(call.x.shape)


def weight_gradients(call: Call, grads: Gradients, y: Tensor, needed: tuple[bool, ...]) -> list[Optional]:
    """Of each stream's weights, one product each over all time steps."""
    cell, hidden = call.cell, call.hidden
    assert grads.dgates is not None
    x = call.x.reshape(-1, call.x.shape[-1])
    out: list[Optional] = []
    for s in range(len(call.weights)):
        need = needed[s * FIELDS : (s + 1) * FIELDS]
        dgates = grads.dgates[s]  # (N, D*H)
        dxg = dgates[:, : cell.gates * hidden]
        db_ih = dxg.sum(0) if need[2] or need[3] else None
        out.append(dxg.t() @ x if need[0] else None)
        out.append(_recurrent_weight_grad(call, s, dgates, y) if need[1] else None)
        out.append(db_ih if need[2] else None)
        out.append(_recurrent_bias_grad(cell, dgates, db_ih, hidden) if need[3] else None)
        out.append(grads.dh[s].t() @ grads.m[s] if need[4] and grads.dh is not None and grads.m is not None else None)
    return out


def recurrent_blocks(cell: Cell, hidden: int) -> list[tuple[slice, slice]]:
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


def _recurrent_bias_grad(cell: Cell, dgates: Tensor, db_ih: Optional, hidden: int) -> Optional:
    if db_ih is None or not cell.split:
        return None if db_ih is None else db_ih.clone()  # not one tensor for two parameters
    db = torch.empty_like(db_ih)
    for rows, columns in recurrent_blocks(cell, hidden):
        db[rows] = db_ih[rows] if rows == columns else dgates[:, columns].sum(0)
    return db


def _recurrent_weight_grad(call: Call, s: int, dgates: Tensor, y: Tensor) -> Tensor:
    """sum over t of dr_t^T h_{t-1}."""
    pieces = previous(call, s, _of_stream(y, s, call.out), call.states[0][s] if call.states else None)
    w_hh = call.weights[s].w_hh
    dw = torch.zeros_like(w_hh, dtype=dgates.dtype)
    for rows, columns in recurrent_blocks(call.cell, call.hidden):
        for span, h in pieces:
            dw[rows].addmm_(dgates[span, columns].t(), h)
    return dw


def _of_stream(y: Tensor, s: int, out: int) -> Tensor:
    return y.reshape(-1, y.shape[-1])[:, s * out : (s + 1) * out]


def _whole(pieces: list[tuple[slice, Tensor]]) -> Tensor:
    """The rows of `previous` as one tensor."""
    return torch.cat([a for _, a in sorted(pieces, key=lambda piece: piece[0].start)])


def previous(call: Call, s: int, after: Tensor, initial: Optional) -> list[tuple[slice, Tensor]]:
    """The state that entered each row's step, as runs (rows, state); views of `after` where that is possible.

    Args:
        after: (N, n), the state after each row's step. initial: (B, n), or None where zeros may be left out.
    """
    reverse, rows = call.reverse[s], after.shape[0]
    if not rows:
        return []
    batch = call.batch
    # Rows beyond a row's length have no part in any product, and forward no other row comes after them.
    if call.batch_sizes is None and call.resets is None and (call.lengths is None or not reverse):
        edge, rest = slice(0, batch), slice(batch, rows)
        if reverse:
            edge, rest = slice(rows - batch, rows), slice(0, rows - batch)
        pieces = [(rest, after[batch:] if reverse else after[: rows - batch])]
        return pieces if initial is None else [*pieces, (edge, initial)]
    if initial is None:
        initial = after.new_zeros(batch, after.shape[1])
    source = torch.cat((after, initial, after.new_zeros(1, after.shape[1])))  # rows, initial states, a cleared one
    return [(slice(0, rows), source.index_select(0, previous_rows(call, reverse)))]
