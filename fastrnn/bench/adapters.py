"""Adapters of other packages, which follow their published interfaces.

An adapter makes a Subject from the weights of torch.nn's module, or raises `Absent` with the reason. Products of the
input that a package leaves to its caller are inside what is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.bench.grids import Job
from fastrnn.bench.subjects import Subject, make_input, training, upstream

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Absent(Exception):
    """This peer is not there, or cannot run this case; the message says why."""


class Plain(NamedTuple):
    """The parameters of one layer in one direction, as leaves."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor


def plain_weights(job: Job, sides: dict[str, Subject]) -> Plain:
    if job.case.form != "dense" or job.case.layers > 1 or job.case.bidirectional:
        raise Absent("the adapter takes one layer in one direction over a dense batch")
    return Plain(*(_leaf(p) for p in sides["torch.nn"].module.parameters()))


def _leaf(a: Tensor) -> Tensor:
    return a.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _only(job: Job, dtypes: tuple[str, ...] = tuple(DTYPES), cells: tuple[str, ...] = ("LSTM", "GRU", "RNN")) -> None:
    if job.dtype not in dtypes:
        raise Absent(f"has {', '.join(dtypes)} only")
    if job.cell not in cells:
        raise Absent(f"has {', '.join(cells)} only, as torch.nn defines them")


def subject(
    job: Job,
    sides: dict[str, Subject],
    call: Callable[[], Tensor],
    x: Tensor,
    parameters: dict[str, Tensor],
    batch_first: bool = False,
) -> Subject:
    """A Subject of `call`, which gives y. It names y and the gradient of x, both (T, B, ...)."""

    def time_first(a: Tensor) -> Tensor:
        return a.transpose(0, 1) if batch_first else a

    def read(y: Tensor) -> dict[str, Tensor]:
        return {"y": time_first(y)}

    module = sides["torch.nn"].module
    x.requires_grad_(job.mode != "inference")
    if job.mode != "training":
        return Subject(module, call, read)
    dy = upstream(job.case, DTYPES[job.dtype], x)
    iterate, read_all = training(call, time_first, read, {"x": x, **parameters}, dy)

    def read_two(returned: Any) -> dict[str, Tensor]:
        seen = read_all(returned)
        return {"y": seen["y"], "grad x": time_first(seen["grad x"])}

    return Subject(module, iterate, read_two)


def flashrnn(job: Job, sides: dict[str, Subject]) -> Subject:
    """github.com/NX-AI/flashrnn: Wx (B, T, gates, heads, D), R (gates, heads, out, in), b (gates, heads, D)."""
    _only(job, dtypes=("bfloat16",))
    run = importlib.import_module("flashrnn").flashrnn
    w, H = plain_weights(job, sides), job.case.H
    w_hh, both = w.w_hh.detach().view(-1, 1, H, H), (w.b_ih + w.b_hh).detach().view(-1, 1, H)
    if job.cell == "GRU":  # recurrent gates n, r, z; biases of n's recurrent part, r, z, and n's input part
        w_hh = w_hh[[2, 0, 1]]
        b_ih, b_hh = (a.detach().view(3, 1, H) for a in (w.b_ih, w.b_hh))
        both = torch.stack([b_hh[2], both[0], both[1], b_ih[2]])
    R, b = _leaf(w_hh), _leaf(both)
    x = make_input(job.case, DTYPES[job.dtype], job.device).transpose(0, 1).contiguous()  # (B, T, I)
    name = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[job.cell]

    def call() -> Tensor:
        Wx = linear(x, w.w_ih).view(*x.shape[:2], -1, 1, H)
        states, _ = run(Wx, R, b, function=name, backend="cuda_fused", dtype="bfloat16")
        return states[0].squeeze(2)  # type: ignore[no-any-return]

    return subject(job, sides, call, x, {"w_ih": w.w_ih, "R": R, "b": b}, batch_first=True)


def haste(job: Job, sides: dict[str, Subject]) -> Subject:
    """github.com/lmnt-com/haste: kernels transposed; an LSTM's gates i, g, f, o, a GRU's z, r, n."""
    _only(job, dtypes=("float32", "float64"), cells=("LSTM", "GRU"))
    package = importlib.import_module("haste_pytorch")
    w, H = plain_weights(job, sides), job.case.H
    order = [0, 2, 1, 3] if job.cell == "LSTM" else [1, 0, 2]

    def gates(a: Tensor) -> Tensor:
        return a.detach().view(len(order), H, -1)[order].reshape(len(order) * H, -1)

    module = getattr(package, job.cell)(job.case.I, H).to(job.device, DTYPES[job.dtype])
    values = {"kernel": gates(w.w_ih).t(), "recurrent_kernel": gates(w.w_hh).t()}
    if job.cell == "LSTM":
        values["bias"] = gates(w.b_ih + w.b_hh)[:, 0]
    else:
        values |= {"bias": gates(w.b_ih)[:, 0], "recurrent_bias": gates(w.b_hh)[:, 0]}
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(value)
    x = make_input(job.case, DTYPES[job.dtype], job.device)
    return subject(job, sides, lambda: module(x)[0], x, dict(module.named_parameters()))


def torchrl(job: Job, sides: dict[str, Subject]) -> Subject:
    """torchrl's Triton recurrences, batch first, fp32 by TF32: what recurrent_backend="triton" of its modules calls."""
    _only(job, dtypes=("tf32", "float32"), cells=("LSTM", "GRU"))
    package = importlib.import_module("torchrl.modules.tensordict_module._rnn_triton")
    w, case = plain_weights(job, sides), job.case
    x = make_input(case, torch.float32, job.device).transpose(0, 1).contiguous()
    zeros = x.new_zeros(case.B, case.T, case.H)
    states = (zeros, zeros) if job.cell == "LSTM" else (zeros,)
    starts = torch.zeros(case.B, case.T, dtype=torch.bool, device=x.device)
    run = getattr(package, f"{job.cell.lower()}_triton")

    def call() -> Tensor:
        return run(x, *states, w.w_ih, w.w_hh, w.b_ih, w.b_hh, starts)[0]  # type: ignore[no-any-return]

    return subject(job, sides, call, x, w._asdict(), batch_first=True)


def xma(job: Job, sides: dict[str, Subject]) -> Subject:
    """open-lm-engine's accelerated model architectures: tanh(h W + x), W transposed. Its GRU has other equations."""
    _only(job, cells=("RNN",))
    run = importlib.import_module("xma").rnn
    w = plain_weights(job, sides)
    x = make_input(job.case, DTYPES[job.dtype], job.device).transpose(0, 1).contiguous()
    W = _leaf(w.w_hh.detach().t()[None])

    def call() -> Tensor:
        y, _ = run(linear(x, w.w_ih, w.b_ih + w.b_hh).unsqueeze(2), W)
        return y.squeeze(2)  # type: ignore[no-any-return]

    return subject(job, sides, call, x, {"w_ih": w.w_ih, "b_ih": w.b_ih, "b_hh": w.b_hh, "W": W}, batch_first=True)
