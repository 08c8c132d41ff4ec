"""torch.func on the op: vmap and grad run on the backend itself.

vmap over data folds the mapped axis into B; per-sample gradients of the weights are then one batched
product of the gates' gradients. vmap over weights (ensembles) runs the members one after another, as does any vmap
of a cell with per-unit parameters, whose gradients a backend adds up over the whole batch.
Forward mode, and a gradient of a gradient within torch.func, are left to the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from fastrnn import uniform
from fastrnn.backends.base import NOTHING, Backend, Call, Output, Saved, split_flat
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
    outs = _Forward.apply(meta, *masks, *call.flat)  # type: ignore[no-untyped-call]
    finals = outs[1 : 1 + call.cell.states]
    if single:
        finals = tuple([a.squeeze(0) for a in finals])
        return Output(finals[0], finals)
    return Output(outs[0], finals, outs[len(outs) - 1 :] if trail and call.cell.states > 1 else ())


def _recorded(call: Call) -> bool:
    return any(a is not None and a.requires_grad for a in call.flat)


class Meta(NamedTuple):
    """The part of a call that is no tensor."""

    backend: Backend
    cell: Cell
    reverse: tuple[bool, ...]
    states: int
    save: str
    trail: bool

    def call(self, masks: Any, flat: Any) -> Call:
        n = 1 + self.states
        weights, params = split_flat(self.cell, flat[n:], len(self.reverse))
        return Call(self.cell, flat[0], tuple(flat[1:n]), weights, self.reverse, masks[0], masks[1], masks[2], params)


class _Forward(torch.autograd.Function):
    """(meta, masks, x, states, weights, per-unit parameters) to (y, finals, saved, trail)."""

    @staticmethod
    def forward(meta: Meta, *tensors: Any) -> Any:
        call = meta.call(tensors[:_MASKS], tensors[_MASKS:])
        y, finals, saved, trail = uniform.forward(meta.backend, call, meta.save, meta.trail)
        return (y, *finals, *saved, *trail)

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
        if not _foldable(meta, tensors, dims, data, len(tensors)):
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
    needed: tuple[bool, ...]  # of x, the states, the weights and the per-unit parameters
    flat: int  # how many those are
    samples: int | None = None  # blocks of rows, each of which wants weights' gradients of its own

    def split(self, tensors: Any) -> tuple[Any, Any, Any, Any, Any]:
        """masks, flat, y, saved, douts."""
        at = _MASKS + self.flat
        saved = tensors[at + 1 : at + 1 + _SAVED]
        return tensors[:_MASKS], tensors[_MASKS:at], tensors[at], saved, tensors[at + 1 + _SAVED :]


class _Backward(torch.autograd.Function):
    """(shape, masks, x, states, weights, per-unit parameters, y, saved, douts) to the gradients that are needed."""

    @staticmethod
    def forward(shape: _Shape, *tensors: Any) -> Any:
        masks, flat, y, saved, douts = shape.split(tensors)
        call = shape.meta.call(masks, flat)
        return tuple(uniform.backward(shape.meta.backend, call, flat, y, saved, douts, shape.needed, shape.samples))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shape, ctx.inputs = inputs[0], len(inputs) - 1
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dgrads: Any) -> Any:
        shape = ctx.shape
        masks, flat, _, saved, douts = shape.split(ctx.saved_tensors)
        call = shape.meta.call(masks, flat)
        found, dd = uniform.second_derivative(call, flat, douts, shape.needed, dgrads, shape.samples)
        return (*(None,) * (1 + _MASKS), *found, *(None,) * (1 + len(saved)), *dd)

    @staticmethod
    def vmap(info: Any, in_dims: Any, shape: _Shape, *tensors: Any) -> Any:
        n, dims, meta = info.batch_size, in_dims[1:], shape.meta
        data = _MASKS + 1 + meta.states
        if not _foldable(meta, tensors, dims, data, shape.flat):
            return _stacked([_Backward.apply(shape, *_take(i, tensors, dims)) for i in range(n)])  # type: ignore[no-untyped-call]
        folded = [_fold(n, a, d, at) for a, d, at in zip(tensors[:data], dims, _BATCH_AXES, strict=False)]
        at = _MASKS + shape.flat
        ends, axes = at + 1 + _SAVED, [1] * (1 + meta.cell.states) + [2]
        y = _fold(n, tensors[at], dims[at], 1)
        douts = [_fold(n, a, d, axis) for a, d, axis in zip(tensors[ends:], dims[ends:], axes, strict=False)]
        inner = shape._replace(samples=n * (shape.samples or 1))
        grads = _Backward.apply(inner, *folded, *tensors[data:at], y, *tensors[at + 1 : ends], *douts)  # type: ignore[no-untyped-call]
        of_data = [k <= meta.states for k, need in enumerate(shape.needed) if need]
        own = () if shape.samples is None else (shape.samples,)
        out = [_unfold(n, g, 1) if d else g.view(n, *own, *g.shape[1:]) for g, d in zip(grads, of_data, strict=True)]
        return tuple(out), tuple([int(d) for d in of_data])


def _foldable(meta: Meta, tensors: Any, dims: Any, data: int, flat: int) -> bool:
    """Does the mapped axis belong to the data (masks, x, states) alone? Rows of a packed batch do not fold."""
    if meta.cell.params:
        return False
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
