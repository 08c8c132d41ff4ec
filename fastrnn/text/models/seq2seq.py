"""Encoder and decoder with attention.

Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015), and Luong, Pham,
Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015), its global attention, score
"general". S source steps, T target steps, B pairs, E units of the encoder's outputs, H of the decoder's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TranslateConfig
from .recurrent import recurrent_class, run_ragged


class Memory(NamedTuple):
    """What the decoder attends to: the encoder's outputs `values` (B, S, E), what is made of them once for the scores
    `keys` (B, S, H), and `beyond` (B, S), true past the end of a source."""

    values: Tensor
    keys: Tensor
    beyond: Tensor

    def select(self, rows: Tensor) -> Memory:
        return Memory(self.values[rows], self.keys[rows], self.beyond[rows])


class Seq2Seq(nn.Module):
    """Logits of each next target token, given the source and the target tokens before it.

    The target has two tokens beyond its vocabulary: `end` = target_size, and `begin`, which is never predicted.
    """

    def __init__(self, config: TranslateConfig, source_size: int, target_size: int) -> None:
        super().__init__()
        c = config
        self.end, self.begin = target_size, target_size + 1
        self.packed = c.layer == "torch"
        self.bahdanau = c.attention == "bahdanau"
        recurrent, between = recurrent_class(c.layer, c.cell), c.dropout if c.layers > 1 else 0.0
        half = c.hidden_size // 2
        self.source = nn.Embedding(source_size, c.emb_size)
        self.encoder = recurrent(c.emb_size, half, c.layers, bidirectional=True, dropout=between)
        self.target = nn.Embedding(target_size + 2, c.emb_size)
        inputs = c.emb_size + (c.hidden_size if self.bahdanau else 0)
        self.decoder = recurrent(inputs, c.hidden_size, c.layers, dropout=between)
        self.bridge = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        if self.bahdanau:
            self.query = nn.Linear(c.hidden_size, c.hidden_size)
            self.score = nn.Linear(c.hidden_size, 1, bias=False)
        self.combine = nn.Linear(2 * c.hidden_size, c.hidden_size)
        self.output = nn.Linear(c.hidden_size, target_size + 1)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, source: Tensor, lengths: Tensor, inputs: Tensor) -> Tensor:
        """Logits (T, B, target_size + 1) from source (S, B), its lengths (B,), and inputs (T, B): `begin`, then the
        target."""
        memory, state = self.encode(source, lengths)
        logits, _, _ = self.decode(inputs, state, memory)
        return logits

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Memory, Any]:
        """What to attend to, and the decoder's first state."""
        y, state = run_ragged(self.encoder, self.dropout(self.source(source)), lengths, self.packed)
        values = y.transpose(0, 1)
        beyond = torch.arange(len(y), device=y.device) >= lengths.unsqueeze(1)
        memory = Memory(values, self.key(values), beyond)
        if isinstance(state, tuple):
            return memory, (self.begin_state(state[0]), both_directions(state[1]))
        return memory, self.begin_state(state)

    def begin_state(self, h: Tensor) -> Tensor:
        """tanh(W [forward; backward]) of each layer: (layers, B, H)."""
        return torch.tanh(self.bridge(both_directions(h)))

    def decode(self, inputs: Tensor, state: Any, memory: Memory) -> tuple[Tensor, Any, Tensor]:
        """Logits (T, B, target_size + 1), the state after the last step, and the attention's weights (T, B, S)."""
        x = self.dropout(self.target(inputs))
        if not self.bahdanau:  # the states do not depend on the attention: all steps at once
            h, state = self.decoder(x, state)
            weights = torch.bmm(h.transpose(0, 1), memory.keys.transpose(1, 2))  # (B, T, S)
            weights = weights.masked_fill(memory.beyond.unsqueeze(1), -torch.inf).softmax(2)
            context = torch.bmm(weights, memory.values).transpose(0, 1)
            weights = weights.transpose(0, 1)
        else:
            h, context, weights, state = self.step_by_step(x, state, memory)
        combined = torch.tanh(self.combine(torch.cat([h, context], dim=2)))
        return self.output(self.dropout(combined)), state, weights

    def step_by_step(self, x: Tensor, state: Any, memory: Memory) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Bahdanau: each step's input has the context found with the state before it. h, context (T, B, H), weights."""
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for x_t in x:
            top = (state[0] if isinstance(state, tuple) else state)[-1]
            scores = self.score(torch.tanh(self.query(top).unsqueeze(1) + memory.keys)).squeeze(2)  # (B, S)
            weights = scores.masked_fill(memory.beyond, -torch.inf).softmax(1)
            context = torch.bmm(weights.unsqueeze(1), memory.values).squeeze(1)
            y, state = self.decoder(torch.cat([x_t, context], dim=1).unsqueeze(0), state)
            steps.append((y.squeeze(0), context, weights))
        h, contexts, all_weights = (torch.stack(part) for part in zip(*steps, strict=True))
        return h, contexts, all_weights, state


def both_directions(h: Tensor) -> Tensor:
    """(layers, B, 2 H) of a bidirectional state (layers * 2, B, H)."""
    layers, batch, size = len(h) // 2, h.shape[1], h.shape[2]
    return h.view(layers, 2, batch, size).transpose(1, 2).reshape(layers, batch, 2 * size)


def select_state(state: Any, rows: Tensor) -> Any:
    """The state of some of a batch's rows."""
    return tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Summed over the targets (T, B) that are not padding."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing)
