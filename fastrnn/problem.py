"""What a user hands to a layer, checked, and brought into the one layout that the layers compute in.

Symbols: T steps, B batch rows, N rows of a packed batch, I input features, H hidden size, P output
size (H, or proj_size), L layers, S directions (1 or 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fastrnn import validation as check
from fastrnn.autocast import autocast, autocasts
from fastrnn.backends.base import Query, Weights
from fastrnn.cells import Cell
from fastrnn.ordinary import traced
from fastrnn.scripting import check_traceable

States = tuple[Tensor, ...]


class Problem(NamedTuple):
    """A checked call, its input in the layout (T, B, I) or that of a PackedSequence."""

    x: Tensor  # (T, B, I) or (N, I)
    states: States  # each (L*S, B, H or P); () for zeros
    weights: Sequence[Weights]
    query: Query
    packed: PackedSequence | None = None  # what came in
    lengths: Tensor | None = None  # (B,)
    resets: Tensor | None = None  # (T, B)
    trail: bool = False  # all states are wanted


def prepare(
    cell: Cell,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    batch_first: bool,
    lengths: Any,
    resets: Any,
    return_states: bool = False,
) -> Problem:
    """Check everything, and bring it into the layout of `Problem`."""
    if traced():
        check_traceable(input, lengths, resets)
    packed = input if isinstance(input, PackedSequence) else None
    x: Tensor = input.data if packed is not None else input  # type: ignore[assignment]
    if autocasts(x):
        x, hx, weights = autocast(x, hx, weights)
    first, streams = weights[0], len(reverse)
    batched = True
    if packed is None:
        check.check_rank(x, (2, 3), "(T, I) or (T, B, I); (B, T, I) with batch_first")
        if x.dim() == 2:
            batched, x = False, x.unsqueeze(1)
        elif batch_first:
            x = x.transpose(0, 1)
        steps, batch, _ = x.shape
    else:
        if x.dim() != 2:
            raise RuntimeError(f"input: expected a PackedSequence with data of 2 dimensions, got {check.shape(x)}")
        packed = check.check_packed(packed)
        steps = packed.batch_sizes.numel()
        batch = _batch_of(packed)
    check.check_input(x, first.w_ih)
    grad = check.check_weights(cell, weights, streams)
    rows, out = first.w_hh.shape
    hidden = rows // cell.gates
    states: States = ()
    if hx is not None:
        lead = len(weights)
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
        first.w_ih.shape[1],
        hidden,
        out,
        streams,
        (grad or x.requires_grad) and torch.is_grad_enabled(),
        packed is not None or lengths is not None,
        resets is not None,
        return_states and cell.states > 1,
        lengths=lengths is not None,
        device_index=x.device.index or 0,
    )
    return Problem(x, states, weights, query, packed, lengths, resets, return_states)


def _batch_of(packed: PackedSequence) -> int:
    """B; while compiling the sizes are unknown, and the order of the rows tells it where there is one."""
    if is_compiling() and packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    return int(packed.batch_sizes[0])


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
