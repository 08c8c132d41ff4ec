"""AWD-LSTM's regularisers. Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (2017)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LmConfig
from .recurrent import recurrent_class

HH = "weight_hh_l0"


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Variational dropout on x (T, B, H): the same units of a column at every step (Gal, Ghahramani, 2016)."""
    if not training or p == 0:
        return x
    return x * F.dropout(x.new_ones(1, *x.shape[1:]), p)


def drop_rows(weight: Tensor, p: float, training: bool) -> Tensor:
    """Embedding `weight` (V, E) without some of its words, all of their occurrences in this batch."""
    if not training or p == 0:
        return weight
    return weight * F.dropout(weight.new_ones(len(weight), 1), p)


class Stack(nn.Module):
    """Recurrent layers one by one: each has its size, its dropped weights, and dropout of one mask after it.

    The state is a tuple of the layers' states. With --weight-drop, a layer's recurrent weight is the parameter
    `weight_hh_l0_raw`, and what the layer runs on is a dropped copy, drawn at each call.
    """

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.config = c = config
        kind = recurrent_class(c.layer, c.cell)
        sizes = [c.emb_size, *[c.hidden_size] * (c.layers - 1), c.last_size]
        self.layers = nn.ModuleList(kind(i, h) for i, h in pairwise(sizes))
        if c.weight_drop:
            for layer in self.layers:
                raw = getattr(layer, HH)
                delattr(layer, HH)
                layer.register_parameter(f"{HH}_raw", raw)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        c, states = self.config, []
        for i, layer in enumerate(self.layers):
            if c.weight_drop:
                raw = getattr(layer, f"{HH}_raw")
                # view_as: in eval mode dropout returns what it was given, and a Parameter would be registered
                setattr(layer, HH, F.dropout(raw.view_as(raw), c.weight_drop, self.training))
            x, after = layer(x, None if state is None else state[i])
            states.append(after)
            if i < len(self.layers) - 1:
                p = c.dropout if c.dropout_hidden is None else c.dropout_hidden
                x = locked_dropout(x, p, self.training) if c.variational else F.dropout(x, p, self.training)
        return x, tuple(states)
