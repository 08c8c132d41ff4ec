"""RNNCell, LSTMCell and GRUCell in the place of torch.nn's: one step of the same op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrnn import quick
from fastrnn import validation as check
from fastrnn.autocast import autocast, autocasts
from fastrnn.backends import check_name, choose, requested
from fastrnn.backends.base import GATES, Call, Query, Weights
from fastrnn.cells import CELLS, Cell
from fastrnn.layers import FORWARD, empty
from fastrnn.problem import Problem
from fastrnn.recurrence import recurrence
from fastrnn.scripting import refuse_scripting

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class RecurrentCell(nn.RNNCellBase):
    """What the three cells share."""

    backend: str = "auto"
    save = GATES
    _gates = 0
    _cell_name = ""
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check.check_sizes(RuntimeError, 0, input_size=input_size, hidden_size=hidden_size)
        super().__init__(input_size, hidden_size, bias, self._gates, device=device, dtype=dtype)
        self.backend = check_name(backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def _weights(self) -> Weights:
        own = self._parameters
        # A name that is not a parameter is an attribute: parametrized, pruned or weight-normed.
        tensors: list[Any] = [own[name] if name in own else getattr(self, name) for name in _NAMES]
        return Weights._make([*tensors, None])

    def _cell(self) -> Cell:
        return CELLS[self._cell_name]

    def _prepare(self, input: Any, hx: Any, lengths: Any = None, resets: Any = None) -> Problem:
        if lengths is not None or resets is not None:
            raise TypeError("lengths, resets: a cell takes neither, it runs one step")
        cell, w, stepped = self._cell(), self._weights(), False
        check.check_rank(input, (1, 2), "(I,) or (B, I)")
        if autocasts(input):
            # torch.nn's kernel casts by itself, and the weights not again at each step.
            stepped = input.is_cpu and requested(self.backend) in ("auto", "native")
            input, hx, (w,) = autocast(input, hx, [w], w.w_ih.dtype if stepped else None)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)  # (B, I)
        check.check_input(x, w.w_ih, RuntimeError)
        grad = check.check_weights(cell, (w,), 1)
        batch, hidden = x.shape[0], w.w_hh.shape[1]
        states: tuple[Tensor, ...] = ()
        if hx is not None:
            states = check.cell_hx(hx, cell.states)
            grad |= check.check_states(states, input, (batch,) if batched else (), hidden, hidden)
            if not batched:
                states = tuple([a.unsqueeze(0) for a in states])
        grad = (grad or x.requires_grad) and torch.is_grad_enabled()
        device, features = x.device, x.shape[-1]
        query = Query(
            *(cell.name, device.type, x.dtype, 1, batch, features, hidden, hidden, 1, grad),
            step=True,
            cast=stepped,
            device_index=device.index or 0,
        )
        return Problem(x, states, (w,), query)

    def _name_parameters(self) -> tuple[tuple[str | None, ...], ...]:
        """Names of the parameters, in the order of `Weights`."""
        names = ((*_NAMES, None),)  # of a bias too that is None, for it may be assigned later
        self.__dict__["_quick_names"] = names
        return names

    def _step(self, input: Tensor, hx: Any) -> tuple[Tensor, ...]:
        cell = self._cell()
        states = (hx,) if cell.states == 1 and hx is not None else hx
        outs = quick.forward(self, cell, input, states, single=True)
        if outs is not None:
            return outs  # type: ignore[no-any-return]
        problem = self._prepare(input, hx)
        x, states, weights, query = problem[:4]
        if query.B:
            engine = choose(query, self.backend).backend
            finals = recurrence(engine, Call(self._cell(), x, states, tuple(weights), FORWARD)).finals
        else:
            full = problem._replace(states=tuple([a.unsqueeze(0) for a in states]))
            finals = tuple([a.squeeze(0) for a in empty(self._cell(), full, 1)[1]])
        carried = input if hx is None else hx if len(finals) == 1 else hx[1]
        if autocasts(input) and query.dtype is not torch.float64:
            # As in torch.nn, LSTM and GRU add products in autocast's dtype to the state that they are given (of
            # none, to zeros of the input's dtype); the RNN's new state is a sum of two such products.
            kind = torch.get_autocast_dtype(input.device.type)
            if self._gates > 1:
                kind = torch.promote_types(kind, carried.dtype)
            finals = tuple([a.to(kind) for a in finals])
        return finals if input.dim() == 2 else tuple([a.squeeze(0) for a in finals])


class RNNCell(RecurrentCell):
    """One step of the Elman network, as torch.nn.RNNCell: input (B, I) or (I,), hx (B, H) or (H,), to h'.

    Args: those of torch.nn.RNNCell, and `backend`, "auto" or a backend's name (`fastrnn.backends.NAMES`).
    """

    __constants__ = nn.RNNCell.__constants__
    _gates = 1
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)
        self.nonlinearity = nonlinearity

    def _cell(self) -> Cell:
        if self.nonlinearity not in ("tanh", "relu"):  # torch.nn, too, finds out here
            raise RuntimeError(f"nonlinearity: expected 'tanh' or 'relu', got {self.nonlinearity!r}")
        return CELLS[f"rnn_{self.nonlinearity}"]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, hx)[0]

    if TYPE_CHECKING:
        __call__ = forward


class LSTMCell(RecurrentCell):
    """One step of the LSTM, as torch.nn.LSTMCell: input (B, I) or (I,), hx (h, c) each (B, H) or (H,), to (h', c').

    Args: those of torch.nn.LSTMCell, and `backend`, "auto" or a backend's name (`fastrnn.backends.NAMES`).
    """

    _gates = 4
    _cell_name = "lstm"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = self._step(input, hx)
        return h, c

    if TYPE_CHECKING:
        __call__ = forward


class GRUCell(RecurrentCell):
    """One step of the GRU, as torch.nn.GRUCell: input (B, I) or (I,), hx (B, H) or (H,), to h'.

    Args: those of torch.nn.GRUCell, and `backend`, "auto" or a backend's name (`fastrnn.backends.NAMES`).
    """

    _gates = 3
    _cell_name = "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, hx)[0]

    if TYPE_CHECKING:
        __call__ = forward
