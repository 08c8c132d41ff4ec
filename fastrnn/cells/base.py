"""What a cell is: the contract between the equations and everything that runs them.

A cell is one time step of a recurrence and its derivative, written once in plain Python
over abstract values, so that the same text serves fp64 tensors in the reference loop and
tiles in a Triton kernel. A cell knows nothing of time, batch, memory or devices.

    step(x, r, s, p, sigmoid, tanh, where)                    -> s', tape
    step_backward(tape, s, s', p, ds, sigmoid, tanh, where)   -> dx, dr, ds, dp

Every argument is a tuple of values that are combined element by element, one entry per

    x     input pre-activation       W_ih x_t + b_ih, per gate
    r     recurrent pre-activation   W_hh h_{t-1} + b_hh, per gate
    s     state                      s[0] is h, the one that feeds back through W_hh
    p     per-unit parameter         (peepholes and the like)
    tape  value that the derivative needs, besides the states

`ds` is the gradient with respect to s'. The `ds` that comes back leaves out the path
through r: the loop adds `W_hh^T dr` to its first entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """The equations of one recurrence, and the sizes that a loop needs to know.

    Attributes:
        name: registry name; the C++ text bears the same one.
        step: one time step, see the module's docstring.
        step_backward: its derivative.
        gates: recurrent gates; `W_hh` has `gates * H` rows, as has `W_ih`.
        states: carried states, h first.
        tape: values saved per unit and step.
        split: gates whose gradients with respect to x and r differ (the GRU's n, because
            its reset gate stands between the two). For all others dr is dx, stored once.
        params: per-unit parameter vectors.
    """

    name: str
    step: Callable[..., tuple[Values, Values]]
    step_backward: Callable[..., tuple[Values, Values, Values, Values]]
    gates: int
    states: int
    tape: int
    split: tuple[int, ...] = ()
    params: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Gates, states, tape, dgates, params, as csrc/bindings/cell_sizes.h has them of the C++ text."""
        return self.gates, self.states, self.tape, self.dgates, self.params

    def unlike(self, compiled: tuple[int, ...]) -> str | None:
        """Why a C++ text of these `sizes`, which would read and write other memory, is not this cell's."""
        if compiled == self.sizes:
            return None
        names = "gates, states, tape, dgates, params"
        return f"its C++ text of {self.name} has {names} {compiled}, fastrnn/cells has {self.sizes}: compile anew"

    @property
    def dgates(self) -> int:
        """Gradient vectors per step: dx of every gate, then dr of each split gate."""
        return self.gates + len(self.split)
