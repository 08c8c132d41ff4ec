"""Batches of sequences of different lengths: the padded and the packed form, and rows between them.

The packed form is that of PackedSequence: step t holds the rows of the `batch_sizes[t]` longest
sequences, longest first. Everything here is index arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn.backends.base import Backend, Call, Result, Saved
from fastrnn.ordinary import dual, plain, transformed


class Packing(NamedTuple):
    """How the rows of a padded (T, B) batch lie in its packed form."""

    steps: int  # T of the padded form
    order: Tensor  # (B,): batch row that stands at each packed position, longest first
    lengths: Tensor  # (B,): in the packed order, on the CPU
    batch_sizes: Tensor  # (longest,) int64, on the CPU
    rows: Tensor  # (N,): row of the flattened padded batch, per packed row

    @staticmethod
    def of_lengths(lengths: Tensor, steps: int, device: torch.device) -> Packing:
        """From lengths (B,), on the CPU, in any order, zeros allowed."""
        ordered, order = torch.sort(lengths.long(), descending=True, stable=True)
        batch = order.numel()
        longest = int(ordered[0]) if batch else 0
        live = torch.arange(longest, device="cpu")[:, None] < ordered
        index = (torch.arange(longest, device="cpu")[:, None] * batch + order)[live]
        return Packing(steps, order.to(device), ordered, live.sum(1), index.to(device))

    @staticmethod
    def of_batch_sizes(batch_sizes: Tensor, batch: int, rows: int, device: torch.device) -> Packing:
        """From the batch_sizes of a PackedSequence of `batch` sequences and `rows` rows; they keep their order."""
        order = torch.arange(batch, device="cpu")
        lengths = (batch_sizes[:, None] > order).sum(0)
        # Sizes come from sizes alone, never from values, which a tracer does not have.
        ends, row = torch.cumsum(batch_sizes, 0), torch.arange(rows, device="cpu")
        time = torch.searchsorted(ends, row, right=True)
        index = time * batch + row - (ends - batch_sizes)[time]
        return Packing(batch_sizes.numel(), order.to(device), lengths, batch_sizes, index.to(device))

    def pack(self, padded: Tensor) -> Tensor:
        """(T, B, ...) to (N, ...)."""
        if _by_operations(padded):
            return padded.reshape(-1, *padded.shape[2:]).index_select(0, self.rows)
        packed: Tensor = _Pack.apply(padded, self)  # type: ignore[no-untyped-call]
        return packed

    def unpack(self, rows: Tensor) -> Tensor:
        """(N, ...) to (T, B, ...), zero where there is no token."""
        if _by_operations(rows):
            blank = rows.new_zeros(self.steps * self.order.numel(), *rows.shape[1:])
            return blank.index_copy(0, self.rows, rows).reshape(self.steps, self.order.numel(), *rows.shape[1:])
        padded: Tensor = _Unpack.apply(rows, self)  # type: ignore[no-untyped-call]
        return padded

    @property
    def live(self) -> int:
        """Rows that have a token at all."""
        return int(self.batch_sizes[0]) if self.batch_sizes.numel() else 0

    def sort_live(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """States (S, B, H) from the batch's order to the packed one, without rows of length zero."""
        order = self.order[: self.live]
        return tuple([a.index_select(1, order) for a in states])

    def unsort(self, live: Sequence[Tensor], others: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Back again; rows of length zero are taken from `others` (S, B, H), zeros if None."""
        back, idle = torch.argsort(self.order), self.order[self.live :]
        out = []
        for a, other in zip(live, others, strict=True):
            if idle.numel():
                rest = a.new_zeros(a.shape[0], idle.numel(), a.shape[2])
                a = torch.cat((a, rest if other is None else other.index_select(1, idle)), 1)
            out.append(a.index_select(1, back))
        return tuple(out)


def _by_operations(a: Tensor) -> bool:
    """Must PyTorch see what is done? Otherwise the two functions below, which cost less, know the derivative."""
    return is_compiling() or transformed() or dual() or not plain((a,))


class _Pack(torch.autograd.Function):
    """The derivative of a gather by distinct rows is a plain copy back; autograd's own would add row by row."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return padded.flatten(0, 1).index_select(0, packing.rows)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return ctx.packing.unpack(d), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        steps, batch = packing.steps, packing.order.numel()
        padded = rows.new_zeros(steps * batch, *rows.shape[1:])
        return padded.index_copy_(0, packing.rows, rows).view(steps, batch, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return ctx.packing.pack(d), None


def previous_rows(call: Call, reverse: bool) -> Tensor:
    """For each row, where the h that entered its step is found.

    Entries below N are rows of y, N + b is the initial state of batch row b, and N + B is the
    cleared state that follows a reset.
    """
    batch, device = call.batch, call.x.device
    if call.batch_sizes is None:  # everything on the device
        steps = call.x.shape[0]
        total = steps * batch
        index = torch.arange(total, device=device)
        position = index % batch
        other = index // batch + (1 if reverse else -1)
        exists = (other >= 0) & (other < steps)
        if call.lengths is not None and reverse:
            exists &= other < call.lengths.long()[position]
        rows = torch.where(exists, other * batch + position, total + position)
    else:
        sizes = call.batch_sizes
        steps, starts = sizes.numel(), torch.cumsum(sizes, 0) - sizes
        time = torch.repeat_interleave(torch.arange(steps, device="cpu"), sizes)
        total = time.numel()
        position = torch.arange(total, device="cpu") - starts[time]
        other = time + (1 if reverse else -1)
        inside = other.clamp(0, steps - 1)
        exists = (other >= 0) & (other < steps) & (position < sizes[inside])
        rows = torch.where(exists, starts[inside] + position, total + position).to(device)
    if call.resets is not None:
        cut = call.resets.reshape(-1)
        cut = cut[rows.clamp(max=total - 1)] & (rows < total) if reverse else cut
        rows = torch.where(cut, total + batch, rows)
    return rows


def run(backend: Backend, call: Call, save: str) -> Result:
    """Forward, in the form that `backend` takes ragged batches in; y is in the call's form, `saved` in its own."""
    if call.batch_sizes is not None and "packed" not in backend.ragged_layouts:
        return _pad_and_run(backend, call, save)
    if call.lengths is None or "padded" in backend.ragged_layouts:
        return backend.forward(call, save)
    packing, packed = pack_call(call)
    if packed is None:
        streams = len(call.weights)
        y = call.x.new_zeros(*call.rows, streams * call.out)
        empty = call.x.new_empty(streams, 0, call.hidden)
        return Result(y, tuple(a.clone() for a in call.initial()), Saved(empty, empty, empty))
    result = backend.forward(packed, save)
    return result._replace(y=packing.unpack(result.y), finals=packing.unsort(result.finals, call.initial()))


def _pad_and_run(backend: Backend, call: Call, save: str) -> Result:
    assert call.batch_sizes is not None
    device = call.x.device
    packing = Packing.of_batch_sizes(call.batch_sizes, call.batch, call.x.shape[0], device)
    resets = None if call.resets is None else packing.unpack(call.resets)
    padded = call._replace(
        x=packing.unpack(call.x), lengths=packing.lengths.to(device), batch_sizes=None, resets=resets
    )
    result = backend.forward(padded, save)
    c = result.saved.c
    if c is not None:
        c = torch.stack([packing.pack(a.view(*padded.rows, a.shape[-1])) for a in c])
    return result._replace(y=packing.pack(result.y), saved=Saved(c=c))


def pack_call(call: Call) -> tuple[Packing, Call | None]:
    """A padded call with lengths in the packed form, rows of length zero left out; None if no token is left."""
    assert call.lengths is not None
    packing = Packing.of_lengths(call.lengths.cpu(), call.x.shape[0], call.x.device)
    if not packing.batch_sizes.numel():
        return packing, None
    packed = call._replace(
        x=packing.pack(call.x),
        states=packing.sort_live(call.states),
        lengths=None,
        batch_sizes=packing.batch_sizes,
        resets=None if call.resets is None else packing.pack(call.resets),
    )
    return packing, packed
