"""TorchScript: scripting is refused, tracing records torch.nn's kernels.

The tracer cannot see into a backend that takes addresses, and would record the reference's loop with as many
steps as the example has. torch.nn's kernels are one operator each, which takes any number of steps and rows.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch.jit._trace import TracerWarning
from torch.nn.utils.rnn import PackedSequence

from fastrnn import differentiable
from fastrnn.backends.base import Call, Output
from fastrnn.backends.native import NATIVE


def ignore_tracer_warnings() -> None:
    """Our checks of shapes become constants of a trace, as torch.nn's do, about which torch, too, is silent."""
    warnings.filterwarnings("ignore", category=TracerWarning, module=r"fastrnn\.")


ignore_tracer_warnings()


def refuse_scripting(module: Any) -> NoReturn:
    """What torch.jit.script calls first, as `__prepare_scriptable__`."""
    raise NotImplementedError(
        f"torch.jit.script does not support fastrnn.{type(module).__name__}, and TorchScript is deprecated: "
        "use torch.compile to run a model faster, torch.export to run it without Python"
    )


def check_traceable(input: Any, lengths: Any, resets: Any) -> None:
    """RuntimeError for what a trace would record as constants of its example."""
    for name, there in (
        ("a PackedSequence", isinstance(input, PackedSequence)),
        ("lengths", lengths is not None),
        ("resets", resets is not None),
    ):
        if there:
            raise RuntimeError(
                f"torch.jit.trace would record {name} of the example as constants of the model; use torch.export"
            )


def forward(call: Call) -> Output:
    """A call under the tracer."""
    if call.cell.params:
        raise RuntimeError(
            f"torch.jit.trace records torch.nn's kernels, and torch.nn has no {call.cell.name}; use torch.export"
        )
    return differentiable.run(NATIVE, call)
