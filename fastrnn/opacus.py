"""Differentially private training with Opacus: `import fastrnn.opacus`, then `ModuleValidator.fix(model)`.

Opacus computes each sample's gradients in a backward hook of each module, from the module's first input and the
gradient of its first output: too little for a recurrent module, whose states and lengths go in and whose final
states come out. The classes here are fastrnn's modules, with the same parameters, arguments and results, that
run their forward and its hooks on a flat form: tensors (B, ...) in, one tensor (B, K) out, for one layer at a
time. (Dropout lies between the layers, and so outside: what the hook computes again has nothing random in it.)
Each sample's gradients then come from one call of the engine. Hooks of one's own see the flat form, too.

Importing this module tells Opacus to ask for the replacement and how to make it. Opacus is to be used with
`batch_first=True`, its default, which is about the flat form: the modules themselves may have either layout.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.validators import register_module_fixer, register_module_validator
from opacus.validators.errors import ShouldReplaceModuleError
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastrnn import cells_modules, modules
from fastrnn.cells import CELLS
from fastrnn.layers import BOTH, FORWARD, run
from fastrnn.replace import _convert


class _Layers(modules.Recurrent):
    """RNN, LSTM and GRU. Their own forward is the flat form of one layer."""

    def forward(self, layer: Tensor, lengths: Tensor, resets: Tensor, x: Tensor, *states: Tensor) -> Tensor:
        """Flat form: layer (B, k) for layer k, lengths (B,) and resets (B, T), or either (B, 0) for None,
        x (B, T, I), states (B, S, H) each; y, h_n and c_n in one (B, K)."""
        reverse = BOTH if self.bidirectional else FORWARD
        first = layer.shape[1] * len(reverse)
        hx = tuple(a.transpose(0, 1) for a in states)
        y, finals, _ = run(
            CELLS[self.mode.lower()],
            x,
            (hx if len(hx) > 1 else hx[0]) if hx else None,
            self._weights()[first : first + len(reverse)],
            reverse,
            True,
            0.0,
            lengths if lengths.dim() == 1 else None,
            resets if resets.shape[1:] == x.shape[1:2] else None,
            self.backend,
        )
        return torch.cat([y.flatten(1), *(a.transpose(0, 1).flatten(1) for a in finals)], 1)

    def __call__(self, input: Any, hx: Any = None, *, lengths: Any = None, resets: Any = None) -> Any:
        """As of the module that this one replaces."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths, resets)
        self._prepare(input, hx, lengths, resets)  # the checks, with the messages of the module
        if input.dim() == 2:
            states = None if hx is None else hx.unsqueeze(1) if self.mode != "LSTM" else [a.unsqueeze(1) for a in hx]
            time = 0 if self.batch_first else 1
            cut = None if resets is None else resets.unsqueeze(time)
            lengths = None if lengths is None else torch.as_tensor(lengths).reshape(1)
            y, finals = self(input.unsqueeze(time), states, lengths=lengths, resets=cut)
            return y.squeeze(time), finals.squeeze(1) if self.mode != "LSTM" else tuple(a.squeeze(1) for a in finals)
        x = input if self.batch_first else input.transpose(0, 1)  # (B, T, I)
        absent = x.new_empty(x.shape[0], 0)
        lengths = absent if lengths is None else torch.as_tensor(lengths)
        cut = absent if resets is None else resets if self.batch_first else resets.t()
        y, finals = self._stack(x, hx, lengths, cut)
        y = y if self.batch_first else y.transpose(0, 1)
        return y, finals if self.mode == "LSTM" else finals[0]

    def _stack(self, x: Tensor, hx: Any, lengths: Tensor, resets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers, x (B, T, I), with dropout between them."""
        streams = 2 if self.bidirectional else 1
        given = () if hx is None else hx if self.mode == "LSTM" else (hx,)
        sizes = [self.proj_size or self.hidden_size] + [self.hidden_size] * (self.mode == "LSTM")
        batch, steps = x.shape[:2]
        collected = []
        for k in range(self.num_layers):
            states = [a[k * streams : (k + 1) * streams].transpose(0, 1) for a in given]
            flat = nn.Module.__call__(self, x.new_empty(batch, k), lengths, resets, x, *states)
            y, *finals = flat.split([steps * streams * sizes[0], *(streams * n for n in sizes)], 1)
            x = y.unflatten(1, (steps, streams * sizes[0]))
            collected.append([a.unflatten(1, (streams, n)).transpose(0, 1) for a, n in zip(finals, sizes, strict=True)])
            if k + 1 < self.num_layers:
                x = dropout(x, self.dropout, self.training)
        return x, tuple(torch.cat(layers) for layers in zip(*collected, strict=True))

    def _packed(self, packed: PackedSequence, hx: Any, lengths: Any, resets: Any) -> Any:
        self._prepare(packed, hx, lengths, resets)
        padded, own = pad_packed_sequence(packed, self.batch_first)
        cut = resets.t() if resets is not None and self.batch_first else resets
        y, finals = self(padded, hx, lengths=own, resets=cut)
        if packed.sorted_indices is not None:
            y = y.index_select(0 if self.batch_first else 1, packed.sorted_indices)
            own = own[packed.sorted_indices.cpu()]
        data = pack_padded_sequence(y, own, self.batch_first).data
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), finals


class _Step(cells_modules.RecurrentCell):
    """The cells. Their own forward takes x (B, I) and states (B, H), and gives h and c in one (B, K)."""

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        return torch.cat(self._step(x, (states if len(states) > 1 else states[0]) if states else None), 1)

    def __call__(self, input: Any, hx: Any = None) -> Any:
        """As of the module that this one replaces."""
        self._prepare(input, hx)
        pair = isinstance(self, cells_modules.LSTMCell)
        states = () if hx is None else hx if pair else (hx,)
        single = input.dim() == 1
        if single:
            input, states = input.unsqueeze(0), [a.unsqueeze(0) for a in states]
        out = nn.Module.__call__(self, input, *states).split(self.hidden_size, 1)
        out = tuple(a.squeeze(0) for a in out) if single else out
        return out if pair else out[0]


class DPRNN(_Layers, modules.RNN):  # type: ignore[misc]
    """fastrnn.RNN for Opacus."""


class DPLSTM(_Layers, modules.LSTM):  # type: ignore[misc]
    """fastrnn.LSTM for Opacus."""


class DPGRU(_Layers, modules.GRU):  # type: ignore[misc]
    """fastrnn.GRU for Opacus."""


class DPRNNCell(_Step, cells_modules.RNNCell):  # type: ignore[misc]
    """fastrnn.RNNCell for Opacus."""


class DPLSTMCell(_Step, cells_modules.LSTMCell):  # type: ignore[misc]
    """fastrnn.LSTMCell for Opacus."""


class DPGRUCell(_Step, cells_modules.GRUCell):  # type: ignore[misc]
    """fastrnn.GRUCell for Opacus."""


class _Forward(nn.Module):
    """A module's forward without its hooks, for torch.func.functional_call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Tensor = self.module.forward(*tensors)
        return out


def grad_sample(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients (B, *parameter.shape) of one call of the flat form; those of other layers are left out."""
    batch = backprops.shape[0]
    if any(a.shape[0] != batch for a in activations):
        raise ValueError("fastrnn.opacus: GradSampleModule and PrivacyEngine are to be given batch_first=True")
    ends = (f"_l{activations[0].shape[1]}", f"_l{activations[0].shape[1]}_reverse")
    own = {
        f"module.{name}": p
        for name, p in module.named_parameters()
        if p.requires_grad and (not isinstance(module, _Layers) or name.endswith(ends))
    }
    if not batch:
        return {p: p.new_zeros(0, *p.shape) for p in own.values()}
    alone, weights = _Forward(module), {name: p.detach() for name, p in own.items()}

    def of_one(dout: Tensor, *sample: Tensor) -> dict[str, Tensor]:
        rows = tuple(a.unsqueeze(0) for a in sample)
        pull: Any = torch.func.vjp(lambda w: torch.func.functional_call(alone, w, rows), weights)[1]
        grads: dict[str, Tensor] = pull(dout.unsqueeze(0))[0]
        return grads

    found = torch.func.vmap(of_one)(backprops, *activations)
    return {p: found[name] for name, p in own.items()}


def _validate(module: nn.Module) -> list[ShouldReplaceModuleError]:
    name = type(module).__name__
    return [
        ShouldReplaceModuleError(f"fastrnn.{name}: replace it by fastrnn.opacus.DP{name}, with ModuleValidator.fix")
    ]


def _register(ours: type[nn.Module], private: type[nn.Module]) -> None:
    def fix(module: Any) -> nn.Module:
        return _convert(module, private, module.backend)[0]

    register_module_validator(ours)(_validate)
    register_module_fixer(ours)(fix)
    register_grad_sampler(private)(grad_sample)


_register(modules.RNN, DPRNN)
_register(modules.LSTM, DPLSTM)
_register(modules.GRU, DPGRU)
_register(cells_modules.RNNCell, DPRNNCell)
_register(cells_modules.LSTMCell, DPLSTMCell)
_register(cells_modules.GRUCell, DPGRUCell)
