"""Scores of a language model: loss, perplexity, bits per character; and the unigram model to hold beside it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoint as checkpoints
from .data.hub import on_hub
from .data.stream import IGNORE, BpttLoader
from .errors import UserError
from .kernels import trusted
from .models.lm import LanguageModel


@dataclasses.dataclass
class Score:
    """`loss` in nats per token, over `tokens` predicted tokens; `bits_per_char` spreads it over the characters."""

    loss: float
    tokens: int
    bits_per_char: float

    @property
    def ppl(self) -> float:
        return perplexity(self.loss)

    def describe(self, level: str) -> str:
        bits = "" if level == "word" else f", {self.bits_per_char:.3f} bits per character"
        return f"perplexity {self.ppl:.2f} ({self.loss:.4f} nats per token{bits}) over {self.tokens:,} tokens"


def perplexity(loss: float) -> float:
    """exp of the mean loss, in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.inference_mode()
def evaluate_stream(model: LanguageModel, ids: Any, batch_size: int, bptt: int, chars: int) -> Score:
    """The score of `model` on the stream `ids` (N,), cut into `batch_size` columns, the state carried along each.

    Every token but the first is predicted once; a column starts from a zero state, so few columns score a little
    better. `chars` is the length of the text. Raises UserError if it is too short.
    """
    training = model.training
    model.eval()
    state, total, count = None, 0.0, 0
    for tokens, targets in BpttLoader(ids, batch_size, bptt, pad=True):
        summed, _, state = model.loss(tokens, targets, state)
        total += summed.item()
        count += int((targets != IGNORE).sum())
    model.train(training)
    return Score(total / count, count, total / math.log(2) / max(chars, 1))


def unigram_perplexity(train: Any, valid: Any, vocab_size: int) -> float:
    """The perplexity on `valid` of the model that knows only how often each token occurs in `train` (plus one)."""
    counts, seen = count(train, vocab_size) + 1, count(valid[1:], vocab_size)
    return math.exp(-float(seen @ np.log(counts / counts.sum())) / seen.sum())


def count(ids: Any, vocab_size: int) -> Any:
    """How often each id occurs in a tensor or (memory-mapped) array."""
    counts, step = np.zeros(vocab_size), 1 << 24
    for start in range(0, len(ids), step):
        counts += np.bincount(ids[start : start + step], minlength=vocab_size)
    return counts


def evaluate_checkpoint(
    path: str, data: str | None, split: str | None, batch_size: int, layer: str | None
) -> list[str]:
    """The score of any task's checkpoint on `data`, by default what it was trained on, of which the test or else the
    validation split. In lines; raises UserError for bad files and data, and where a kernel gave up."""
    from .tasks import find_task

    head = checkpoints.load(path)["fastrnn"]
    trained = head["config"]["data"]
    if data is None and trained is not None and not on_hub(trained) and not Path(trained).exists():
        raise UserError(f"{trained}, which {path} was trained on, is not there: name the data with --data")
    with trusted("there is no score: evaluate again, or with --layer torch"):
        lines: list[str] = find_task(head["task"]).evaluate(path, data, split, batch_size, layer)
    return lines


def chosen(name: str, splits: Any, split: str | None) -> str:
    """The split to score of the data that was trained on: `split`, or test, or validation."""
    split = split or ("test" if "test" in splits else "valid")
    if split not in splits:
        raise UserError(f"{name}: no split {split}; there are: {', '.join(sorted(splits))}")
    return split
