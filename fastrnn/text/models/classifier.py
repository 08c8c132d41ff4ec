"""A recurrent classifier: embedding (or numbers as they are), recurrent layers, pooling over time, a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ClassifyConfig
from .recurrent import recurrent_class, run_ragged


class Classifier(nn.Module):
    """Logits of a sequence's class, or one number for regression.

    Args:
        inputs: size of the vocabulary, or for series the features of a step.
        outputs: classes, or 1.
    """

    def __init__(self, config: ClassifyConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        c = config
        text = c.input == "text"
        self.embedding = nn.Embedding(inputs, c.emb_size) if text else None
        self.rnn = recurrent_class(c.layer, c.cell)(
            c.emb_size if text else inputs,
            c.hidden_size,
            c.layers,
            bidirectional=c.bidirectional,
            dropout=c.dropout if c.layers > 1 else 0.0,
        )
        self.packed = c.batches == "packed" or c.layer == "torch"
        size = c.hidden_size * (2 if c.bidirectional else 1)
        self.pool = Pooling(c.pooling, size)
        self.dropout = nn.Dropout(c.dropout)
        self.output = nn.Linear(3 * size if c.pooling == "concat" else size, outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, outputs) from x (T, B) int64, or (T, B, features) for series, and lengths (B,), at least 1 each."""
        if self.embedding is not None:
            x = self.dropout(self.embedding(x))
        y, state = run_ragged(self.rnn, x, lengths, self.packed)
        logits: Tensor = self.output(self.dropout(self.pool(y, state, lengths)))
        return logits


class Pooling(nn.Module):
    """One vector of a sequence: "last" state of each direction, "mean", "max" or "attention" over its steps, or
    "concat", of the last, the maximum and the mean (Howard, Ruder, 2018).

    Attention is Bahdanau's with a learned query: a_t = softmax(v tanh(W y_t)).
    """

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.score = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 1, bias=False))

    def forward(self, y: Tensor, state: Any, lengths: Tensor) -> Tensor:
        """(B, H) from outputs y (T, B, H) and the state (h, c) or h, each (layers * directions, B, ...)."""
        beyond = (torch.arange(len(y), device=y.device).unsqueeze(1) >= lengths).unsqueeze(2)  # (T, B, 1)
        found = []
        if self.kind in ("last", "concat"):
            h = state[0] if isinstance(state, tuple) else state
            directions = y.shape[2] // h.shape[2]
            found += h[-directions:].unbind()
        if self.kind in ("max", "concat"):
            found.append(y.masked_fill(beyond, -torch.inf).amax(0))
        if self.kind in ("mean", "concat"):
            found.append(y.sum(0) / lengths.unsqueeze(1))
        if found:
            return torch.cat(found, dim=1)
        weights: Tensor = self.score(y).masked_fill(beyond, -torch.inf).softmax(0)
        return (weights * y).sum(0)
