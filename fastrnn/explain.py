"""Which backend a call takes, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrnn.backends import Choice, choose
from fastrnn.cells_modules import RecurrentCell
from fastrnn.modules import Recurrent
from fastrnn.wavefront import decide


def explain(
    module: Recurrent | RecurrentCell, input: Any, hx: Any = None, *, lengths: Any = None, resets: Tensor | None = None
) -> Choice:
    """Print and return the backend that `module(input, hx, ...)` would take, and why; runs nothing.

    The choice depends on whether gradients are asked for: call it under `torch.no_grad()` for inference.

    Raises:
        TypeError: `module` is not one of fastrnn's.
        Others: those of the call itself.
    """
    if not isinstance(module, (Recurrent, RecurrentCell)):
        raise TypeError(f"module: expected a fastrnn module, got {type(module).__name__}; see fastrnn.replace")
    query = module._prepare(input, hx, lengths, resets).query
    choice = choose(query, module.backend)
    if isinstance(module, Recurrent):
        how = decide(choice.backend, query, module.num_layers)
        if how.steps or module.num_layers > 1:
            choice = choice._replace(reason=f"{choice.reason}; {how.reason}")
    print(
        f"{type(module).__name__} T={query.T} B={query.B} I={query.I} H={query.H} {query.dtype} {query.device}"
        f"{' with gradients' if query.grad else ''}: {choice.backend.name} ({choice.reason})"
    )
    return choice
