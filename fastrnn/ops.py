"""The op as PyTorch's dispatcher knows it: fastrnn::forward and fastrnn::backward.

torch.compile and torch.export put them into their graphs whole, with T and B symbolic. Eager calls do
not come here, since an autograd.Function that calls a backend at once costs less. torch.onnx.export finds
ONNX's operators in its place (`onnx`).

    x (T, B, I) or (N, I) with batch_sizes; states: all or none (AOTInductor turns an empty list into None);
    weights: each stream's, without those that are not there, then each stream's per-unit parameters;
    save: "gates", "states" or "" (see `fastrnn.backends.base.Saved`)
    forward -> y, final states, saved (flat, as large as a batch without shorter rows would need),
        trail: the second state at every step (S, T, B, H), or nothing
    backward -> the gradients that `needed` (x, states, weights) asks for
        douts: of the gradients of y, the final states and the trail those that are `given`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from fastrnn import uniform
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import NOTHING, Backend, Call, Output, Weights
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
    f"backward({_CALL}, Tensor y, Tensor[] saved, Tensor[] douts, bool[] given, bool[] needed) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def run(backend: Backend, call: Call, save: str, trail: bool) -> Output:
    """`call` through the dispatcher."""
    single = call.single_step
    if single:
        call = call.as_sequence()
    elif call.batch_sizes is not None:
        call = call._replace(states=call.initial())
    weights = [w for w in call.flat[1 + len(call.states) :] if w is not None]
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
    count, n = len(reverse), CELLS[cell].params
    end = len(weights) - n * count
    per = end // count  # 2 and a bias (2 more) or a projection (1 more)
    params = tuple([tuple(weights[i : i + n]) for i in range(end, len(weights), n)]) if n else ()
    streams = []
    for s in range(count):
        own: list[Any] = list(weights[s * per : (s + 1) * per])
        b_ih, b_hh = own[2:4] if per >= 4 else (None, None)
        streams.append(Weights(own[0], own[1], b_ih, b_hh, own[-1] if per % 2 else None))
    masks = (lengths, batch_sizes, resets)
    return Call(CELLS[cell], x, tuple(states or ()), tuple(streams), tuple(reverse), *masks, params)


def _forward(cell: str, backend: str, x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    *fields, save, trail = rest
    call = _call(cell, x, *fields)
    if call.lengths is not None:
        check_length_range(call.lengths, x.shape[0])
    if call.batch_sizes is not None:
        check_batch_sizes(call.batch_sizes, x.shape[0])
        if not call.states:
            raise ValueError("states: expected with batch_sizes, as they tell B")
        if call.batch != int(call.batch_sizes[0]):
            raise ValueError(f"states: expected B = batch_sizes[0] = {int(call.batch_sizes[0])}, got {call.batch}")
    y, finals, saved, states = uniform.forward(BACKENDS[backend], call, save, trail)
    return y, [a for a in finals if a is not None], saved, states


def _forward_fake(
    cell: str, backend: str, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    *fields, save, trail = rest
    call = _call(cell, x, *fields)
    streams = len(call.weights)
    batch = call.states[0].shape[1] if call.states else x.shape[-2]  # packed calls always bring states
    finals = [x.new_empty(streams, batch, n) for n in (call.out, call.hidden)[: call.cell.states]]
    y = x.new_empty(*call.rows, streams * call.out)
    sizes, dtypes = uniform.vector_sizes(BACKENDS[backend], call, save), BACKENDS[backend].saved_dtypes(x.dtype)
    saved = [x.new_empty(n, dtype=d) for n, d in zip(sizes, dtypes, strict=True)]
    states = [x.new_empty(streams, *call.rows, call.hidden)] if trail and call.cell.states > 1 else []
    return y, finals, saved, states


def _backward(cell: str, backend: str, x: Tensor, *rest: Any) -> list[Tensor]:
    *fields, y, saved, douts, given, needed = rest
    call = _call(cell, x, *fields)
    with _recorded():
        return uniform.backward(BACKENDS[backend], call, call.flat, y, saved, _all(douts, given), _spread(call, needed))


def _spread(call: Call, needed: Sequence[bool]) -> tuple[bool, ...]:
    """`needed` with an entry for every field of the weights."""
    own = iter(needed)
    return tuple([a is not None and next(own) for a in call.flat])


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd works in here, too, though the dispatcher has left its level: some backends' backward is autograd's."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def _all(douts: Tensors, given: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """None for those that are not given: autograd does not look into a list that holds None."""
    own = iter(douts)
    return tuple([next(own) if there else None for there in given])


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
    there, given = [d for d in douts if d is not None], [d is not None for d in douts]
    found = iter(torch.ops.fastrnn.backward(cell, backend, *fields, y, saved, there, given, needed))
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


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    cell, _, x, states, weights, reverse, lengths, batch_sizes, resets, _, saved, douts, given, needed = inputs
    count = None if states is None else len(states)
    ctx.kind = (cell, list(reverse), count, len(weights), len(saved), list(given), list(needed))
    ctx.save_for_backward(x, *(states or ()), *weights, lengths, batch_sizes, resets, *douts)
    ctx.set_materialize_grads(False)


def _second_derivative(ctx: Any, dgrads: Any) -> tuple[Any, ...]:
    cell, reverse, count, n_weights, n_saved, given, needed = ctx.kind
    x, *rest = ctx.saved_tensors
    n_states = count or 0
    states, rest = rest[:n_states], rest[n_states:]
    weights, rest = rest[:n_weights], rest[n_weights:]
    lengths, batch_sizes, resets, *douts = rest
    call = _call(cell, x, states, weights, reverse, lengths, batch_sizes, resets)
    flat = call.flat
    found, dd = uniform.second_derivative(call, flat, _all(douts, given), _spread(call, needed), dgrads)
    dd = [d for d, there in zip(dd, given, strict=True) if there]
    own = [g for g, a in zip(found, flat, strict=True) if a is not None]
    first = 1 + n_states
    dstates = None if count is None else own[1:first]
    return None, None, own[0], dstates, own[first:], *(None,) * 5, [None] * n_saved, dd, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", _forward, _device)
    _LIBRARY.impl("backward", _backward, _device)
torch.library.register_fake("fastrnn::forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("fastrnn::backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("fastrnn::forward", _derivative, setup_context=_setup, lib=_LIBRARY)
torch.library.register_torch_dispatch("fastrnn::forward", ProxyTorchDispatchMode, _traced, lib=_LIBRARY)
torch.library.register_autograd("fastrnn::backward", _second_derivative, setup_context=_setup_second, lib=_LIBRARY)
