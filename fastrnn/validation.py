"""Checks of what a user hands in, with messages that name the argument, what was expected and what came.

Exception types are those of torch.nn for the same mistake (it mixes ValueError and RuntimeError).
Arguments that torch.nn does not have raise TypeError for a wrong type and ValueError for a wrong
shape or value. Checks compare first and build their message on failure only: they run at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fastrnn.backends.base import Weights
from fastrnn.cells import Cell
from fastrnn.ordinary import values

STATE_NAMES = ("hx", "cx")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_sizes(kind: type[Exception], least: int, **sizes: Any) -> None:
    """Sizes of a module being built; what is no int is left to torch.nn, which says so."""
    for name, size in sizes.items():
        if isinstance(size, int) and size < least:
            raise kind(f"{name}: expected at least {least}, got {size}")


def check_proj_size(proj_size: Any, hidden_size: Any) -> None:
    if isinstance(proj_size, int) and isinstance(hidden_size, int) and not 0 <= proj_size < hidden_size:
        raise ValueError(f"proj_size: expected from 0 (none) to hidden_size - 1 = {hidden_size - 1}, got {proj_size}")


def check_save(save: str) -> str:
    """`save` if it is a mode of saving for backward; ValueError otherwise."""
    if save not in ("gates", "states"):
        raise ValueError(f"save: expected 'gates' or 'states', got {save!r}")
    return save


def check_rank(input: Tensor, ranks: tuple[int, int], layout: str) -> None:
    """ValueError unless `input` has one of two ranks (unbatched, batched)."""
    if not isinstance(input, Tensor):
        raise AttributeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in ranks:
        raise ValueError(f"input: expected {ranks[0]} or {ranks[1]} dimensions {layout}, got shape {shape(input)}")


def check_packed(packed: PackedSequence) -> PackedSequence:
    """The same with batch_sizes of its own, after checking that they describe its rows (RuntimeError)."""
    sizes, rows = packed.batch_sizes, packed.data.shape[0]
    if sizes.dtype != torch.int64 or sizes.dim() != 1 or not sizes.is_cpu:
        raise RuntimeError(
            "batch_sizes: expected a PackedSequence with an int64 CPU vector, "
            f"got {sizes.dtype} of shape {shape(sizes)} on {sizes.device}"
        )
    if is_compiling():  # there are no values yet: the op checks them when it runs
        return packed
    own = sizes.detach().clone()
    check_batch_sizes(own, rows)
    return PackedSequence(packed.data, own, packed.sorted_indices, packed.unsorted_indices)


def check_batch_sizes(sizes: Tensor, rows: int) -> None:
    """RuntimeError unless `sizes` (T,) describe so many rows of a packed batch."""
    if not sizes.numel() or int(sizes[-1]) < 1 or bool((sizes[1:] > sizes[:-1]).any()):
        raise RuntimeError(f"batch_sizes: expected positive sizes that do not increase, got {sizes.tolist()[:8]} ...")
    if int(sizes.sum()) != rows:
        raise RuntimeError(f"batch_sizes: expected sizes that sum to the {rows} rows of data, got {int(sizes.sum())}")


def check_input(x: Tensor, w_ih: Tensor, wrong_dtype: type[Exception] = ValueError) -> None:
    """Layout of `x`; feature size, dtype and device against the first layer's weight."""
    if x.layout is not torch.strided:
        raise RuntimeError(f"input: expected a dense Tensor (torch.strided), got {x.layout}")
    if x.dtype != w_ih.dtype:
        raise wrong_dtype(f"input: expected the weights' dtype {w_ih.dtype}, got {x.dtype}; convert one with .to()")
    if x.shape[-1] != w_ih.shape[-1]:
        raise RuntimeError(f"input: expected {w_ih.shape[-1]} features in its last dimension, got {x.shape[-1]}")
    if not (x.is_cpu and w_ih.is_cpu) and x.device != w_ih.device:
        raise RuntimeError(f"input: expected the weights' device {w_ih.device}, got {x.device}")


def check_weights(cell: Cell, weights: Sequence[Weights], streams: int) -> bool:
    """Shapes, dtypes and devices of all weights against one another; says whether one requires a gradient."""
    first = weights[0]
    rows, out = first.w_hh.shape
    if first.w_hr is not None and cell.name != "lstm":
        raise RuntimeError(f"weights: w_hr: expected None for a {cell.name}, only an lstm has a projection")
    dtype, device, features = first.w_ih.dtype, first.w_ih.device, first.w_ih.shape[1]
    matrix, vector, grad = (rows, out), (rows,), False
    on_cpu = first.w_ih.is_cpu  # which is one device, and quicker to ask for
    expected = ((rows, features), matrix, *_optional(first, vector, (out, rows // cell.gates)))
    if rows % cell.gates or (first.w_hr is None and rows != out * cell.gates):
        _refuse_weights(cell, 0, first, first, features, streams)
    for k, w in enumerate(weights):
        if k == streams:
            features = streams * out
            expected = ((rows, features), *expected[1:])
        for tensor, want in zip(w, expected):  # noqa: B905  both have five entries, and strict costs time
            if tensor is None:
                if want is not None:
                    _refuse_weights(cell, k, w, first, features, streams)
            elif (
                tensor.shape != want
                or tensor.dtype is not dtype
                or (not tensor.is_cpu if on_cpu else tensor.device != device)
            ):
                _refuse_weights(cell, k, w, first, features, streams)
            elif tensor.requires_grad:
                grad = True
    return grad


def _optional(w: Weights, vector: tuple[int], projection: tuple[int, int]) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes expected of b_ih, b_hh and w_hr, None where the first stream has none."""
    bias = None if w.b_ih is None else vector
    return bias, bias, None if w.w_hr is None else projection


def _refuse_weights(cell: Cell, k: int, w: Weights, first: Weights, features: int, streams: int) -> None:
    rows, out = first.w_hh.shape
    hidden = rows // cell.gates
    if first.w_hr is None and rows != out * cell.gates:
        raise RuntimeError(f"weights: w_hh of a {cell.name} has shape ({cell.gates}*H, H), got {shape(first.w_hh)}")
    expected = {
        "w_ih": (rows, features),
        "w_hh": (rows, out),
        "b_ih": None if first.b_ih is None else (rows,),
        "b_hh": None if first.b_ih is None else (rows,),
        "w_hr": None if first.w_hr is None else (out, hidden),
    }
    where = f"layer {k // streams}, direction {k % streams}"
    for name, want in expected.items():
        tensor = getattr(w, name)
        got = None if tensor is None else tuple(tensor.shape)
        if got != want:
            raise RuntimeError(f"weights: {name} of {where}: expected shape {want}, got {got}")
        if tensor is not None and (tensor.dtype != first.w_ih.dtype or tensor.device != first.w_ih.device):
            raise RuntimeError(
                f"weights: {name} of {where}: expected {first.w_ih.dtype} on {first.w_ih.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    raise RuntimeError(f"weights: {where} does not fit a {cell.name}")


def check_params(cell: Cell, params: Sequence[tuple[Tensor, ...]], weights: Sequence[Weights], streams: int) -> None:
    """RuntimeError unless `params` has for each of `weights` as many vectors (H,), of their dtype, as the cell has."""
    w = weights[0].w_hh
    hidden = w.shape[0] // cell.gates
    if len(params) != (len(weights) if cell.params else 0):
        raise RuntimeError(
            f"params: expected those of {len(weights) if cell.params else 0} layers and directions of a {cell.name}, "
            f"got {len(params)}"
        )
    for k, own in enumerate(params):
        where = f"params: layer {k // streams}, direction {k % streams}"
        if len(own) != cell.params:
            raise RuntimeError(f"{where}: expected {cell.params} vectors for a {cell.name}, got {len(own)}")
        for i, p in enumerate(own):
            if not isinstance(p, Tensor) or p.shape != (hidden,):
                got = shape(p) if isinstance(p, Tensor) else type(p).__name__
                raise RuntimeError(f"{where}, vector {i}: expected a Tensor of shape {(hidden,)}, got {got}")
            if p.dtype != w.dtype or p.device != w.device:
                raise RuntimeError(
                    f"{where}, vector {i}: expected {w.dtype} on {w.device}, got {p.dtype} on {p.device}"
                )


def hx_tuple(hx: Any, count: int, rank: int) -> tuple[Tensor, ...]:
    """hx as a tuple of `count` tensors of `rank` dimensions."""
    if count == 1:
        if not isinstance(hx, Tensor):
            raise AttributeError(f"hx: expected a Tensor, got {type(hx).__name__}")
        states: tuple[Tensor, ...] = (hx,)
    else:
        if isinstance(hx, Tensor) or len(hx) != count:
            got = f"a Tensor of shape {shape(hx)}" if isinstance(hx, Tensor) else f"{len(hx)} values"
            kind = IndexError if len(hx) < count else RuntimeError  # torch.nn takes hx[1] first
            raise kind(f"hx: expected a tuple (h_0, c_0) of Tensors, got {got}")
        states = tuple(hx)
    for name, state in zip(STATE_NAMES, states, strict=False):
        if not isinstance(state, Tensor):
            raise AttributeError(f"{name}: expected a Tensor, got {type(state).__name__}")
        if state.dim() != rank:
            raise RuntimeError(f"{name}: expected {rank} dimensions to go with this input, got shape {shape(state)}")
    return states


def cell_hx(hx: Any, count: int) -> tuple[Tensor, ...]:
    """hx of a cell as a tuple of `count` tensors of one or two dimensions."""
    if count == 1 and not isinstance(hx, Tensor):
        raise AttributeError(f"hx: expected a Tensor, got {type(hx).__name__}")
    if count > 1 and isinstance(hx, Tensor):
        raise TypeError(f"hx: expected a tuple (h, c) of Tensors, got a Tensor of shape {shape(hx)}")
    states = (hx,) if count == 1 else tuple(hx)
    if len(states) != count:
        raise RuntimeError(f"hx: expected a tuple (h, c) of Tensors, got {len(states)} values")
    for name, state in zip(STATE_NAMES, states, strict=False):
        if not isinstance(state, Tensor):
            raise AttributeError(f"{name}: expected a Tensor, got {type(state).__name__}")
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: expected 1 or 2 dimensions, got shape {shape(state)}")
    return states


def check_states(states: tuple[Tensor, ...], like: Tensor, lead: tuple[int, ...], hidden: int, out: int) -> bool:
    """Each state's shape, `lead` and then P (h) or H (the others), and its dtype and device against the input's.

    Says whether one requires a gradient.
    """
    want, grad = (*lead, out), False
    dtype, device = like.dtype, like.device
    for k, state in enumerate(states):
        if state.shape != want:
            raise RuntimeError(f"{STATE_NAMES[k]}: expected shape {want}, got {shape(state)}")
        if state.dtype is not dtype:
            raise RuntimeError(f"{STATE_NAMES[k]}: expected the input's dtype {dtype}, got {state.dtype}")
        if not (state.is_cpu and like.is_cpu) and state.device != device:
            raise RuntimeError(f"{STATE_NAMES[k]}: expected the input's device {device}, got {state.device}")
        if state.requires_grad:
            grad = True
        want = (*lead, hidden)
    return grad


def as_lengths(values: Any, batch: int, batched: bool) -> Tensor:
    """`lengths` as an integer tensor (B,)."""
    lengths: Tensor = values if isinstance(values, Tensor) else _from_list(values)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if not batched and lengths.dim() == 0:
        lengths = lengths.reshape(1)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape {(batch,)}, one per batch row, got {shape(lengths)}")
    return lengths


def _from_list(values: Any) -> Tensor:
    try:
        lengths = torch.tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths: expected a Tensor or a list of ints, got {values!r}") from error
    return lengths if lengths.numel() else lengths.long()  # an empty list has no type of its own


def check_length_range(lengths: Tensor, steps: int) -> None:
    """ValueError unless 0 <= lengths <= steps.

    On an accelerator an assertion there, as the host does not wait. Where there are no values yet, while
    compiling, the op checks when it runs.
    """
    known = values(lengths)
    if known is None or not known.numel():
        return
    if known.device.type != "cpu":
        torch._assert_async(((known >= 0) & (known <= steps)).all())
        return
    low, high = int(known.min()), int(known.max())
    if low < 0 or high > steps:
        raise ValueError(f"lengths: expected values from 0 to {steps}, got values from {low} to {high}")


def check_resets(resets: Any, expected: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a bool Tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets: expected dtype torch.bool, got {resets.dtype}")
    if tuple(resets.shape) != expected:
        raise ValueError(f"resets: expected shape {expected}, got {shape(resets)}")
    if resets.device != device:
        raise RuntimeError(f"resets: expected the input's device {device}, got {resets.device}")
