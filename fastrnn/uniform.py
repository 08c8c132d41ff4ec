"""A call in the form that registered ops and torch.func need: sizes follow from sizes, never from values.

What a forward saves comes as three vectors (tape, c, m), as large as a batch without shorter rows would
need, empty where there is none; no two results share memory, and none shares it with an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastrnn import differentiable, gradients, packing
from fastrnn.backends.base import GATES, NOTHING, STATES, Backend, Call, Saved

Grads = list[Tensor | None]
Flat = tuple[Tensor | None, ...]  # `Call.flat`


def forward(backend: Backend, call: Call, save: str, trail: bool) -> tuple[Tensor, Flat, list[Tensor], list[Tensor]]:
    """y, the final states, what is saved, and the trail (one tensor or none)."""
    keep = NOTHING if backend.differentiable else save  # whose backward runs the forward again
    with no_autocast(call.x):
        y, finals, saved = packing.run(backend, call, keep or (STATES if trail else NOTHING))
    if y.numel() and y.data_ptr() == finals[0].data_ptr():
        y = y.clone()
    states = []
    if trail and saved.c is not None:
        c = saved.c
        if call.lengths is not None and "padded" not in backend.ragged_layouts:
            packed, _ = packing.pack_call(call)
            c = torch.stack([packed.unpack(a) for a in c])
        states.append(differentiable.at_every_step(call, c).clone())
    sizes = vector_sizes(backend, call, save)
    dtypes = backend.saved_dtypes(call.x.dtype)
    return y, finals, [_vector(a, n, call.x, d) for a, n, d in zip(saved, sizes, dtypes, strict=True)], states


def backward(
    backend: Backend,
    call: Call,
    flat: Flat,
    y: Tensor,
    vectors: Sequence[Tensor],
    douts: Sequence[Tensor | None],
    needed: Sequence[bool],
    samples: int | None = None,
) -> list[Tensor]:
    """Gradients of what is `needed` of `flat`, contiguous.

    With `samples` the batch is made of so many blocks of rows, and those of the weights are (samples, ...).
    """
    douts, needed = tuple(douts), tuple(needed)
    with torch.no_grad(), no_autocast(call.x):
        if backend.differentiable:
            grads = derivative(call, flat, douts, needed, samples, create_graph=False, backend=backend)
        else:
            saved = _saved(backend, call, vectors)
            if saved.c is None and call.cell.states > 1 and y.numel():  # a graph made where no gradient was wanted
                saved = packing.run(backend, call, GATES).saved
            grads = (
                gradients.in_form(backend, call, saved, y, douts, needed)
                if samples is None
                else gradients.of_each_sample(backend, call, saved, y, douts, needed, samples)
            )
    return _given(call, flat, grads, needed, samples)


def second_derivative(
    call: Call,
    flat: Flat,
    douts: Flat,
    needed: tuple[bool, ...],
    dgrads: Sequence[Tensor | None],
    samples: int | None = None,
) -> tuple[Grads, Grads]:
    """Of `backward`: gradients of `flat` and of `douts`, which autograd takes of its graph on the reference."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [_own(a, create) for a in (*flat, *douts)]
        f, d = tuple(own[: len(flat)]), tuple(own[len(flat) :])
        made = [g for g, need in zip(derivative(call, f, d, needed, samples), needed, strict=True) if need]
        pairs = [(g, v) for g, v in zip(made, dgrads, strict=True) if g is not None and v is not None]
        pairs = [(g, v) for g, v in pairs if g.requires_grad]
        inputs = [a for a in own if a is not None]
        second: Any = iter([None] * len(inputs))
        if pairs:
            outs, seeds = zip(*pairs, strict=True)
            second = iter(torch.autograd.grad(outs, inputs, seeds, create_graph=create, allow_unused=True))
    found = [None if a is None else next(second) for a in own]
    return found[: len(flat)], found[len(flat) :]


def derivative(
    call: Call,
    flat: Flat,
    douts: Flat,
    needed: tuple[bool, ...],
    samples: int | None,
    create_graph: bool = True,
    **options: Any,
) -> Grads:
    """`differentiable.backward`, sample by sample where those of the weights are wanted so."""
    if samples is None:
        return differentiable.backward(call, flat, douts, needed, create_graph, **options)
    rows, own = call.batch // samples, 1 + len(call.states)
    each = []
    for i in range(samples):

        def block(a: Tensor | None, axis: int, start: int = i * rows) -> Any:
            return None if a is None else a.narrow(axis, start, rows)

        part = call._replace(lengths=block(call.lengths, 0), resets=block(call.resets, 1))
        mine = tuple([block(a, 1) for a in flat[:own]]) + flat[own:]
        ends = tuple([block(d, 1 if k <= call.cell.states else 2) for k, d in enumerate(douts)])
        part = part._replace(x=mine[0], states=mine[1:own])
        each.append(differentiable.backward(part, mine, ends, needed, create_graph, **options))
    joined: Grads = []
    for k, group in enumerate(zip(*each, strict=True)):
        there: Any = group
        none = any(g is None for g in group)
        joined.append(None if none else torch.cat(there, 1) if k < own else torch.stack(there))
    return joined


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """The call has been cast: nothing in it, or in its backward, is to be cast again."""
    kind = like.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def vector_sizes(backend: Backend, call: Call, save: str) -> tuple[Any, Any, Any]:
    """Of the tape, c and m; integers, or a tracer's symbols for them."""
    if backend.differentiable or not save:
        return 0, 0, 0
    rows: Any = len(call.weights)
    for n in call.rows:
        rows = rows * n
    cell, hidden, gates = call.cell, call.hidden, save == GATES
    projected = call.weights[0].w_hr is not None
    tape, c, m = gates * cell.tape * hidden, (cell.states > 1) * hidden, (gates and projected) * hidden
    return rows * tape, rows * c, rows * m


def _vector(a: Tensor | None, size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`a` as a vector of `size` elements, the first of them its own."""
    if a is not None and size and a.numel() == size:
        return a.view(-1)
    out = like.new_zeros(size, dtype=dtype)
    if a is not None and size:
        out[: a.numel()] = a.view(-1)
    return out


def _saved(backend: Backend, call: Call, vectors: Sequence[Tensor]) -> Saved:
    """What `_vector` was made of: there are as many rows as there are tokens."""
    streams, rows = len(call.weights), 1
    for n in call.rows:
        rows *= n
    if call.lengths is not None and "padded" not in backend.ragged_layouts:
        rows = int(call.lengths.sum())
    hidden = call.hidden
    widths = (call.cell.tape * hidden, hidden, hidden)
    out = []
    for a, n in zip(vectors, widths, strict=True):
        out.append(a[: streams * rows * n].view(streams, rows, n) if a.numel() else None)
    return Saved(*out)


def _given(call: Call, flat: Flat, grads: Grads, needed: Sequence[bool], samples: int | None) -> list[Tensor]:
    """Those that are needed, zero where nothing depends on it."""
    out = []
    for k, (a, g, need) in enumerate(zip(flat, grads, needed, strict=True)):
        if not need or a is None:
            continue
        lead = () if samples is None or k <= len(call.states) else (samples,)
        out.append(a.new_zeros(*lead, *a.shape) if g is None else g.contiguous())
    return out


def _own(a: Tensor | None, create: bool) -> Tensor | None:
    """A leaf, or a view that continues its graph, to differentiate with respect to."""
    if a is None:
        return None
    return a.view_as(a) if create and a.requires_grad else a.detach().requires_grad_()
