"""The options of a language model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import UserError
from .run import RunConfig, at_least, below, option


@dataclasses.dataclass
class LmConfig(RunConfig):
    """A recurrent language model: text, vocabulary, network, and how the text is cut into batches."""

    data: str | None = option(
        None, "text file or folder; by default the language reference that Python carries", free=True
    )
    level: Literal["char", "word", "bpe"] = option("char", "what a token is; word: what stands between blanks")
    vocab_size: int | None = option(None, "largest vocabulary; by default all characters, 10000 words, 4000 pieces")
    cell: Literal["lstm", "gru", "rnn"] = option("lstm", "recurrent cell")
    layer: Literal["fastrnn", "torch"] = option("fastrnn", "whose recurrent layers: fastrnn's or torch.nn's", free=True)
    emb_size: int = option(64, "size of an embedding")
    hidden_size: int = option(256, "units of a recurrent layer")
    layers: int = option(1, "recurrent layers")
    dropout: float = option(0.1, "dropout on embeddings, between layers and on outputs")
    tied: bool = option(False, "share the embedding with the output layer (needs --emb-size equal to --hidden-size)")
    init_range: float = option(0.0, "draw all weights from U(-a, a); 0: PyTorch's initialisation")
    batch_size: int = option(16, "columns that the text is cut into, over all processes")
    bptt: int = option(64, "steps of truncated back-propagation")
    eval_batch_size: int = option(
        10, "columns at validation; the published Penn Treebank figures use 1 at the end", free=True
    )
    sample: int = option(400, "tokens of the sample written at the end; 0: none", free=True)
    compare: int = option(15, "steps timed with each layer, fastrnn and torch.nn, at the end; 0: none", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "emb_size", "hidden_size", "layers", "batch_size", "bptt", "eval_batch_size")
        at_least(self, 0, "init_range", "sample", "compare")
        below(self, 1, "dropout")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise UserError(f"--vocab-size must be at least 2, got {self.vocab_size}")
        if self.tied and self.emb_size != self.hidden_size:
            raise UserError(f"--tied needs --emb-size ({self.emb_size}) equal to --hidden-size ({self.hidden_size})")
        if self.batch_size % self.world:
            raise UserError(f"--batch-size {self.batch_size} must be a multiple of the {self.world} processes")
