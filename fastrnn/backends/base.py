"""What a backend is: the recurrence of one layer, forward and backward, for any cell.

Symbols used here and in every backend:

    T, B    time steps, batch          I, H, P   input, hidden and output size (P = H without projection)
    S       streams: independent recurrences of one layer, the directions
    N       rows: T * B of a padded batch, the number of tokens of a packed one
    G, D    the cell's gates and dgates

A batch of sequences of different lengths has two forms, and a backend names the one it takes:
`padded`, x (T, B, I) with `lengths` (B,) on x's device; `packed`, x (N, I) with `batch_sizes` (T,)
on the CPU, the rows of a PackedSequence. A batch of equal lengths is always x (T, B, I).

A single step has a form of its own, for the cells: x (B, I) and states (B, H), without the axes of
length one; y is then the first final state itself. `recurrence` hands it to backends that take it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.cells import Cell


class Weights(NamedTuple):
    """The parameters of one stream."""

    w_ih: Tensor  # (G*H, I)
    w_hh: Tensor  # (G*H, P)
    b_ih: Tensor | None  # (G*H,)
    b_hh: Tensor | None  # (G*H,)
    w_hr: Tensor | None  # (P, H)


class Call(NamedTuple):
    """One layer's recurrence: everything that a backend is given."""

    cell: Cell
    x: Tensor  # (T, B, I), or (N, I) with batch_sizes, or (B, I) for a single step
    states: tuple[Tensor, ...]  # each (S, B, H), the first (S, B, P); (B, H) for a single step
    weights: tuple[Weights, ...]  # one per stream
    reverse: tuple[bool, ...]  # per stream: from the last step to the first
    lengths: Tensor | None = None  # (B,) integers on x's device
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU, not increasing, the first of them B
    resets: Tensor | None = None  # bool (T, B), or (N,) with batch_sizes; false beyond a row's length

    @property
    def single_step(self) -> bool:
        return self.x.dim() == 2 and self.batch_sizes is None

    @property
    def hidden(self) -> int:
        return self.weights[0].w_hh.shape[0] // self.cell.gates

    @property
    def out(self) -> int:
        return self.weights[0].w_hh.shape[1]


class Result(NamedTuple):
    """What a forward returns. `saved` is what its own backward wants to see again."""

    y: Tensor  # (T, B, S*P) or (N, S*P)
    finals: tuple[Tensor, ...]  # like the initial states
    saved: tuple[Tensor, ...] = ()


class Gradients(NamedTuple):
    """What a backward returns: gradients at the gates, from which all others follow by GEMM, or those others."""

    dgates: Tensor | None  # (S, N, D*H): dx of each gate, then dr of each split gate; None with dx and dweights
    dstates: tuple[Tensor, ...]  # like the initial states
    dh: Tensor | None = None  # (S, N, P) with a projection: the whole gradient of h
    m: Tensor | None = None  # (S, N, H) with a projection: what it was applied to
    # Where the backend has made them already:
    dx: Tensor | None = None  # like x
    dweights: tuple[Weights, ...] | None = None  # like the weights, None where not needed


class Query(NamedTuple):
    """What the choice of a backend depends on; no tensors, so that a rule can be read and tested."""

    cell: str
    device: str
    dtype: torch.dtype
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int
    S: int
    grad: bool = False
    ragged: bool = False
    resets: bool = False


class Backend:
    """Base class of the backends."""

    name: str
    ragged_layout = "padded"  # the form of ragged batches that it takes
    takes_single_steps = False  # and calls of the form that they have
    differentiable = False  # forward is made of PyTorch operations and autograd does the rest

    def unsupported(self, query: Query) -> str | None:
        """Why this backend cannot run `query`, or None if it can."""
        raise NotImplementedError

    def forward(self, call: Call, save: bool) -> Result:
        """Run the recurrence; with `save`, keep what backward needs."""
        raise NotImplementedError

    def backward(
        self,
        call: Call,
        saved: tuple[Tensor, ...],
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
        needed: tuple[bool, ...],
        last: bool,
        dc: Tensor | None = None,
    ) -> Gradients:
        """Gradients at the gates. `y` is forward's output; `last` allows to overwrite `saved`.

        `needed` says which inputs want a gradient: x, each state, then each stream's weights. `dc`, of
        the type of y, is the gradient of c at every step, (S, N, H), for cells that have c.
        """
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """Facts for `fastrnn.info()`."""
        return {}
