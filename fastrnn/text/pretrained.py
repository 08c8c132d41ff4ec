"""A classifier that starts from a language model, and is unfrozen from the top down.

Howard, Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from . import checkpoint as checkpoints
from .config import ClassifyConfig, LmConfig
from .data.tokens import Vocabulary
from .errors import UserError
from .models.classifier import Classifier


def adopt(config: ClassifyConfig, path: str) -> ClassifyConfig:
    """`config` with the network and words of the language model at `path`, one direction only.

    Raises UserError for a bad file, and for a model whose layers differ in size.
    """
    lm = LmConfig(**{**checkpoints.load(path, "lm")["fastrnn"]["config"], "devices": 1, "nodes": 1})
    if lm.stacked and lm.layers > 1 and lm.last_size != lm.hidden_size:
        raise UserError(
            f"--pretrained {path}: its last layer has {lm.last_size} units and the others {lm.hidden_size}; "
            "train the language model with --emb-size equal to --hidden-size, or not --tied"
        )
    if config.input != "text":
        raise UserError("--pretrained needs --input text")
    return dataclasses.replace(
        config, cell=lm.cell, emb_size=lm.emb_size, hidden_size=lm.last_size, layers=lm.layers, bidirectional=False,
        level=lm.level, words=lm.words, lower=lm.lower, vocab_size=lm.vocab_size, stop_words=None, stem=None,
    )  # fmt: skip


def vocabulary_of(path: str) -> Vocabulary:
    return Vocabulary.from_state(checkpoints.load(path, "lm")["fastrnn"]["tokenizer"])


def start_from(model: Classifier, path: str) -> None:
    """Copies the embedding and the recurrent layers of the language model at `path` into `model`."""
    found = {}
    for name, weight in checkpoints.weights(checkpoints.load(path, "lm")).items():
        stacked = re.fullmatch(r"rnn\.layers\.(\d+)\.(\w+)_l0(_raw)?", name)
        if stacked:
            found[f"rnn.{stacked[2]}_l{stacked[1]}"] = weight
        elif name.startswith(("embedding.", "rnn.")):
            found[name] = weight
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, weight in found.items():
            own[name].copy_(weight)
    missing = {name for name in own if name.startswith(("embedding.", "rnn."))} - set(found)
    if missing:
        raise UserError(f"--pretrained {path}: the language model has no {', '.join(sorted(missing))}")


def layer_groups(model: Classifier) -> list[dict[str, Any]]:
    """Parameter groups with a "depth": 0 for pooling and output, then the recurrent layers downwards, the embedding."""
    layers = int(model.rnn.num_layers)  # type: ignore[arg-type]
    groups: dict[int, list[Any]] = {}
    for name, parameter in model.named_parameters():
        level = re.search(r"_l(\d+)$", name)
        depth = layers - int(level[1]) if level else 0
        if name.startswith("embedding."):
            depth = layers + 1
        groups.setdefault(depth, []).append(parameter)
    return [{"params": groups[depth], "depth": depth} for depth in sorted(groups)]
