"""RNN, LSTM and GRU in the place of torch.nn's: same arguments, attributes, parameters, state_dict and results.

Beyond torch.nn, `forward` takes `lengths=`, `resets=` and `return_states=` (see `fastrnn.functional.lstm`), and the
constructor `backend=`, "auto" or a backend's name (`fastrnn.backends.NAMES`), and `save=`, "gates" or "states": what is
kept for backward. An empty batch or sequence gives an empty result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrnn import quick
from fastrnn.backends import check_name
from fastrnn.backends.base import Weights
from fastrnn.cells import CELLS, Cell
from fastrnn.layers import BOTH, FORWARD, Batch, run
from fastrnn.problem import Problem, prepare
from fastrnn.scripting import refuse_scripting
from fastrnn.validation import check_proj_size, check_save, check_sizes

if TYPE_CHECKING:
    from fastrnn.typed import Layer


class Recurrent(nn.RNNBase):
    """What the three modules share. The weights are read from the module's attributes at every call.

    torch.nn keeps a list of them beside the attributes, which goes stale when they are replaced; here
    `_flat_weights` is computed from the attributes, so that parametrize, weight_norm, prune,
    functional_call and tied parameters work without further ado.
    """

    backend: str = "auto"
    save: str = "gates"
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        save: str = "gates",
    ) -> None:
        check_sizes(ValueError, 1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_proj_size(proj_size, hidden_size)
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(mode, *sizes, bias, batch_first, dropout, bidirectional, proj_size, device=device, dtype=dtype)
        self.backend = check_name(backend)
        self.save = check_save(save)
        self.__dict__.pop("_quick_names", None)  # of another call of __init__

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self.__dict__.get("_flat_weights_names", ())]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """torch.nn assigns its list here; ours needs none."""

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        pass  # nothing is cached

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """For compatibility with torch.nn; does nothing."""

    def extra_repr(self) -> str:
        ours = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return super().extra_repr() + ours + ("" if self.save == "gates" else f", save={self.save!r}")

    def _cell(self) -> Cell:
        return CELLS[self.mode.lower()]

    def _params(self) -> Sequence[tuple[Tensor, ...]]:
        """The cell's per-unit parameters, (H,) each, for each of `_weights`; none of torch.nn's cells has any."""
        return ()

    def _weights(self) -> list[Weights]:
        own, out = self._parameters, []
        for names in self._all_weights:
            # A name that is not a parameter is an attribute: parametrized, pruned or weight-normed.
            tensors: list[Any] = [own[name] if name in own else getattr(self, name) for name in names]
            if not self.bias:
                tensors[2:2] = None, None
            if not self.proj_size:
                tensors.append(None)
            out.append(Weights._make(tensors))
        return out

    def _name_parameters(self) -> tuple[tuple[str | None, ...], ...]:
        """Names of the parameters of the first layer's streams, in the order of `Weights`."""
        names = []
        for own in self._all_weights[: 2 if self.bidirectional else 1]:
            bias = own[2:4] if self.bias else (None, None)
            names.append((*own[:2], *bias, own[-1] if self.proj_size else None))
        self.__dict__["_quick_names"] = tuple(names)
        return tuple(names)

    def _run(
        self, input: Any, hx: Any, lengths: Any, resets: Any, return_states: bool
    ) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
        cell = self._cell()
        if not cell.params and self.num_layers == 1 and lengths is None and resets is None and not return_states:
            states = (hx,) if cell.states == 1 and hx is not None else hx
            outs = quick.forward(self, cell, input, states, batch_first=self.batch_first)
            if outs is not None:
                return outs[0], outs[1:], ()
        return run(
            cell,
            input,
            hx,
            self._weights(),
            BOTH if self.bidirectional else FORWARD,
            self.batch_first,
            self.dropout if self.training else 0.0,
            lengths,
            resets,
            self.backend,
            self.save,
            return_states,
            self._params(),
        )

    def _prepare(self, input: Any, hx: Any, lengths: Any, resets: Any) -> Problem:
        reverse = BOTH if self.bidirectional else FORWARD
        return prepare(self._cell(), input, hx, self._weights(), reverse, self.batch_first, lengths, resets)


def _refuse_proj_size(name: str, proj_size: int | None) -> None:
    if proj_size is not None:
        raise ValueError(f"proj_size: only LSTM takes it, not {name}")


class RNN(Recurrent):
    """Elman network, as torch.nn.RNN: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu.

    Args: those of torch.nn.RNN, and `backend` and `save`, see above.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int | None = None,
        backend: str = "auto",
        save: str = "gates",
    ) -> None:
        _refuse_proj_size("RNN", proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        mode = f"RNN_{nonlinearity.upper()}"
        layer = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(mode, *layer, device=device, dtype=dtype, backend=backend, save=save)

    def forward(
        self,
        input: Batch,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """(output, h_n); shapes as in torch.nn.RNN, `lengths` and `resets` as in `fastrnn.functional.lstm`."""
        y, finals, states = self._run(input, hx, lengths, resets, return_states)
        return (y, finals[0], states) if return_states else (y, finals[0])

    if TYPE_CHECKING:
        __call__: Layer[Tensor]


class LSTM(Recurrent):
    """Long short-term memory, as torch.nn.LSTM, with `proj_size`.

    Args: those of torch.nn.LSTM, and `backend` and `save`, see above.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        save: str = "gates",
    ) -> None:
        layer = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *layer, device=device, dtype=dtype, backend=backend, save=save)

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def forward(
        self,
        input: Batch,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """(output, (h_n, c_n)); shapes as in torch.nn.LSTM, `lengths` and `resets` as in `fastrnn.functional.lstm`."""
        y, finals, states = self._run(input, hx, lengths, resets, return_states)
        return (y, finals, states) if return_states else (y, finals)

    if TYPE_CHECKING:
        __call__: Layer[tuple[Tensor, Tensor]]


class GRU(Recurrent):
    """Gated recurrent unit, as torch.nn.GRU.

    Args: those of torch.nn.GRU, and `backend` and `save`, see above.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int | None = None,
        backend: str = "auto",
        save: str = "gates",
    ) -> None:
        _refuse_proj_size("GRU", proj_size)
        layer = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__("GRU", *layer, device=device, dtype=dtype, backend=backend, save=save)

    def forward(
        self,
        input: Batch,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """(output, h_n); shapes as in torch.nn.GRU, `lengths` and `resets` as in `fastrnn.functional.lstm`."""
        y, finals, states = self._run(input, hx, lengths, resets, return_states)
        return (y, finals[0], states) if return_states else (y, finals[0])

    if TYPE_CHECKING:
        __call__: Layer[Tensor]
