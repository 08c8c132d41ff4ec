"""The stateless forms of the modules: weights in, no module around them.

Symbols: T steps, B batch rows, I input features, H hidden size, P output size (H, or proj_size),
L layers, S directions (1 or 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from fastrnn.backends.base import Weights
from fastrnn.cells import CELLS
from fastrnn.layers import BOTH, FORWARD, Batch, run
from fastrnn.validation import check_save

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrnn.typed import Options, RnnOptions

__all__ = ["Weights", "gru", "lstm", "rnn"]


@overload
def lstm(
    input: Batch,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Weights],
    *,
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Batch, tuple[Tensor, Tensor], tuple[Tensor, ...]]: ...
@overload
def lstm(
    input: Batch,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Weights],
    *,
    return_states: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Batch, tuple[Tensor, Tensor]]: ...
def lstm(
    input: Batch,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Weights],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
    save: str = "gates",
    return_states: bool = False,
) -> Any:
    """Long short-term memory over a sequence.

    Args:
        input: (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, or a PackedSequence, sorted or not.
        hx: h_0 (L*S, B, P) and c_0 (L*S, B, H), without B if unbatched; zeros if None.
        weights: one `Weights` per layer and direction, layer by layer, as in torch.nn:
            w_ih (4H, I) or (4H, S*P) after the first layer, w_hh (4H, P), b_ih (4H,), b_hh (4H,),
            and w_hr (P, H) for an LSTM with projections.
        dropout: probability of zeroing an output of each layer but the last, when `training`.
        lengths: (B,) integers of any type, in any order, on any device, or a list of ints. Row b has
            lengths[b] steps: its outputs beyond are zero, its final state is that of its own last step, and
            the reverse direction starts there. A length of zero leaves the row's state as it was.
        resets: (T, B) bool, (B, T) with `batch_first`, (T,) unbatched. resets[t, b] is a boundary between
            steps t-1 and t: the forward direction clears its state (to zero) before step t, the reverse
            direction when it crosses from t to t-1. resets[0] therefore clears hx, in the forward direction.
            With a PackedSequence (T, B) in the order of the batch before it was sorted.
        backend: "auto" or the name of a backend.
        save: what is kept for backward, "gates", or "states": the gates are then made anew, in less memory and
            more time.
        return_states: return the states after every step of every layer, too.

    Returns:
        output (T, B, S*P) in the layout of `input`, and (h_n, c_n), shaped as hx. An empty batch or sequence
        gives an empty output (T = 0 leaves the state as it was), where torch.nn raises. With `return_states`
        also (h, c), h (L, T, B, S*P) and c (L, T, B, S*H), each layer in the layout of `input`, (L, N, ...) with
        a PackedSequence of N rows; zero beyond a row's length.

    Raises:
        ValueError, RuntimeError: wrong rank, size, dtype or device, as torch.nn does; ValueError also for an
            unknown `backend` or `save`, RuntimeError when the backend asked for cannot run the call.
        TypeError: `lengths` or `resets` of the wrong dtype.
    """
    reverse, rate = _options(weights, bidirectional, dropout, training, save)
    y, (h_n, c_n), states = run(
        CELLS["lstm"], input, hx, weights, reverse, batch_first, rate, lengths, resets, backend, save, return_states
    )
    return (y, (h_n, c_n), states) if return_states else (y, (h_n, c_n))


@overload
def gru(
    input: Batch,
    hx: Tensor | None,
    weights: Sequence[Weights],
    *,
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Batch, Tensor, tuple[Tensor, ...]]: ...
@overload
def gru(
    input: Batch,
    hx: Tensor | None,
    weights: Sequence[Weights],
    *,
    return_states: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Batch, Tensor]: ...
def gru(
    input: Batch,
    hx: Tensor | None,
    weights: Sequence[Weights],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
    save: str = "gates",
    return_states: bool = False,
) -> Any:
    """Gated recurrent unit over a sequence: hx is h_0 (L*S, B, H), w_ih has 3H rows; otherwise as `lstm`."""
    reverse, rate = _options(weights, bidirectional, dropout, training, save)
    y, finals, states = run(
        CELLS["gru"], input, hx, weights, reverse, batch_first, rate, lengths, resets, backend, save, return_states
    )
    return (y, finals[0], states) if return_states else (y, finals[0])


@overload
def rnn(
    input: Batch,
    hx: Tensor | None,
    weights: Sequence[Weights],
    *,
    return_states: Literal[True],
    **options: Unpack[RnnOptions],
) -> tuple[Batch, Tensor, tuple[Tensor, ...]]: ...
@overload
def rnn(
    input: Batch,
    hx: Tensor | None,
    weights: Sequence[Weights],
    *,
    return_states: Literal[False] = False,
    **options: Unpack[RnnOptions],
) -> tuple[Batch, Tensor]: ...
def rnn(
    input: Batch,
    hx: Tensor | None,
    weights: Sequence[Weights],
    *,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
    save: str = "gates",
    return_states: bool = False,
) -> Any:
    """Elman network over a sequence, "tanh" or "relu": hx is h_0 (L*S, B, H), w_ih has H rows; otherwise as `lstm`."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    reverse, rate = _options(weights, bidirectional, dropout, training, save)
    cell = CELLS[f"rnn_{nonlinearity}"]
    y, finals, states = run(
        cell, input, hx, weights, reverse, batch_first, rate, lengths, resets, backend, save, return_states
    )
    return (y, finals[0], states) if return_states else (y, finals[0])


def _options(
    weights: Sequence[Weights], bidirectional: bool, dropout: float, training: bool, save: str
) -> tuple[tuple[bool, ...], float]:
    check_save(save)
    reverse = BOTH if bidirectional else FORWARD
    if not weights or len(weights) % len(reverse):
        raise ValueError(f"weights: expected a multiple of {len(reverse)} (layers x directions), got {len(weights)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability, got {dropout}")
    return reverse, dropout if training else 0.0
