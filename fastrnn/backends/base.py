"""What a backend is: the recurrence of one layer, forward and backward, for any cell.

Symbols used here and in every backend:

    T, B    time steps, batch          I, H, P   input, hidden and output size (P = H without projection)
    S       streams: independent recurrences of one layer, the directions
    N       rows: T * B of a padded batch, the number of tokens of a packed one
    G, D    the cell's gates and dgates

A batch of sequences of different lengths has two forms, and a backend names those it takes:
`padded`, x (T, B, I) with `lengths` (B,) on x's device; `packed`, x (N, I) with `batch_sizes` (T,)
on the CPU, the rows of a PackedSequence. A batch of equal lengths is always x (T, B, I).

A single step has a form of its own, for the cells: x (B, I) and states (B, H), without the axes of
length one; y is then the first final state itself. `recurrence` hands it to backends that take it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


FIELDS = len(Weights._fields)


def flatten(weights: tuple[Weights, ...]) -> tuple[Tensor | None, ...]:
    """All streams' parameters in one row, None where there is none."""
    return tuple([w for stream in weights for w in stream])


def unflatten(flat: Sequence[Tensor | None]) -> tuple[Weights, ...]:
    """The reverse of `flatten`."""
    return tuple([Weights(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS)])  # type: ignore[arg-type]


Params = tuple[tuple[Tensor, ...], ...]  # per stream the cell's per-unit parameters, (H,) each; () without


def split_flat(cell: Cell, flat: Sequence[Any], streams: int) -> tuple[tuple[Weights, ...], Params]:
    """Weights and per-unit parameters from the end of a `Call.flat`, where they stand."""
    if not cell.params:
        return unflatten(flat), ()
    end, n = FIELDS * streams, cell.params
    return unflatten(flat[:end]), tuple([tuple(flat[i : i + n]) for i in range(end, end + n * streams, n)])


class Call(NamedTuple):
    """One layer's recurrence: everything that a backend is given."""

    cell: Cell
    x: Tensor  # (T, B, I), or (N, I) with batch_sizes, or (B, I) for a single step
    states: tuple[Tensor, ...]  # each (S, B, H), the first (S, B, P); (B, H) for a single step; () for zeros
    weights: tuple[Weights, ...]  # one per stream
    reverse: tuple[bool, ...]  # per stream: from the last step to the first
    lengths: Tensor | None = None  # (B,) integers on x's device
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU, not increasing, the first of them B
    resets: Tensor | None = None  # bool (T, B), or (N,) with batch_sizes; false beyond a row's length
    params: Params = ()

    @property
    def single_step(self) -> bool:
        return self.x.dim() == 2 and self.batch_sizes is None

    @property
    def hidden(self) -> int:
        return self.weights[0].w_hh.shape[0] // self.cell.gates

    @property
    def out(self) -> int:
        return self.weights[0].w_hh.shape[1]

    @property
    def batch(self) -> int:
        if self.batch_sizes is None:
            return self.x.shape[-2]
        return self.states[0].shape[-2] if self.states else int(self.batch_sizes[0])

    @property
    def rows(self) -> tuple[int, ...]:
        """The leading sizes of x and y: (T, B), or (N,)."""
        return tuple(self.x.shape[:-1])

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        """All tensors that may have gradients: x, the states, the streams' weights, their per-unit parameters."""
        flat = (self.x, *self.states, *[w for stream in self.weights for w in stream])
        return flat + tuple([p for own in self.params for p in own]) if self.params else flat

    def with_flat(self, flat: Sequence[Any]) -> Call:
        """This call with other tensors in the place of those in `flat`."""
        first = 1 + len(self.states)
        weights, params = split_flat(self.cell, flat[first:], len(self.weights))
        return self._replace(x=flat[0], states=tuple(flat[1:first]), weights=weights, params=params)

    def initial(self) -> tuple[Tensor, ...]:
        """The initial states, zeros written out."""
        if self.states:
            return self.states
        lead = () if self.single_step else (len(self.weights),)
        widths = (self.out, self.hidden)[: self.cell.states]
        return tuple([self.x.new_zeros(*lead, self.batch, n) for n in widths])

    def as_sequence(self) -> Call:
        """A single step as a sequence of one."""
        return self._replace(x=self.x.unsqueeze(0), states=tuple([a.unsqueeze(0) for a in self.states]))


GATES, STATES, NOTHING = "gates", "states", ""  # what a forward saves, see Saved


class Saved(NamedTuple):
    """What backward needs besides the call and y: all of it with "gates", all but the tape with "states".

    Of the backend's `saved_dtypes`. Tensors that are not there are None.
    """

    tape: Tensor | None = None  # (S, N, V*H): the cell's tape, one block of H per value
    c: Tensor | None = None  # (S, N, H), for cells with a second state: that state after each step
    m: Tensor | None = None  # (S, N, H), with a projection and "gates": what it is applied to


class Result(NamedTuple):
    """What a forward returns."""

    y: Tensor  # (T, B, S*P) or (N, S*P)
    finals: tuple[Tensor, ...]  # like the initial states
    saved: Saved = Saved()


class Output(NamedTuple):
    """What the op gives to those above it."""

    y: Tensor  # as in Result
    finals: tuple[Tensor, ...]
    trail: tuple[Tensor, ...] = ()  # where asked for: the second state after each step, (S, T, B, H) or (S, N, H)


class Gradients(NamedTuple):
    """What a backward returns: gradients at the gates, from which all others follow by GEMM, or those others."""

    dgates: Tensor | None  # (S, N, D*H): dx of each gate, then dr of each split gate; None with dx and dweights
    dstates: tuple[Tensor, ...]  # like the initial states that were given
    dh: Tensor | None = None  # (S, N, P) with a projection: the whole gradient of h
    m: Tensor | None = None  # (S, N, H) with a projection: what it was applied to
    # Where the backend has made them already:
    dx: Tensor | None = None  # like x
    dweights: tuple[Weights, ...] | None = None  # like the weights, None where not needed
    # Always of the backend's making:
    dparams: Params = ()  # like the per-unit parameters


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
    trail: bool = False  # all of c is asked for, not the last of it alone
    step: bool = False  # a single step, of a cell
    cast: bool = False  # under autocast on the CPU, its weights not cast yet
    lengths: bool = False  # ragged by `lengths`, a tensor, whose values the host may not know
    device_index: int = 0  # of the device among those of its kind


class Backend:
    """Base class of the backends."""

    name: str
    ragged_layouts: tuple[str, ...] = ("padded",)  # the forms of ragged batches that it takes
    takes_single_steps = False  # and calls of the form that they have
    takes_params = False  # and cells with per-unit parameters
    differentiable = False  # forward is made of PyTorch operations and autograd does the rest

    def unsupported(self, query: Query) -> str | None:
        """Why this backend cannot run `query`, or None if it can."""
        raise NotImplementedError

    def passed_over(self, query: Query) -> str | None:
        """Why `auto` leaves `query` to the backends after this one, although it can run it, or None."""
        return None

    def how(self, query: Query) -> str:
        """How it would run `query`, for whoever asks why."""
        return "runs it"

    def settings(self, query: Query) -> Any:
        """What `unsupported`, `passed_over` and `how` read besides `query` and may change, as a key; not on the CPU."""
        return None

    def saved_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Types of the parts of `Saved` in a call of type `dtype`."""
        return (torch.float64 if dtype is torch.float64 else torch.float32,) * 3

    def forward(self, call: Call, save: str) -> Result:
        """Run the recurrence; `save` says what to keep for backward: NOTHING, STATES or GATES."""
        raise NotImplementedError

    def forward_after(self, call: Call, save: str, ready: Callable[[], None]) -> Result:
        """As `forward`, but the initial states are not to be read before `ready()`, as x and the weights are."""
        ready()
        return self.forward(call, save)

    def share(self, query: Query) -> float:
        """The part of the GPU that one launch of the recurrence takes; all of it unless more is known."""
        return 1.0

    def backward(
        self,
        call: Call,
        saved: Saved,
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
        needed: tuple[bool, ...],
        last: bool,
        dc: Tensor | None = None,
        gates: bool = False,
    ) -> Gradients:
        """Gradients at the gates. `y` is forward's output; `last` allows to overwrite `saved.tape`.

        `needed` says which inputs want a gradient: x, each state of the cell, each stream's weights, then each
        stream's per-unit parameters.
        `dc` (S, N, H) is the gradient of the second state at every step. With `gates` the caller makes the
        weights' gradients from `dgates`, whatever `needed` says of them.
        """
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """Facts for `fastrnn.info()`."""
        return {}
