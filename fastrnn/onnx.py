"""fastrnn::forward in the operators of ONNX, for `torch.onnx.export(model, args, dynamo=True)`.

There is nothing to call here: `ops` registers `forward` as what becomes of the op while torch.onnx.export is
at work, of a module or of an ExportedProgram. It needs none of ONNX's packages, they are torch.onnx.export's.

    LSTM, GRU, RNN    one node of the operator of that name, with initial states and `lengths`
    a Scan            over the cell's own step, for what those operators lack: `proj_size`, `resets`, and
                      the LSTM's `return_states`

An exported model computes; it cannot be trained, so that nothing is saved for a backward. ONNX Runtime runs these
operators in fp32 and fp16; of fp64, which ONNX has, it has none, and a model is to be exported as `model.float()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.backends.base import Call, Result, Saved
from fastrnn.backends.reference import narrow, widen

States = tuple[Tensor, ...]


class _Operator(NamedTuple):
    """How ONNX has a cell."""

    name: str
    order: tuple[int, ...]  # of our gates, where its own come
    attributes: dict[str, Any]
    activation: str | None = None  # one per direction, where it is not the default


_OPERATORS = {
    "lstm": _Operator("LSTM", (0, 3, 1, 2), {}),  # i, o, f, c
    "gru": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, h
    "rnn_tanh": _Operator("RNN", (0,), {}, "Tanh"),
    "rnn_relu": _Operator("RNN", (0,), {}, "Relu"),
}
_DIRECTIONS = {(False,): "forward", (True,): "reverse", (False, True): "bidirectional"}


def forward(call: Call, trail: bool) -> Result:
    """`call` as PyTorch operations that torch.onnx.export has translations of.

    Raises:
        NotImplementedError: a PackedSequence.
    """
    if call.batch_sizes is not None:
        raise NotImplementedError(
            "PackedSequence: ONNX's recurrent operators take padded batches; "
            "give the module the padded input and lengths= before torch.onnx.export"
        )
    if call.x.dtype is torch.bfloat16:  # which ONNX's operators lack; the arithmetic is fp32 anyway
        result = narrow(forward(widen(call), trail), call.x.dtype)
        c = result.saved.c
        return result._replace(saved=Saved(c=None if c is None else c.to(call.x.dtype)))
    trail = trail and call.cell.states > 1
    lacking = trail or call.resets is not None or call.weights[0].w_hr is not None
    if lacking or call.cell.name not in _OPERATORS or call.reverse not in _DIRECTIONS:
        return _scan(call, trail)
    return _operator(call, _OPERATORS[call.cell.name])


def _operator(call: Call, how: _Operator) -> Result:
    """One node LSTM, GRU or RNN: X, W, R, B, sequence_lens, initial_h, initial_c to Y, Y_h, Y_c."""
    x, lengths, weights, hidden = call.x, call.lengths, call.weights, call.hidden
    steps, batch = call.rows
    biases = [[_gates(b, how.order) for b in (w.b_ih, w.b_hh) if b is not None] for w in weights]
    attributes = {"hidden_size": hidden, "direction": _DIRECTIONS[call.reverse], **how.attributes}
    if how.activation is not None:
        attributes["activations"] = [how.activation] * len(weights)
    inputs = [
        x,
        torch.stack([_gates(w.w_ih, how.order) for w in weights]),
        torch.stack([_gates(w.w_hh, how.order) for w in weights]),
        torch.stack([torch.cat(own) for own in biases]) if biases[0] else None,
        None if lengths is None else lengths.to(torch.int32),
        *call.states,
    ]
    final = (len(weights), batch, hidden)
    outs = torch.onnx.ops.symbolic_multi_out(
        how.name,
        inputs,
        attributes,
        dtypes=[x.dtype] * (1 + call.cell.states),
        shapes=[(steps, len(weights), batch, hidden), *[final] * call.cell.states],
    )
    y, *finals = [a.to(x.device) for a in outs]  # the stand-ins lie on the CPU
    y = y.squeeze(1) if len(weights) == 1 else y.transpose(1, 2).flatten(2)
    if lengths is not None:  # what the final states of empty sequences are ONNX does not say; its runtime has zeros
        empty = (lengths == 0)[:, None]
        finals = [torch.where(empty, old, new) for old, new in zip(call.initial(), finals, strict=True)]
    return Result(y, tuple(finals))


def _gates(w: Tensor, order: Sequence[int]) -> Tensor:
    """(G*H, ...) with its gates in another order; by slices, which torch.onnx.export folds and a split it does not."""
    hidden = w.shape[0] // len(order)
    return w if len(order) == 1 else torch.cat([w[k * hidden : (k + 1) * hidden] for k in order])


def _scan(call: Call, trail: bool) -> Result:
    call = call._replace(states=call.initial())
    outs = [_scan_stream(call, s, trail) for s in range(len(call.weights))]
    y = torch.cat([o[0] for o in outs], -1)
    finals = tuple([torch.stack(f) for f in zip(*(o[1] for o in outs), strict=True)])
    return Result(y, finals, Saved(c=torch.stack([o[2] for o in outs]) if trail else None))  # type: ignore[misc]


def _scan_stream(call: Call, s: int, trail: bool) -> tuple[Tensor, States, Tensor | None]:
    """y, the final states and, if asked, the last state at every step: as `reference` has it, in torch's scan."""
    cell, w, reverse = call.cell, call.weights[s], call.reverse[s]
    over, masks = [linear(call.x, w.w_ih, w.b_ih)], []
    if call.lengths is not None:
        masks.append("live")
        over.append((torch.arange(call.rows[0], device=call.x.device)[:, None] < call.lengths)[:, :, None])
    if call.resets is not None:
        masks.append("cut")
        cut = call.resets
        if reverse:  # a reset lies between t-1 and t
            cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])])
        over.append(cut[:, :, None])
    params = call.params[s] if call.params else ()
    fixed = [a for a in (w.w_hh, w.b_hh, w.w_hr, *params) if a is not None]

    def step(*tensors: Tensor) -> list[Tensor]:
        state, rest = tensors[: cell.states], tensors[cell.states :]
        xg, mask = rest[0], dict(zip(masks, rest[1:], strict=False))
        own = iter(rest[len(over) :])
        w_hh, b_hh, w_hr = [None if a is None else next(own) for a in (w.w_hh, w.b_hh, w.w_hr)]
        p = tuple(own)
        if "cut" in mask:
            state = tuple([torch.where(mask["cut"], 0.0, a) for a in state])
        r = linear(state[0], w_hh, b_hh)  # type: ignore[arg-type]
        new, _ = cell.step(
            xg.chunk(cell.gates, -1), r.chunk(cell.gates, -1), state, p, torch.sigmoid, torch.tanh, torch.where
        )
        if w_hr is not None:
            new = (linear(new[0], w_hr), *new[1:])
        outs = [new[0], new[-1]] if trail else [new[0]]
        if "live" in mask:
            outs = [torch.where(mask["live"], a, 0.0) for a in outs]
            new = tuple([torch.where(mask["live"], a, b) for a, b in zip(new, state, strict=True)])
        return [*new, *[a.clone() for a in outs]]

    if reverse:
        over = [a.flip(0) for a in over]
    found = torch.ops.higher_order.scan(step, [a[s] for a in call.states], over, fixed)
    finals, outs = found[: cell.states], found[cell.states :]
    if reverse:
        outs = [a.flip(0) for a in outs]
    return outs[0], tuple(finals), outs[1] if trail else None
