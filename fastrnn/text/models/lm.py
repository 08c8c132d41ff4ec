"""A recurrent language model: embedding, recurrent layers, a linear layer over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LmConfig
from ..data.stream import IGNORE
from ..errors import UserError
from .recurrent import recurrent_class
from .regularised import Stack, drop_rows, locked_dropout

State = Any  # (h, c) of an LSTM, h of a GRU or RNN, each (layers, B, hidden_size); of a Stack, one for each layer


class LanguageModel(nn.Module):
    """Predicts each next token of a stream.

    The two layer libraries share parameter names, so a model trained with one loads into the other.
    """

    def __init__(self, config: LmConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = c = config
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, c.emb_size)
        if c.stacked:
            self.rnn: nn.Module = Stack(c)
        else:
            between = c.dropout if c.layers > 1 else 0.0
            self.rnn = recurrent_class(c.layer, c.cell)(c.emb_size, c.hidden_size, c.layers, dropout=between)
        if c.cutoffs is not None and c.cutoffs[-1] >= vocab_size:
            raise UserError(f"--cutoffs {c.cutoffs} must lie below the {vocab_size} tokens of the vocabulary")
        if c.cutoffs is not None:
            self.output: nn.Module = nn.AdaptiveLogSoftmaxWithLoss(c.last_size, vocab_size, c.cutoffs)
        else:
            self.output = nn.Linear(c.last_size, vocab_size)
        if c.tied:
            self.output.weight = self.embedding.weight
        if c.init_range > 0:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -c.init_range, c.init_range)
        elif c.tied:  # N(0, 1), an embedding's default, is far too large for the logits it also makes
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the token after each of `tokens` (their logarithms of probability, with --cutoffs).

        Args:
            tokens: (T, B) int64.
            state: what an earlier call returned, to go on from there; None is zero.

        Returns:
            logits (T, B, vocab_size), and the state after the last token.
        """
        _, y, state = self.hidden(tokens, state)
        if isinstance(self.output, nn.AdaptiveLogSoftmaxWithLoss):
            return self.output.log_prob(y.flatten(0, 1)).view(*tokens.shape, -1), state
        return self.output(y), state

    def hidden(self, tokens: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Outputs of the last layer (T, B, H), the same after dropout, and the state."""
        c = self.config
        weight = drop_rows(self.embedding.weight, c.dropout_emb, self.training)
        x = self.drop(F.embedding(tokens, weight), c.dropout if c.dropout_in is None else c.dropout_in)
        y, state = self.rnn(x, state)
        return y, self.drop(y, c.dropout), state

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout on x (T, B, H); variational: one mask for all steps."""
        return locked_dropout(x, p, self.training) if self.config.variational else F.dropout(x, p, self.training)

    def loss(self, tokens: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """The cross-entropy in nats summed over the targets (T, B) that are not IGNORE, what the regularisers AR and
        TAR add to its mean, and the state after the last token."""
        c = self.config
        y, dropped, state = self.hidden(tokens, state)
        flat, wanted = dropped.flatten(0, 1), targets.flatten()
        if isinstance(self.output, nn.AdaptiveLogSoftmaxWithLoss):
            kept = wanted != IGNORE
            summed = -self.output(flat[kept], wanted[kept]).output.sum()
        else:
            summed = F.cross_entropy(self.output(flat), wanted, ignore_index=IGNORE, reduction="sum")
        penalty = summed.new_zeros(())
        if self.training and c.alpha:
            penalty = penalty + c.alpha * dropped.float().square().mean()
        if self.training and c.beta and len(y) > 1:
            penalty = penalty + c.beta * (y[1:] - y[:-1]).float().square().mean()
        return summed, penalty, state


def detach(state: State) -> State:
    """`state` cut from the graph that made it: gradients stop there, values carry on."""
    return tuple(detach(s) for s in state) if isinstance(state, tuple) else state.detach()


def move(state: State | None, device: torch.device) -> State | None:
    """`state` on `device`."""
    if state is None:
        return None
    return tuple(move(s, device) for s in state) if isinstance(state, tuple) else state.to(device)
