"""Measure how a module's calls run best on this GPU, once, for all later ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import BACKENDS, backend, clear_choices
from fastrnn.backends.triton import Triton, device, precision, tuning
from fastrnn.explain import explain
from fastrnn.modules import Recurrent


def tune(
    module: Recurrent,
    input: Any,
    hx: Any = None,
    *,
    lengths: Any = None,
    resets: Tensor | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, tuning.Finding]:
    """Measure the Triton kernels' plans and torch.nn's kernels on `module(input, hx, ...)`, and keep what is found.

    From then on, and in later processes, calls of this cell, type, hidden size, directions and about this batch size
    take the best plan, and `auto` takes Triton where it was the faster. Gradients are measured where they are asked
    for: call it under `torch.no_grad()` for inference alone. It takes seconds, most of them for compiling. At the end
    it prints what `explain` says of the call.

    Args:
        module: on a CUDA device, its `backend` left at "auto".
        input, hx, lengths, resets: as of a call.
        timer: seconds of one call of the function that it is given; by default the median of some tenths of a second.

    Returns:
        What was found, as it is kept on disk (FASTRNN_CACHE, or the user's cache folder).

    Raises:
        TypeError: `module` is not one of fastrnn's.
        ValueError: `module` has a backend of its own.
        RuntimeError: Triton cannot run the call, with the reason.
    """
    if not isinstance(module, Recurrent):
        raise TypeError(f"module: expected fastrnn.RNN, LSTM or GRU, got {type(module).__name__}")
    if module.backend != "auto":
        raise ValueError(f"module.backend: expected 'auto', got {module.backend!r}: everything would run there")
    query = module._prepare(input, hx, lengths, resets).query
    triton, native = BACKENDS["triton"], BACKENDS["native"]
    assert isinstance(triton, Triton)
    why_not = triton.unsupported(query)
    if why_not is not None:
        raise RuntimeError(f"backend 'triton' cannot run this call: {why_not}")

    x = input if isinstance(input, Tensor) else input.data
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    wanted = [a for a in (x, *states, *module.parameters()) if a.requires_grad]

    def run(name: str, backward: bool) -> None:
        with backend(name), torch.set_grad_enabled(backward):
            output = module(input, hx, lengths=lengths, resets=resets)[0]
            data = output if isinstance(output, Tensor) else output.data
            if backward:
                torch.autograd.grad(data, wanted, torch.ones_like(data))

    with device.current(next(module.parameters()).device):
        kind, can = precision.of(query.dtype), native.unsupported(query) is None
        found = tuning.search(query, kind, run, can, timer)
        tuning.record(found, device.limits(query.device, query.device_index))
    clear_choices()
    explain(module, input, hx, lengths=lengths, resets=resets)
    return found
