"""The one op: a layer's recurrence on any backend, with its gradients.

A call takes one of four ways:

    eager        plain tensors: the backend is called at once, recorded by one autograd.Function
    compiled     torch.compile, torch.export, fake tensors and dispatch modes see registered ops (`ops`)
    transformed  torch.func's vmap and grad have rules of their own (`transforms`)
    reference    PyTorch operations (`differentiable`), for backends that are made of them, forward-mode
                 differentiation, torch.jit.trace and tensors of other kinds
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import differentiable, gradients, ops, scripting, transforms
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import FIELDS, GATES, NOTHING, STATES, Backend, Call, Output, Saved
from fastrnn.backends.cpu import CODES, load
from fastrnn.backends.reference import REFERENCE
from fastrnn.cells import Cell
from fastrnn.ordinary import dual, faked, ordinary, plain, traced, transformed, watched
from fastrnn.transforms import Meta

_REVERSE = (False, True)  # directions
_MASKS = 3  # lengths, batch_sizes, resets: saved with the other tensors, so that a change in place is noticed


def recurrence(backend: Backend, call: Call, save: str = GATES, trail: bool = False) -> Output:
    """Run `call` on `backend`, recording it for autograd when a gradient may be asked for.

    Args:
        save: what to keep for backward, GATES or STATES (whose backward makes the gates anew).
        trail: return the second state at every step, too.
    """
    if is_compiling():
        if transformed():  # torch.func within torch.compile
            return differentiable.run(REFERENCE, call, trail)
        return ops.run(backend, call, save, trail)
    if traced():
        return scripting.forward(call)
    if backend.differentiable:
        return differentiable.run(backend, call, trail)
    if call.single_step and not backend.takes_single_steps:
        finals = tuple([a.squeeze_(0) for a in recurrence(backend, call.as_sequence(), save).finals])
        return Output(finals[0], finals)
    flat = call.flat
    if not ordinary(flat):
        return _out_of_the_ordinary(backend, call, flat, save, trail)
    if torch.is_grad_enabled():
        for a in flat:
            if a is not None and a.requires_grad:
                meta = Meta(backend, call.cell, call.reverse, len(call.states), save, trail)
                outs = _Recurrence.apply(meta, None, call.lengths, call.batch_sizes, call.resets, *flat)  # type: ignore[no-untyped-call]
                return _output(meta, call.single_step, outs)
    y, finals, saved = backend.forward(call, STATES if trail else NOTHING)
    if trail and saved.c is not None:
        return Output(y, finals, (differentiable.at_every_step(call, saved.c),))
    return Output(y, finals)


def record(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor | None],
    outs: tuple[Tensor, ...],
    saved: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The outputs of a call that the CPU's engine has run already, with their place in autograd's graph."""
    meta = Meta(BACKENDS["cpu"], cell, _REVERSE[: len(weights) // FIELDS], len(states), GATES, False)
    made: tuple[Tensor, ...] = _Recurrence.apply(meta, (outs, saved), None, None, None, x, *states, *weights)  # type: ignore[no-untyped-call]
    return made


def _out_of_the_ordinary(
    backend: Backend, call: Call, flat: tuple[Tensor | None, ...], save: str, trail: bool
) -> Output:
    if transformed():
        if transforms.applicable():
            return transforms.run(backend, call, save, trail)
    elif not dual() and (faked(flat) or plain(flat)):
        return ops.run(backend, call, save, trail)
    return differentiable.run(REFERENCE, call, trail)


def _output(meta: Meta, single: bool, outs: tuple[Tensor, ...]) -> Output:
    """From (y, *finals, *trail); a single step has no y of its own."""
    if single:
        return Output(outs[0], outs)
    n = 1 + meta.cell.states
    return Output(outs[0], outs[1:n], outs[n:])


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meta: Meta, made: Any, *tensors: Tensor) -> Any:
        call = meta.call(tensors[:_MASKS], tensors[_MASKS:])
        if made is None:
            y, finals, saved = meta.backend.forward(call, meta.save)
        else:
            outs, saved = made[0], Saved(*made[1])
            y, finals = outs[0], outs if call.single_step else outs[1:]
        ctx.meta, ctx.inputs = meta, len(tensors)
        ctx.hooked, ctx.quick = hooked(), made is not None and len(meta.reverse) == 1
        kept: Tensor | None = y
        if meta.cell.states == 1:
            kept = _keep_editable(ctx, y)
        ctx.save_for_backward(*tensors, kept, *saved)
        ctx.set_materialize_grads(False)
        if call.single_step:
            return finals
        if meta.trail and saved.c is not None:
            return y, *finals, differentiable.at_every_step(call, saved.c)
        return y, *finals

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        tensors, meta = ctx.saved_tensors, ctx.meta
        head: tuple[Tensor | None, ...] = (None,) * (2 + _MASKS)
        flat, saved = tensors[_MASKS : ctx.inputs], tensors[ctx.inputs + 1 :]
        if all(d is None for d in douts):
            return head + (None,) * len(flat)
        needed = ctx.needs_input_grad[2 + _MASKS :]
        again = torch.is_grad_enabled()  # create_graph=True
        # Whoever hooks into saved tensors may keep the tape, which must then not be overwritten.
        keeps = keeps_graph()
        last = not (ctx.hooked or keeps)
        y: Any = None if again else _kept(ctx, tensors)
        if not keeps:
            ctx.y = None  # as autograd frees what was saved; a further walk fails before it comes here
        if ctx.quick and not again and not watched():
            found = _quick_backward(meta, flat, y, saved, douts, needed, last)
            if found is not None:
                return head + tuple(found)
        call = meta.call(tensors[:_MASKS], flat)
        if again or not ordinary(douts):  # or a transformation
            return head + tuple(differentiable.backward(call, flat, douts, needed))
        run = _step_backward if call.single_step else gradients.in_form
        if torch._C._is_any_autocast_enabled():  # which is about the forward
            with torch.autocast(y.device.type, enabled=False):
                return head + tuple(run(meta.backend, call, Saved(*saved), y, douts, needed, last))
        return head + tuple(run(meta.backend, call, Saved(*saved), y, douts, needed, last))


def _keep_editable(ctx: Any, y: Tensor) -> Tensor | None:
    """What to save of an output that the caller may edit in place, as that of torch.nn's GRU and RNN (not its LSTM).

    Nothing: y is kept aside, without autograd's check that nobody has edited it. `_kept` makes it anew if somebody
    has. Hooks for saved tensors get a copy.
    """
    if ctx.hooked:
        return y.clone()
    ctx.y = y.detach()
    ctx.version = y._version
    return None


def _kept(ctx: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """y as forward left it."""
    y: Tensor | None = tensors[ctx.inputs]
    if y is not None:
        return y
    y = ctx.y
    assert y is not None
    if y._version != ctx.version:
        meta: Meta = ctx.meta
        y = meta.backend.forward(meta.call(tensors[:_MASKS], tensors[_MASKS : ctx.inputs]), NOTHING).y
    return y


def _quick_backward(
    meta: Meta,
    flat: tuple[Tensor, ...],
    y: Tensor,
    saved: tuple[Tensor, ...],
    douts: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    last: bool,
) -> Any:
    """Gradients of a call that the engine's short way has run (`quick`) by the way back of the same kind, or None."""
    if any(d is not None and torch._C._functorch.is_legacy_batchedtensor(d) for d in douts):
        return None
    engine: Any = load()[0]
    threads = torch.get_num_threads()
    return engine.quick_backward(CODES[meta.cell.name], flat, meta.states, y, saved, douts, needed, last, threads)


def _step_backward(
    backend: Backend,
    call: Call,
    saved: Saved,
    y: Tensor,
    douts: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    last: bool,
) -> list[Tensor | None]:
    """Of a single step, as of a sequence of one."""
    outs = (None, *[None if d is None else d.unsqueeze(0) for d in douts])
    grads = gradients.in_form(backend, call.as_sequence(), saved, y.unsqueeze(0), outs, needed, last)
    own = 1 + len(call.states)
    return [None if g is None else g.squeeze(0) for g in grads[:own]] + grads[own:]


def hooked() -> bool:
    """Does somebody hook into saved tensors?"""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is not None and ask(True) is not None


def keeps_graph() -> bool:
    """Will this graph be walked again? Assumed where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())
