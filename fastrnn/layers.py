"""Layers, directions, dropout between layers and ragged batches around the one op.

Symbols: T steps, B batch rows, N rows of a packed batch, I input features, H hidden size, P output
size (H, or proj_size), L layers, S directions (1 or 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from fastrnn import validation as check
from fastrnn import wavefront
from fastrnn.backends import check_name, choose
from fastrnn.backends.base import GATES, Backend, Call, Weights
from fastrnn.cells import Cell
from fastrnn.ordinary import ordinary
from fastrnn.packing import Packing
from fastrnn.problem import Problem, States, prepare
from fastrnn.recurrence import recurrence

FORWARD, BOTH = (False,), (False, True)  # per direction: does it run from the last step to the first
Batch = TypeVar("Batch", Tensor, PackedSequence)  # what goes in comes out


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
    save: str = GATES,
    return_states: bool = False,
    params: Sequence[States] = (),
) -> tuple[Any, States, States]:
    """What the modules and the functions above share; returns the output, the final states and all states if asked.

    `params` are the cell's per-unit parameters, for each of `weights` as many as the cell has; () for cells without.
    """
    problem = prepare(cell, input, hx, weights, reverse, batch_first, lengths, resets, return_states)
    query, packed = problem.query, problem.packed
    if params or cell.params:
        check.check_params(cell, params, weights, len(reverse))
        params = [tuple([p.to(problem.x.dtype) for p in own]) for own in params]  # autocast has cast the weights
        grad = query.grad or (torch.is_grad_enabled() and any(p.requires_grad for own in params for p in own))
        query = query._replace(grad=grad)
        problem = problem._replace(query=query)
    if query.T and query.B:
        engine = choose(query, backend).backend
        y, finals, trail = solve(engine, cell, problem, reverse, dropout, save, params)
    else:  # nothing to run, so any backend will do
        check_name(backend)
        y, finals, trail = empty(cell, problem, len(reverse), params)
    if packed is not None:
        if packed.unsorted_indices is not None:
            finals = tuple([a.index_select(1, packed.unsorted_indices) for a in finals])
        return PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), finals, trail
    if input.dim() == 2:  # type: ignore[union-attr]
        return y.squeeze(1), tuple([a.squeeze(1) for a in finals]), tuple([a.squeeze(2) for a in trail])
    if batch_first:
        return y.transpose(0, 1), finals, tuple([a.transpose(1, 2) for a in trail])
    return y, finals, trail


def solve(
    engine: Backend,
    cell: Cell,
    problem: Problem,
    reverse: tuple[bool, ...],
    dropout: float,
    save: str = GATES,
    params: Sequence[States] = (),
) -> tuple[Tensor, States, States]:
    """Run all layers; y (T, B, S*P), or (N, S*P) where a PackedSequence came in."""
    x, states, weights, query, packed, lengths, resets, trail = problem
    wave = wavefront.Decision(0, "chosen when compiled")
    if not is_compiling():
        wave = wavefront.decide(engine, query, len(weights) // len(reverse), trail)
    how = _How(engine, cell, reverse, dropout, save, trail, tuple(params), wave)
    if not query.ragged:
        return _layers(how, x, states, weights, None, None, resets)
    if packed is not None:
        return _solve_packed(how, problem)
    lengths = lengths.to(x.device)  # type: ignore[union-attr]
    if "padded" in engine.ragged_layouts or not ordinary((x, lengths)):  # where the values of `lengths` are not known
        if resets is not None:
            resets = resets & (torch.arange(query.T, device=x.device)[:, None] < lengths)
        return _layers(how, x, states, weights, lengths, None, resets)
    return _solve_lengths(how, problem)


class _How(NamedTuple):
    """What is the same for all layers."""

    engine: Backend
    cell: Cell
    reverse: tuple[bool, ...]
    dropout: float
    save: str
    trail: bool
    params: tuple[States, ...]
    wave: wavefront.Decision


def _solve_packed(how: _How, problem: Problem) -> tuple[Tensor, States, States]:
    x, states, weights, query, packed, _, resets, _ = problem
    assert packed is not None
    sizes = packed.batch_sizes
    if is_compiling() and not states:  # which tell B, where the values of batch_sizes are unknown
        widths = (query.P, query.H)[: how.cell.states]
        states = tuple([x.new_zeros(len(weights), query.B, n) for n in widths])
    if not is_compiling() and int(sizes[-1]) == query.B:  # all of one length: the rows lie as those of a padded batch
        x = x.view(query.T, query.B, query.I)
        y, finals, trail = _layers(how, x, states, weights, None, None, resets)
        return y.flatten(0, 1), finals, tuple([a.flatten(1, 2) for a in trail])
    if resets is not None:
        resets = Packing.of_batch_sizes(sizes, query.B, x.shape[0], x.device).pack(resets)
    if "packed" in how.engine.ragged_layouts:
        return _layers(how, x, states, weights, None, sizes, resets)
    packing = Packing.of_batch_sizes(sizes, query.B, x.shape[0], x.device)
    resets = None if resets is None else packing.unpack(resets)
    lengths = packing.lengths.to(x.device)
    y, finals, trail = _layers(how, packing.unpack(x), states, weights, lengths, None, resets)
    return packing.pack(y), finals, tuple([torch.stack([packing.pack(b) for b in a]) for a in trail])


def _solve_lengths(how: _How, problem: Problem) -> tuple[Tensor, States, States]:
    """A padded batch on an engine that takes the packed form: packed once before the layers, unpacked once after."""
    x, states, weights, query, _, lengths, resets, _ = problem
    lengths = lengths.cpu()  # type: ignore[union-attr]
    packing = Packing.of_lengths(lengths, query.T, x.device)
    if packing.batch_sizes.numel() == query.T and int(packing.batch_sizes[-1]) == query.B:  # none is shorter
        return _layers(how, x, states, weights, None, None, resets)
    if not packing.batch_sizes.numel():
        return empty(how.cell, problem, len(how.reverse), how.params)
    resets = None if resets is None else packing.pack(resets)
    live = packing.sort_live(states)
    y, finals, trail = _layers(how, packing.pack(x), live, weights, None, packing.batch_sizes, resets)
    unpacked = tuple([torch.stack([packing.unpack(b) for b in a]) for a in trail])
    return packing.unpack(y), packing.unsort(finals, states or (None,) * len(finals)), unpacked


def _layers(
    how: _How,
    x: Tensor,
    states: States,
    weights: Sequence[Weights],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, States, States]:
    engine, cell, reverse, dropout, save, trail, params, wave = how
    streams = len(reverse)
    if wave.steps and batch_sizes is None:
        done = wavefront.run(engine, cell, save, wave, dropout, x, states, weights, lengths, resets)
        if done is not None:
            return *done, ()
    if len(weights) == streams and not trail:
        call = Call(cell, x, states, tuple(weights), reverse, lengths, batch_sizes, resets, params)
        y, finals, _ = recurrence(engine, call, save)
        return y, finals, ()
    collected: list[States] = []
    trails: list[States] = []
    for k in range(0, len(weights), streams):
        if k and dropout:
            x = drop(x, dropout, True)
        own = tuple([a[k : k + streams] for a in states])
        of_layer = tuple(weights[k : k + streams]), reverse, lengths, batch_sizes, resets, params[k : k + streams]
        call = Call(cell, x, own, *of_layer)
        x, finals, rest = recurrence(engine, call, save, trail)
        collected.append(finals)
        if trail:
            trails.append((x, *[torch.cat(a.unbind(0), -1) for a in rest]))
    finals = tuple([torch.cat(layers) for layers in zip(*collected, strict=True)])
    return x, finals, tuple([torch.stack(layers) for layers in zip(*trails, strict=True)])


def empty(cell: Cell, problem: Problem, streams: int, params: Sequence[States] = ()) -> tuple[Tensor, States, States]:
    """No token at all: zeros (if anything), the states as they came, and zero gradients for whoever asks."""
    query, x, lead = problem.query, problem.x, len(problem.weights)
    y = x.new_zeros(query.T, query.B, streams * query.P)
    widths = (query.P, query.H)[: cell.states]
    states = problem.states or tuple([x.new_zeros(lead, query.B, n) for n in widths])
    trail: States = ()
    if problem.trail:
        trail = tuple([x.new_zeros(lead // streams, query.T, query.B, streams * n) for n in widths])
    if not query.grad:
        return y, tuple([a.clone() for a in states]), trail
    tensors = [x, *(t for w in problem.weights for t in w if t is not None), *(p for own in params for p in own)]
    nothing = torch.stack([t.flatten()[:0].sum() for t in tensors]).sum()  # zero, whatever they hold
    return y + nothing, tuple([a + nothing for a in states]), trail
