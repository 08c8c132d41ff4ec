"""A recurrent language model: embedding, recurrent layers, a linear layer over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import LmConfig
from .recurrent import recurrent_class

State = Any  # (h, c) of an LSTM, h of a GRU or RNN; each (layers, B, hidden_size)


class LanguageModel(nn.Module):
    """Predicts each next token of a stream.

    The two layer libraries share parameter names, so a model trained with one loads into the other.
    """

    def __init__(self, config: LmConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.emb_size)
        self.rnn = recurrent_class(config.layer, config.cell)(
            config.emb_size, config.hidden_size, config.layers, dropout=config.dropout if config.layers > 1 else 0.0
        )
        self.output = nn.Linear(config.hidden_size, vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        if config.tied:
            self.output.weight = self.embedding.weight
        if config.init_range > 0:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -config.init_range, config.init_range)
        elif config.tied:  # N(0, 1), an embedding's default, is far too large for the logits it also makes
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the token after each of `tokens`.

        Args:
            tokens: (T, B) int64.
            state: what an earlier call returned, to go on from there; None is zero.

        Returns:
            logits (T, B, vocab_size), and the state after the last token.
        """
        x = self.dropout(self.embedding(tokens))
        x, state = self.rnn(x, state)
        return self.output(self.dropout(x)), state


def detach(state: State) -> State:
    """`state` cut from the graph that made it: gradients stop there, values carry on."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def move(state: State | None, device: torch.device) -> State | None:
    """`state` on `device`."""
    if state is None:
        return None
    return tuple(s.to(device) for s in state) if isinstance(state, tuple) else state.to(device)
