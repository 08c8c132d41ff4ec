"""Layers, directions, dropout between layers and ragged batches around the one op.

Symbols: T steps, B batch rows, N rows of a packed batch, I input features, H hidden size, P output
size (H, or proj_size), L layers, S directions (1 or 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.jit._trace import is_tracing
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from fastrnn import validation as check
from fastrnn.backends import check_name, choose
from fastrnn.backends.base import Backend, Call, Query, Weights
from fastrnn.cells import Cell
from fastrnn.packing import Packing
from fastrnn.recurrence import recurrence
from fastrnn.scripting import check_traceable

FORWARD, BOTH = (False,), (False, True)  # per direction: does it run from the last step to the first
States = tuple[Tensor, ...]
Batch = TypeVar("Batch", Tensor, PackedSequence)  # what goes in comes out


class Problem(NamedTuple):
    """A checked call, its input in the layout (T, B, I) or that of a PackedSequence."""

    x: Tensor  # (T, B, I) or (N, I)
    states: States  # each (L*S, B, H or P)
    weights: Sequence[Weights]
    query: Query
    packed: PackedSequence | None = None  # what came in
    lengths: Tensor | None = None  # (B,)
    resets: Tensor | None = None  # (T, B)


def run(
    cell: Cell,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    batch_first: bool,
    dropout: float,
    lengths: Any,
    resets: Any,
    backend: str,
) -> tuple[Any, States]:
    """What the modules and the functions above share; returns the output and the final states."""
    problem = prepare(cell, input, hx, weights, reverse, batch_first, lengths, resets)
    if problem.query.T and problem.query.B:
        y, finals = solve(choose(problem.query, backend).backend, cell, problem, reverse, dropout)
    else:  # nothing to run, so any backend will do
        check_name(backend)
        y, finals = empty(problem, len(reverse))
    if problem.packed is not None:
        p = problem.packed
        if p.unsorted_indices is not None:
            finals = tuple(a.index_select(1, p.unsorted_indices) for a in finals)
        return PackedSequence(y, p.batch_sizes, p.sorted_indices, p.unsorted_indices), finals
    if input.dim() == 2:  # type: ignore[union-attr]
        return y.squeeze(1), tuple(a.squeeze(1) for a in finals)
    return y.transpose(0, 1) if batch_first else y, finals


def prepare(
    cell: Cell,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    batch_first: bool,
    lengths: Any,
    resets: Any,
) -> Problem:
    """Check everything, and bring it into the layout of `Problem`."""
    if is_tracing():  # type: ignore[no-untyped-call]
        check_traceable(input, lengths, resets)
    packed = input if isinstance(input, PackedSequence) else None
    x: Tensor = input.data if packed is not None else input  # type: ignore[assignment]
    first, streams = weights[0], len(reverse)
    if autocasts(x):
        x, hx, weights = autocast(x, hx, weights)
        first = weights[0]
    batched = True
    if packed is None:
        check.check_rank(x, (2, 3), "(T, I) or (T, B, I); (B, T, I) with batch_first")
        batched = x.dim() == 3
        x = (x.transpose(0, 1) if batch_first else x) if batched else x.unsqueeze(1)
        steps, batch = x.shape[0], x.shape[1]
    else:
        if x.dim() != 2:
            raise RuntimeError(f"input: expected a PackedSequence with data of 2 dimensions, got {check.shape(x)}")
        packed = check.check_packed(packed)
        steps, batch = packed.batch_sizes.numel(), int(packed.batch_sizes[0])
    check.check_input(x, first.w_ih)
    grad = check.check_weights(cell, weights, streams)
    rows, out = first.w_hh.shape
    hidden = rows // cell.gates
    lead = len(weights)
    if hx is None:
        states = zero_states(cell, x, lead, batch, hidden, out)
    else:
        states = check.hx_tuple(hx, cell.states, 3 if batched else 2)
        grad |= check.check_states(states, x, (lead, batch) if batched else (lead,), hidden, out)
        if not batched:
            states = tuple([a.unsqueeze(1) for a in states])
        elif packed is not None and packed.sorted_indices is not None:
            states = tuple([a.index_select(1, packed.sorted_indices) for a in states])
    if lengths is not None:
        lengths = _lengths(lengths, steps, batch, batched, packed)
    if resets is not None:
        resets = _resets(resets, steps, batch, batched, batch_first, x.device, packed)
    query = Query(
        cell.name,
        x.device.type,
        x.dtype,
        steps,
        batch,
        x.shape[-1],
        hidden,
        out,
        streams,
        (grad or x.requires_grad) and torch.is_grad_enabled(),
        packed is not None or lengths is not None,
        resets is not None,
    )
    return Problem(x, states, weights, query, packed, lengths, resets)


def zero_states(cell: Cell, x: Tensor, lead: int, batch: int, hidden: int, out: int) -> States:
    h = x.new_zeros(lead, batch, out)
    if cell.states == 1:
        return (h,)
    return h, h if hidden == out else x.new_zeros(lead, batch, hidden)  # nobody writes to them


def _lengths(lengths: Any, steps: int, batch: int, batched: bool, packed: PackedSequence | None) -> Tensor:  # (B,)
    if packed is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own")
    checked = check.as_lengths(lengths, batch, batched)
    check.check_length_range(checked, steps)
    return checked


def _resets(
    resets: Tensor,
    steps: int,
    batch: int,
    batched: bool,
    batch_first: bool,
    device: torch.device,
    packed: PackedSequence | None,
) -> Tensor:  # (T, B), in the order of x
    batch_first = batch_first and packed is None
    check.check_resets(resets, ((batch, steps) if batch_first else (steps, batch)) if batched else (steps,), device)
    if not batched:
        return resets.unsqueeze(1)
    if packed is not None and packed.sorted_indices is not None:
        return resets.index_select(1, packed.sorted_indices)
    return resets.t() if batch_first else resets


def autocasts(x: Any) -> bool:
    if not torch._C._is_any_autocast_enabled():  # as torch.nn asks
        return False
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast(x: Tensor, hx: Any, weights: Sequence[Weights]) -> tuple[Tensor, Any, Sequence[Weights]]:
    """Under autocast everything takes its dtype, but fp64, as for torch.nn on a GPU."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.to(dtype) if a.is_floating_point() and a.dtype != torch.float64 else a
        return a if a is None else tuple(cast(v) for v in a)

    return cast(x), cast(hx), [Weights(*cast(w)) for w in weights]


def solve(
    engine: Backend, cell: Cell, problem: Problem, reverse: tuple[bool, ...], dropout: float
) -> tuple[Tensor, States]:
    """Run all layers; y (T, B, S*P), or (N, S*P) where a PackedSequence came in."""
    x, states, weights, query, packed, lengths, resets = problem
    if not query.ragged:
        return _layers(engine, cell, x, states, weights, reverse, dropout, None, None, resets)
    if packed is not None:
        return _solve_packed(engine, cell, problem, reverse, dropout)
    if engine.ragged_layout == "padded":
        lengths = lengths.to(x.device)  # type: ignore[union-attr]
        if resets is not None:
            resets = resets & (torch.arange(query.T, device=x.device)[:, None] < lengths)
        return _layers(engine, cell, x, states, weights, reverse, dropout, lengths, None, resets)
    return _solve_lengths(engine, cell, problem, reverse, dropout)


def _solve_packed(
    engine: Backend, cell: Cell, problem: Problem, reverse: tuple[bool, ...], dropout: float
) -> tuple[Tensor, States]:
    x, states, weights, query, packed, _, resets = problem
    assert packed is not None
    sizes = packed.batch_sizes
    if int(sizes[-1]) == query.B:  # all of one length: the rows lie as those of a padded batch
        x = x.view(query.T, query.B, query.I)
        y, finals = _layers(engine, cell, x, states, weights, reverse, dropout, None, None, resets)
        return y.flatten(0, 1), finals
    packing = None
    if resets is not None or engine.ragged_layout == "padded":
        packing = Packing.of_batch_sizes(sizes, query.B, x.device)
        resets = None if resets is None else packing.pack(resets)
    if engine.ragged_layout == "packed":
        return _layers(engine, cell, x, states, weights, reverse, dropout, None, sizes, resets)
    assert packing is not None
    resets = None if resets is None else packing.unpack(resets)
    lengths = packing.lengths.to(x.device)
    y, finals = _layers(engine, cell, packing.unpack(x), states, weights, reverse, dropout, lengths, None, resets)
    return packing.pack(y), finals


def _solve_lengths(
    engine: Backend, cell: Cell, problem: Problem, reverse: tuple[bool, ...], dropout: float
) -> tuple[Tensor, States]:
    """A padded batch on an engine that takes the packed form: packed once before the layers, unpacked once after."""
    x, states, weights, query, _, lengths, resets = problem
    lengths = lengths.cpu()  # type: ignore[union-attr]
    packing = Packing.of_lengths(lengths, query.T, x.device)
    if packing.batch_sizes.numel() == query.T and int(packing.batch_sizes[-1]) == query.B:  # none is shorter
        return _layers(engine, cell, x, states, weights, reverse, dropout, None, None, resets)
    if not packing.batch_sizes.numel():
        return empty(problem, len(reverse))
    live = int(packing.batch_sizes[0])
    states = tuple(packing.sort(a) for a in states)
    idle = tuple(a[:, live:] for a in states)  # rows of length zero, which come out as they went in
    resets = None if resets is None else packing.pack(resets)
    y, finals = _layers(
        engine,
        cell,
        packing.pack(x),
        tuple(a[:, :live] for a in states),
        weights,
        reverse,
        dropout,
        None,
        packing.batch_sizes,
        resets,
    )
    if live < query.B:
        finals = tuple(torch.cat(pair, 1) for pair in zip(finals, idle, strict=True))
    return packing.unpack(y), tuple(packing.unsort(a) for a in finals)


def _layers(
    engine: Backend,
    cell: Cell,
    x: Tensor,
    states: States,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    dropout: float,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, States]:
    streams = len(reverse)
    if len(weights) == streams:
        y, finals, _ = recurrence(engine, Call(cell, x, states, tuple(weights), reverse, lengths, batch_sizes, resets))
        return y, finals
    collected: list[States] = []
    for k in range(0, len(weights), streams):
        if k and dropout:
            x = drop(x, dropout, True)
        own = tuple(a[k : k + streams] for a in states)
        call = Call(cell, x, own, tuple(weights[k : k + streams]), reverse, lengths, batch_sizes, resets)
        x, finals, _ = recurrence(engine, call)
        collected.append(finals)
    return x, tuple(torch.cat(layers) for layers in zip(*collected, strict=True))


def empty(problem: Problem, streams: int) -> tuple[Tensor, States]:
    """No token at all: zeros (if anything), the states as they came, and zero gradients for whoever asks."""
    query = problem.query
    y = problem.x.new_zeros(query.T, query.B, streams * query.P)
    if not query.grad:
        return y, tuple(a.clone() for a in problem.states)
    tensors = [problem.x, *(t for w in problem.weights for t in w if t is not None)]
    nothing = torch.stack([t.flatten()[:0].sum() for t in tensors]).sum()  # zero, whatever they hold
    return y + nothing, tuple(a + nothing for a in problem.states)
