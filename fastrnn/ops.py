"""The op as PyTorch's dispatcher knows it: fastrnn::forward and fastrnn::backward.

torch.compile and torch.export put them into their graphs whole, with T and B symbolic. Eager calls do
not come here, since an autograd.Function that calls a backend at once costs less. torch.onnx.export finds
ONNX's operators in its place (`onnx`).

    x (T, B, I) or (N, I) with batch_sizes; states: all or none (AOTInductor turns an empty list into None);
    weights: each stream's, without those that are not there;
    save: "gates", "states" or "" (see `fastrnn.backends.base.Saved`)
    forward -> y, final states, saved (flat, as large as a batch without shorter rows would need),
        trail: the second state at every step (S, T, B, H), or nothing
    backward -> the gradients that `needed` (x, states, weights) asks for
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from fastrnn import differentiable, gradients, packing
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import GATES, NOTHING, STATES, Backend, Call, Output, Saved, Weights, flatten
from fastrnn.cells import CELLS
from fastrnn.validation import check_batch_sizes, check_length_range

Tensors = Sequence[Tensor]
_CALL = (
    "str cell, str backend, Tensor x, Tensor[]? states, Tensor[] weights, bool[] reverse, "
    "Tensor? lengths, Tensor? batch_sizes, Tensor? resets"
)
_LIBRARY: Any = torch.library.Library("fastrnn", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    f"forward({_CALL}, str save, bool trail) -> (Tensor y, Tensor[] finals, Tensor[] saved, Tensor[] trail)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    f"backward({_CALL}, Tensor y, Tensor[] saved, Tensor?[] douts, bool[] needed) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def run(backend: Backend, call: Call, save: str, trail: bool) -> Output:
    """`call` through the dispatcher."""
    single = call.single_step
    if single:
        call = call.as_sequence()
    given = flatten(call.weights)
    weights = [w for w in given if w is not None]
    inputs = (call.x, *call.states, *weights)
    if not (torch.is_grad_enabled() and any(a.requires_grad for a in inputs)):
        save = NOTHING
    y, finals, _, states = torch.ops.fastrnn.forward(
        call.cell.name,
        backend.name,
        call.x,
        list(call.states),
        weights,
        list(call.reverse),
        call.lengths,
        call.batch_sizes,
        call.resets,
        save,
        trail,
    )
    if single:
        finals = [a.squeeze(0) for a in finals]
        return Output(finals[0], tuple(finals))
    return Output(y, tuple(finals), tuple(states))


def _call(
    cell: str,
    x: Tensor,
    states: Tensors | None,
    weights: Tensors,
    reverse: Sequence[bool],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
) -> Call:
    per = len(weights) // len(reverse)  # 2 and a bias (2 more) or a projection (1 more)
    streams = []
    for s in range(len(reverse)):
        own: list[Any] = list(weights[s * per : (s + 1) * per])
        b_ih, b_hh = own[2:4] if per >= 4 else (None, None)
        streams.append(Weights(own[0], own[1], b_ih, b_hh, own[-1] if per % 2 else None))
    return Call(CELLS[cell], x, tuple(states or ()), tuple(streams), tuple(reverse), lengths, batch_sizes, resets)


def _widths(call: Call, save: str) -> tuple[int, int, int]:
    """Values per stream and row of tape, c and m."""
    cell, projected = call.cell, call.weights[0].w_hr is not None
    tape = cell.tape * call.hidden if save == GATES else 0
    return tape, call.hidden if cell.states > 1 and save else 0, call.hidden if projected and save == GATES else 0


def _saved_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _forward(cell: str, backend: str, x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    *fields, save, trail = rest
    call, engine = _call(cell, x, *fields), BACKENDS[backend]
    if call.lengths is not None:
        check_length_range(call.lengths, x.shape[0])
    if call.batch_sizes is not None:
        check_batch_sizes(call.batch_sizes, x.shape[0])
    keep = save
    if engine.differentiable:
        keep = NOTHING  # backward runs it again
    y, finals, saved = packing.run(engine, call, keep or (STATES if trail else NOTHING))
    if y.data_ptr() == finals[0].data_ptr():
        y = y.clone()
    states = []
    if trail and saved.c is not None:
        c = saved.c
        if call.lengths is not None and engine.ragged_layout == "packed":
            packed, _ = packing.pack_call(call)
            c = torch.stack([packed.unpack(a) for a in c])
        states.append(differentiable.at_every_step(call, c).clone())
    room = len(call.weights) * (y.numel() // max(1, y.shape[-1]))
    return y, list(finals), [_flat(a, room * n, x) for a, n in zip(saved, _widths(call, save), strict=True)], states


def _flat(a: Tensor | None, size: int, like: Tensor) -> Tensor:
    """`a` as a vector of `size` elements, the first of them its own."""
    if a is not None and a.numel() == size:
        return a.view(-1)
    out = like.new_empty(size, dtype=_saved_dtype(like))
    if a is not None and size:
        out[: a.numel()] = a.view(-1)
    return out


def _forward_fake(
    cell: str, backend: str, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    *fields, save, trail = rest
    call = _call(cell, x, *fields)
    streams = len(call.weights)
    batch = call.states[0].shape[1] if call.states else x.shape[-2]  # packed calls always bring states
    finals = [x.new_empty(streams, batch, n) for n in (call.out, call.hidden)[: call.cell.states]]
    y = x.new_empty(*call.rows, streams * call.out)
    room = streams
    for n in call.rows:
        room = room * n
    saved = [x.new_empty(room * n, dtype=_saved_dtype(x)) for n in _widths(call, save)]
    states = [x.new_empty(streams, *call.rows, call.hidden)] if trail and call.cell.states > 1 else []
    return y, finals, saved, states


def _backward(cell: str, backend: str, x: Tensor, *rest: Any) -> list[Tensor]:
    *fields, y, saved, douts, needed = rest
    call, engine = _call(cell, x, *fields), BACKENDS[backend]
    flat = (call.x, *call.states, *flatten(call.weights))
    spread = _spread(call, needed)
    if engine.differentiable:
        grads = differentiable.backward(call, flat, tuple(douts), spread, create_graph=False, backend=engine)
        return [torch.zeros_like(a) if g is None else g.contiguous() for a, g, n in zip(flat, grads, spread) if n]  # type: ignore[arg-type]  # noqa: B905
    with torch.no_grad():
        own = _unflat(call, saved, x)
        if own.c is None and call.cell.states > 1 and y.numel():  # the graph was made where no gradient was wanted
            own = packing.run(engine, call, GATES).saved
        grads = gradients.in_form(engine, call, own, y, tuple(douts), spread)
    return [g.contiguous() for g, need in zip(grads, spread, strict=True) if need and g is not None]


def _unflat(call: Call, saved: Tensors, x: Tensor) -> Saved:
    """What `_flat` made of a `Saved`, back in its shape: there are as many rows as there are tokens."""
    streams, rows = len(call.weights), 1
    for n in call.rows:
        rows *= n
    if call.lengths is not None:
        rows = int(call.lengths.sum())
    hidden = call.hidden
    widths = (call.cell.tape * hidden, hidden, hidden)
    out = []
    for a, n in zip(saved, widths, strict=True):
        out.append(a[: streams * rows * n].view(streams, rows, n) if a.numel() else None)
    return Saved(*out)


def _spread(call: Call, needed: Sequence[bool]) -> tuple[bool, ...]:
    """`needed` with an entry for every field of the weights."""
    first = 1 + len(call.states)
    own = iter(needed[first:])
    return (*needed[:first], *[w is not None and next(own) for w in flatten(call.weights)])


def _backward_fake(cell: str, backend: str, x: Tensor, *rest: Any) -> list[Tensor]:
    states, weights, needed = rest[0] or (), rest[1], rest[-1]
    return [a.new_empty(a.shape) for a, need in zip((x, *states, *weights), needed, strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    cell, backend, x, states, weights, reverse, lengths, batch_sizes, resets, _, _ = inputs
    states = states or ()
    y, finals, saved, _ = output
    ctx.kind = (cell, backend, list(reverse), len(states), len(weights), len(finals))
    ctx.save_for_backward(x, *states, *weights, lengths, batch_sizes, resets, y, *saved)
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, dy: Tensor | None, dfinals: Any, dsaved: Any, dtrail: Any) -> tuple[Any, ...]:
    cell, backend, reverse, n_states, n_weights, n_finals = ctx.kind
    x, *rest = ctx.saved_tensors
    states, rest = rest[:n_states], rest[n_states:]
    weights, rest = rest[:n_weights], rest[n_weights:]
    lengths, batch_sizes, resets, y, *saved = rest
    x_needed, states_needed, weights_needed = ctx.needs_input_grad[2:5]
    needed = [x_needed, *(states_needed or []), *weights_needed]
    douts = [dy, *(dfinals or [None] * n_finals), *(dtrail or [])]
    fields = (x, states, weights, reverse, lengths, batch_sizes, resets)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        call = _call(cell, *fields)
        spread, flat = _spread(call, needed), (call.x, *call.states, *flatten(call.weights))
        grads = differentiable.backward(call, flat, tuple(douts), spread)
        found = iter([g for g, need in zip(grads, spread, strict=True) if need])
    else:
        found = iter(torch.ops.fastrnn.backward(cell, backend, *fields, y, saved, douts, needed))
    own = [next(found) if need else None for need in needed]
    first = 1 + n_states
    dstates = own[1:first] if isinstance(states_needed, list) else None  # as they came
    return None, None, own[0], dstates, own[first:], *(None,) * 6


def _traced(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op goes into a graph whole, but into those that torch.onnx.export makes as ONNX has it."""
    if mode.pre_dispatch or not torch.onnx.is_in_onnx_export():
        return mode.__torch_dispatch__(func, types, args, kwargs)
    from fastrnn import onnx

    cell, _, x, *fields, _, trail = args
    with mode:
        y, finals, saved = onnx.forward(_call(cell, x, *fields), trail)
        return y, list(finals), [x.new_empty(0) for _ in saved], [] if saved.c is None else [saved.c]


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", _forward, _device)
    _LIBRARY.impl("backward", _backward, _device)
torch.library.register_fake("fastrnn::forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("fastrnn::backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("fastrnn::forward", _derivative, setup_context=_setup, lib=_LIBRARY)
torch.library.register_torch_dispatch("fastrnn::forward", ProxyTorchDispatchMode, _traced, lib=_LIBRARY)
