"""torch.func on the op: vmap and grad run on the backend itself.

vmap over data folds the mapped axis into B; per-sample gradients of the weights are then one batched
product of the gates' gradients. vmap over weights (ensembles) runs the members one after another.
Forward mode, and a gradient of a gradient within torch.func, are left to the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from fastrnn import differentiable, gradients, packing
from fastrnn.backends.base import NOTHING, STATES, Backend, Call, Output, Saved, flatten, unflatten
from fastrnn.cells import Cell

_MASKS, _SAVED = 3, len(Saved._fields)
_BATCH_AXES = (0, 0, 1, 1, 1, 1)  # of lengths, batch_sizes, resets, x and the states
_OURS = {TransformType.Vmap, TransformType.Grad}


def applicable() -> bool:
    """Are the transformations that are active those that have a rule here?"""
    kinds = [level.key() for level in get_interpreter_stack() or ()]
    return _OURS.issuperset(kinds) and kinds.count(TransformType.Grad) < 2


def run(backend: Backend, call: Call, save: str, trail: bool) -> Output:
    """`call` under torch.func."""
    single = call.single_step
    if single:
        call = call.as_sequence()
    differentiated = any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())
    if not (torch.is_grad_enabled() and (differentiated or _recorded(call))):
        save = NOTHING
    meta = Meta(backend, call.cell, call.reverse, len(call.states), save, trail)
    masks = (call.lengths, call.batch_sizes, call.resets)
    outs = _Forward.apply(meta, *masks, call.x, *call.states, *flatten(call.weights))  # type: ignore[no-untyped-call]
    finals = outs[1 : 1 + call.cell.states]
    if single:
        finals = tuple([a.squeeze(0) for a in finals])
        return Output(finals[0], finals)
    return Output(outs[0], finals, outs[len(outs) - 1 :] if trail and call.cell.states > 1 else ())


def _recorded(call: Call) -> bool:
    return any(a is not None and a.requires_grad for a in (call.x, *call.states, *flatten(call.weights)))


class Meta(NamedTuple):
    """The part of a call that is no tensor."""

    backend: Backend
    cell: Cell
    reverse: tuple[bool, ...]
    states: int
    save: str
    trail: bool

    def call(self, masks: Any, flat: Any) -> Call:
        n = self.states
        return Call(self.cell, flat[0], tuple(flat[1 : 1 + n]), unflatten(flat[1 + n :]), self.reverse, *masks)


class _Forward(torch.autograd.Function):
    """(meta, masks, x, states, weights) to (y, finals, saved, trail)."""

    @staticmethod
    def forward(meta: Meta, *tensors: Any) -> Any:
        call = meta.call(tensors[:_MASKS], tensors[_MASKS:])
        y, finals, saved = packing.run(meta.backend, call, meta.save or (STATES if meta.trail else NOTHING))
        trail: tuple[Tensor, ...] = ()
        if meta.trail and saved.c is not None:
            c = saved.c
            if call.lengths is not None and meta.backend.ragged_layout == "packed":
                order, _ = packing.pack_call(call)
                c = torch.stack([order.unpack(a) for a in c])
            trail = (differentiable.at_every_step(call, c).clone(),)
        return (y, *finals, *[y.new_empty(0) if a is None else a for a in saved], *trail)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.meta, ctx.inputs, n = inputs[0], len(inputs) - 1, 1 + inputs[0].cell.states
        saved = output[n : n + _SAVED]
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*inputs[1:], output[0], *saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *douts: Any) -> Any:
        tensors, meta, n = ctx.saved_tensors, ctx.meta, 1 + ctx.meta.cell.states
        masks, flat = tensors[:_MASKS], tensors[_MASKS : ctx.inputs]
        y, saved = tensors[ctx.inputs], tensors[ctx.inputs + 1 :]
        needed = tuple([a is not None and n for a, n in zip(flat, ctx.needs_input_grad[1 + _MASKS :], strict=True)])
        wanted = (*douts[:n], *douts[n + _SAVED :])
        if all(d is None for d in wanted):
            return (None,) * (1 + ctx.inputs)
        shape = _Shape(meta, needed, len(flat))
        grads = iter(_Backward.apply(shape, *masks, *flat, y, *saved, *wanted))  # type: ignore[no-untyped-call]
        return (None,) * (1 + _MASKS) + tuple([next(grads) if need else None for need in needed])

    @staticmethod
    def vmap(info: Any, in_dims: Any, meta: Meta, *tensors: Any) -> Any:
        n, dims, data = info.batch_size, in_dims[1:], _MASKS + 1 + meta.states
        if not _foldable(tensors, dims, data, len(tensors)):
            return _stacked([_Forward.apply(meta, *_take(i, tensors, dims)) for i in range(n)])  # type: ignore[no-untyped-call]
        folded = [_fold(n, a, d, at) for a, d, at in zip(tensors[:data], dims, _BATCH_AXES, strict=False)]
        outs = _Forward.apply(meta, *folded, *tensors[data:])  # type: ignore[no-untyped-call]
        first = 1 + meta.cell.states
        axes = [1] * first + [None] * _SAVED + [2] * (len(outs) - first - _SAVED)
        # What is saved stays folded and passes for not mapped: our own backward, which folds alike, is its only reader.
        return tuple([_unfold(n, a, at) for a, at in zip(outs, axes, strict=True)]), tuple(axes)


class _Shape(NamedTuple):
    """What `_Backward` must know besides tensors."""

    meta: Meta
    needed: tuple[bool, ...]  # of x, the states and the weights
    flat: int  # how many those are

    def split(self, tensors: Any) -> tuple[Any, Any, Any, Saved, Any]:
        """masks, flat, y, saved, douts."""
        at = _MASKS + self.flat
        saved = Saved(*[a if a.numel() else None for a in tensors[at + 1 : at + 1 + _SAVED]])
        return tensors[:_MASKS], tensors[_MASKS:at], tensors[at], saved, tensors[at + 1 + _SAVED :]


class _Backward(torch.autograd.Function):
    """(shape, masks, x, states, weights, y, saved, douts) to the gradients that are needed."""

    @staticmethod
    def forward(shape: _Shape, *tensors: Any) -> Any:
        masks, flat, y, saved, douts = shape.split(tensors)
        call = shape.meta.call(masks, flat)
        grads = gradients.in_form(shape.meta.backend, call, saved, y, douts, shape.needed)
        return tuple([g for g, need in zip(grads, shape.needed, strict=True) if need])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shape, ctx.inputs = inputs[0], len(inputs) - 1
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dgrads: Any) -> Any:
        """The second derivative, which autograd takes of the first one's own graph on the reference."""
        shape = ctx.shape
        masks, flat, _, saved, douts = shape.split(ctx.saved_tensors)
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            own = [_own(a, create) for a in (*flat, *douts)]
            f, d = tuple(own[: len(flat)]), tuple(own[len(flat) :])
            grads = differentiable.backward(shape.meta.call(masks, f), f, d, shape.needed)
            made = [g for g, need in zip(grads, shape.needed, strict=True) if need]
            pairs = [(g, v) for g, v in zip(made, dgrads, strict=True) if g is not None and v is not None]
            inputs = [a for a in own if a is not None]
            second = iter(
                torch.autograd.grad(
                    [g for g, _ in pairs], inputs, [v for _, v in pairs], create_graph=create, allow_unused=True
                )
            )
        found = [None if a is None else next(second) for a in own]
        head, middle = (None,) * (1 + _MASKS), (None,) * (1 + len(saved))
        return (*head, *found[: len(flat)], *middle, *found[len(flat) :])

    @staticmethod
    def vmap(info: Any, in_dims: Any, shape: _Shape, *tensors: Any) -> Any:
        n, dims, meta = info.batch_size, in_dims[1:], shape.meta
        data = _MASKS + 1 + meta.states
        if not _foldable(tensors, dims, data, shape.flat):
            return _stacked([_Backward.apply(shape, *_take(i, tensors, dims)) for i in range(n)])  # type: ignore[no-untyped-call]
        folded = [_fold(n, a, d, at) for a, d, at in zip(tensors[:data], dims, _BATCH_AXES, strict=False)]
        _, flat, y, saved, douts = shape.split(tensors)
        y_dim, dout_dims = dims[_MASKS + shape.flat], dims[len(dims) - len(douts) :]
        axes = [1] * (1 + meta.cell.states) + [2]
        call = meta.call(folded[:_MASKS], (*folded[_MASKS:], *flat[1 + meta.states :]))
        douts = tuple([_fold(n, a, d, at) for a, d, at in zip(douts, dout_dims, axes, strict=False)])
        grads = gradients.of_each_sample(meta.backend, call, saved, _fold(n, y, y_dim, 1), douts, shape.needed, n)
        out = [_unfold(n, g, 1) if k < 1 + meta.states else g for k, g in enumerate(grads)]
        where = [1 if k < 1 + meta.states else 0 for k in range(len(grads))]
        kept = [(g, at) for g, at, need in zip(out, where, shape.needed, strict=True) if need]
        return tuple([g for g, _ in kept]), tuple([at for _, at in kept])


def _own(a: Tensor | None, create: bool) -> Tensor | None:
    """A leaf, or a view that continues its graph, to differentiate with respect to."""
    if a is None:
        return None
    return a.view_as(a) if create and a.requires_grad else a.detach().requires_grad_()


def _foldable(tensors: Any, dims: Any, data: int, flat: int) -> bool:
    """Does the mapped axis belong to the data (masks, x, states) alone? Rows of a packed batch do not fold."""
    mapped = any(d is not None for d in dims[:data])
    return mapped and tensors[1] is None and all(d is None for d in dims[data : _MASKS + flat])


def _fold(n: int, a: Any, dim: int | None, at: int) -> Any:
    """The mapped axis `dim`, n long, and the batch axis `at` as one axis."""
    if a is None:
        return None
    a = a.movedim(dim, at) if dim is not None else a.unsqueeze(at).expand(*a.shape[:at], n, *a.shape[at:])
    return a.flatten(at, at + 1)


def _unfold(n: int, a: Tensor | None, at: int | None) -> Tensor | None:
    return a if a is None or at is None else a.view(*a.shape[:at], n, -1, *a.shape[at + 1 :])


def _take(i: int, tensors: Any, dims: Any) -> list[Any]:
    return [a if d is None else a.select(d, i) for a, d in zip(tensors, dims, strict=True)]


def _stacked(each: list[tuple[Any, ...]]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    outs = tuple([torch.stack(group) for group in zip(*each, strict=True)])
    return outs, (0,) * len(outs)
